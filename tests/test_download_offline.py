"""data/download.py where there is no network, or no such host."""

import socket

import pytest

from data import download


def test_an_unknown_host_is_asked_for_twice(workdir, capsys, monkeypatch):
    asked = []

    def not_found(host, *more, **named):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", not_found)
    monkeypatch.setattr(download, "PAUSES", (0, 0, 0))
    with pytest.raises(SystemExit) as end:
        download.main(["annotations", "--mirror", "http://no-such-host.invalid"])
    *_, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(asked) == 2
    assert "no such host, or no network (Name or service not known)" in line
