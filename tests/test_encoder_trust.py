"""Weight files and folders of strangers: nothing in them is run, and nothing is allocated that the files do not hold."""

import pickle
import shutil
import zipfile

import pytest
import torch

import tiny
import tiny_towers
from common import UserError
from models.encoders import load_encoder
from models.encoders.torchscript import read_torchscript

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def save_archive(path, seed=0):
    """Write OpenAI's archive of a tiny CLIP, with the buffers theirs has. Returns the model."""
    from clip.model import CLIP

    torch.manual_seed(seed)
    model = CLIP(512, 64, 1, 64, 32, 77, 64, 64, 1, 1).eval()
    for name, number in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 64)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(number))
    inputs = torch.randn(1, 3, 64, 64), torch.randint(0, 64, (1, 77))
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path)
    return model


def refused(name, words, load=load_encoder):
    """The one line that a name is refused with."""
    with pytest.raises(UserError, match=words) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(source, target, change):
    """Copy a zip; change(name, bytes) gives each member's bytes and how it is compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data, how = change(member.filename, old.read(member))
            new.writestr(member.filename, data, how)


def test_an_archive_is_read_as_torch_reads_it_without_running_it(workdir, monkeypatch):
    save_archive("archive.pt")
    expected = torch.jit.load("archive.pt").state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    found = read_torchscript("archive.pt")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert load_encoder("archive.pt").width == 512


def test_half_precision_archives_are_read(workdir):
    model = torch.jit.trace(torch.nn.Linear(3, 2).half(), torch.ones(1, 3).half())
    torch.jit.save(model, "half.pt")
    found = read_torchscript("half.pt")
    assert torch.equal(found["weight"], model.weight)
    assert found["bias"].dtype == torch.float16


class Payload:
    def __reduce__(self):
        return open, ("was_run", "w")


def test_an_archive_that_asks_for_code_is_refused(workdir):
    save_archive("archive.pt")
    for data, words in (
        (pickle.dumps(Payload(), 2), "asks for io.open|asks for __builtin__"),
        (b"\x80\x02]\x8e\xff\xff\xff\xff\xff\xff\xff\x00.", "does not hold CLIP weights"),  # BINBYTES8
        (b"\x80\x02X\xff\xff\xff\x7fab.", "does not hold CLIP weights"),
        (b"", "does not hold CLIP weights"),
    ):
        rewrite("archive.pt", "bad.pt", lambda name, old: (data if name.endswith("/data.pkl") else old, zipfile.ZIP_STORED))
        refused("bad.pt", words)
    assert not (workdir / "was_run").exists()


def test_compressed_and_overlapping_members_are_refused(workdir):
    save_archive("archive.pt")
    tiny.save_clip("plain.pt", 512, "vit")
    tiny_towers.add_open_clip_config(".")
    tiny_towers.save_open_clip("oc.pt")
    tiny_towers.save_timm("timm")
    from safetensors.torch import load_file

    shutil.rmtree("data", ignore_errors=True)
    (workdir / "data" / "weights").mkdir(parents=True)
    torch.save(load_file("timm/model.safetensors"), "timm.pt")
    for source, target, name in (
        ("archive.pt", "a.pt", "a.pt"),
        ("plain.pt", "b.pt", "b.pt"),
        ("oc.pt", "c.pt", f"open_clip:{tiny_towers.OPEN_CLIP}/c.pt"),
        ("timm.pt", f"data/weights/{tiny_towers.TIMM_VIT}.pt", f"timm:{tiny_towers.TIMM_VIT}"),
    ):
        rewrite(source, target, lambda name, data: (data, zipfile.ZIP_DEFLATED))
        refused(name, "holds compressed data")


def test_a_tensor_that_promises_more_than_its_bytes_is_refused(workdir):
    state = torch.load(tiny.save_clip("plain.pt", 512, "vit"), weights_only=True)
    for name in ("visual.conv1.weight", "positional_embedding", "text_projection"):
        shape = [100_000, *state[name].shape[1:]]
        torch.save({**state, name: torch.zeros(1).expand(shape)}, "lying.pt")
        refused("lying.pt", f"promises more data than it holds .{name}")
    wide = {**state, "visual.conv1.weight": torch.zeros(200_000, 3, 1, 1), "visual.positional_embedding": torch.zeros(5, 64)}
    torch.save(wide, "wide.pt")  # a few megabytes, whose transformer would have 10^11 numbers
    refused("wide.pt", "does not hold CLIP weights")
    save_archive("archive.pt")

    def lie(name, data):
        return (data[:64] if name.endswith("data/0") else data), zipfile.ZIP_STORED

    rewrite("archive.pt", "short.pt", lie)
    refused("short.pt", "a tensor of size")
