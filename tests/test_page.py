"""The page: what it answers to programs, how callers share one model, and what it says to mistakes."""

import concurrent.futures
import dataclasses
import json
import re
import socket
import zlib
from types import SimpleNamespace

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import app
import paging
import predict
from common import UserError
from helpers import call, error_line
from page import worker as worker_module
from page.captioners import Outcome, Source, caption_embeddings, load_captioners, name_checkpoints
from page.results import show_outcomes
from page.settings import RERANKINGS, Settings, check_settings
from page.words import explain_words, join_pieces
from page.worker import Worker
from prediction.inputs import encode_pictures
from prediction.reranking import caption_and_rerank

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = ("beam", 5, 1, 1.0, 1.0, "", "none")


@pytest.fixture(scope="module")
def world(page_world):
    return page_world


@pytest.fixture(scope="module")
def url(world):
    with paging.serving(world / "first.pt", world / "second.pt", world / "sounds.pt") as url:
        yield url


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    return Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture(scope="module")
def captioners(world):
    return load_captioners([Source(str(world / "first.pt"))], torch.device("cpu"))


@pytest.fixture(scope="module")
def expected(world):
    """What predict.py says about each picture: file name -> caption, of first.pt."""
    call(predict.main, ["--checkpoint", world / "first.pt", world / "pictures", "--out", world / "said.jsonl"])
    rows = map(json.loads, (world / "said.jsonl").read_text().splitlines())
    return {row["file"].rpartition("/")[2]: row["caption"] for row in rows}


def ask(client, path, **controls):
    return client.predict(file=handle_file(str(path)), api_name="/caption", **controls)


def test_the_world_has_a_caption_of_its_own_for_each_picture(expected):
    assert len(expected) == paging.PICTURES == len(set(expected.values()))


def test_a_program_gets_what_predict_says_from_each_captioner_of_pictures(client, world, expected):
    first, second = ask(client, world / "pictures/7.jpg")
    assert (first["checkpoint"], second["checkpoint"]) == ("first", "second")
    assert first["captions"][0]["caption"] == expected["7.jpg"] != second["captions"][0]["caption"]
    assert first["captions"][0]["score"] < 0


def test_a_sound_goes_to_the_captioner_of_sounds(client, world, capsys):
    (found,) = ask(client, world / "rain.wav")
    call(predict.main, ["--checkpoint", world / "sounds.pt", world / "rain.wav"])
    assert found["checkpoint"] == "sounds"
    assert found["captions"][0]["caption"].split() == capsys.readouterr().out.split("rain.wav\n", 1)[1].split()


def test_the_controls_do_what_predict_s_options_do(client, world, capsys):
    picture = world / "pictures/3.jpg"
    for controls, options in (
        ({"decoding": "greedy"}, ["--decoding", "greedy"]),
        ({"decoding": "sample", "num_captions": 2, "top_p": 0.9}, ["--decoding", "sample", "--num_captions", 2, "--top_p", 0.9]),
        ({"rerank": "consensus", "beam_size": 4, "prompt": "t7 t8"}, ["--rerank", "consensus", "--beam_size", 4, "--text_prompt", "t7 t8"]),
    ):
        found = [one["caption"] for one in ask(client, picture, **controls)[0]["captions"]]
        call(predict.main, ["--checkpoint", world / "first.pt", picture, "--out", world / "one.jsonl", *options])
        rows = [json.loads(line) for line in (world / "one.jsonl").read_text().splitlines()]
        assert found == [row["caption"] for row in rows], controls


def test_callers_at_once_each_get_the_caption_of_their_own_picture(client, world, expected):
    names = sorted(expected)[:12]
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(lambda name: ask(client, world / "pictures" / name), names))
    assert [one[0]["captions"][0]["caption"] for one in found] == [expected[name] for name in names]


@pytest.mark.slow
def test_fifty_callers_at_once_are_all_answered_and_none_wrong(url, world, expected):
    names = sorted(expected)
    clients = [Client(url, verbose=False) for _ in names]
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(lambda pair: ask(pair[0], world / "pictures" / pair[1]), zip(clients, names)))
    assert [one[0]["captions"][0]["caption"] for one in found] == [expected[name] for name in names]


def test_the_worker_takes_together_what_waits_and_separates_settings(captioners, world, monkeypatch):
    batches = []
    encode = worker_module.encode_pictures

    def watched(paths, *others, **named):
        batches.append(len(paths))
        return encode(paths, *others, **named)

    monkeypatch.setattr(worker_module, "encode_pictures", watched)
    broken = world / "broken.jpg"
    broken.write_bytes(b"no picture")
    worker = Worker(captioners)
    pictures = [world / f"pictures/{number}.jpg" for number in range(8)]
    asked = [worker.submit(path, False, Settings(decoding=decoding)) for path in pictures for decoding in ("beam", "greedy")]
    failing = worker.submit(broken, False, Settings())
    worker.close()
    assert sum(batches) <= 1 + len(pictures) + 1 and len(batches) <= 2  # the first may have started alone
    alone = Worker(captioners)
    for future, (path, decoding) in zip(asked, ((path, decoding) for path in pictures for decoding in ("beam", "greedy"))):
        assert future.result()[0].captions[0][0] == alone.submit(path, False, Settings(decoding=decoding)).result()[0].captions[0][0]
    with pytest.raises(UserError, match="cannot be captioned: not a picture"):
        failing.result()
    alone.close()


def test_a_failure_of_the_server_reaches_its_callers_and_the_next_ones_are_served(captioners, world, monkeypatch, capsys):
    worker = Worker(captioners)
    with monkeypatch.context() as broken:
        broken.setattr(worker_module, "describe", lambda *_: 1 / 0)
        with pytest.raises(UserError, match="its log says why"):
            worker.submit(world / "pictures/1.jpg", False, Settings()).result()
    assert worker.submit(world / "pictures/1.jpg", False, Settings()).result()[0].captions
    assert capsys.readouterr().err == "app.py: captioning failed: ZeroDivisionError: division by zero\n"
    with pytest.raises(UserError, match="this page captions pictures"):
        worker.submit(world / "rain.wav", True, Settings()).result()
    worker.close()


def test_mistakes_of_a_program_are_messages(client, world, capfd):
    (world / "text.jpg").write_text("no picture")
    (world / "text.wav").write_text("no sound")
    for path, controls, message in (
        (world / "text.jpg", {}, "not a picture"),
        (world / "text.wav", {}, "cannot be captioned"),
        (world / "pictures/1.jpg", {"decoding": "dream"}, "expected one of beam, greedy, sample"),
        (world / "pictures/1.jpg", {"beam_size": 10**9}, "beam_size is 1000000000; expected a whole number from 1 to 20"),
        (world / "pictures/1.jpg", {"temperature": "hot"}, "temperature is 'hot'"),
        (world / "pictures/1.jpg", {"prompt": "a" * 300}, "300 characters"),
        (world / "pictures/1.jpg", {"rerank": "clip"}, "no text tower"),
    ):
        with pytest.raises(AppError, match=re.escape(message)):
            ask(client, path, **controls)
    with pytest.raises(AppError, match="no file was given"):
        client.predict(file=None, api_name="/caption")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("wrong", [
    (None, 5, 1, 1.0, 1.0, "", "none"), ("beam", 2.5, 1, 1.0, 1.0, "", "none"), ("beam", True, 1, 1.0, 1.0, "", "none"),
    ("beam", 5, 0, 1.0, 1.0, "", "none"), ("beam", 5, 1, float("nan"), 1.0, "", "none"), ("beam", 5, 1, 1.0, 0, "", "none"),
    ("beam", 5, 1, 1.0, 1.0, ["x"], "none"), ("beam", 5, 1, 1.0, 1.0, "\ud800", "none"), ("beam", 5, 1, 1.0, 1.0, "", {}),
])  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError):
        check_settings(*wrong)


def test_settings_that_mean_the_same_are_equal():
    assert check_settings(*PLAIN) == check_settings("beam", 5.0, 1, 1, 0.3, "  ", None) == Settings()
    assert check_settings("greedy", 20, 10, 1.0, 0.5, "a", "consensus") == Settings("greedy", 1, 1, 1.0, 1.0, "a")
    assert check_settings("beam", 3, 7, 1.0, 1.0, "", "consensus").beam_size == 7


@pytest.mark.parametrize("caption, pieces, words", [
    ("a dog", ["a", "dog"], [("a", [0]), ("dog", [1])]),
    ("surf boards.", ["sur", "f", "board", "s", "."], [("surf", [0, 1]), ("boards.", [2, 3, 4])]),
    (" é x", ["\ufffd", "\ufffd", "x"], [("é", [0, 1]), ("x", [2])]),
    ("x", ["", "x", "\ufffd"], [("x", [0, 1, 2])]),
])  # fmt: skip
def test_pieces_are_joined_into_words(caption, pieces, words):
    assert join_pieces(pieces, caption) == words


def test_words_share_out_their_attention(captioners):
    model = captioners[0].model
    words = explain_words(model, torch.ones(1, paging.WIDTH), "t2 t9 t4")
    assert [word.text for word in words] == ["t2", "t9", "t4"]
    for word in words:
        assert [number for number, *_ in sorted(word.attended)] == [1, 2, 3, 4]
        assert sum(share for _, share, _ in word.attended) == pytest.approx(1, abs=1e-4)
    assert explain_words(model, torch.ones(1, paging.WIDTH), " ") == []
    assert explain_words(model, torch.ones(1, paging.WIDTH), "word " * 200) == []  # more tokens than the language model reads


def test_what_a_model_says_enters_the_page_as_text():
    shown = show_outcomes([Outcome("<b>", [("<script>", -1.0)], []), Outcome("x", [], [], "<i>")])
    assert "<script>" not in shown and "<b>" not in shown and "<i>" not in shown


def test_checkpoints_are_named_as_shortly_as_tells_them_apart():
    assert name_checkpoints(["a/x-001.pt", "a/x-002.pt"]) == ["x-001", "x-002"]
    assert name_checkpoints(["a/x.pt", "b/x.pt"]) == ["a/x", "b/x"]
    assert name_checkpoints(["x.pt", "x.pt"]) == ["x (1)", "x (2)"]


class RandomTower:
    """A text tower that gives every text a direction of its own."""

    modality, width = "image", paging.WIDTH

    def encode_text(self, texts):
        draws = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        return torch.nn.functional.normalize(torch.stack([torch.randn(self.width, generator=draw) for draw in draws]), dim=-1)

    def project(self, clip_embedding):
        return torch.nn.functional.normalize(clip_embedding, dim=-1)


@pytest.mark.parametrize("chosen_by", RERANKINGS[1:])
def test_each_way_of_choosing_gives_what_predict_gives(captioners, world, monkeypatch, chosen_by):
    monkeypatch.setattr("models.encoders.text.require_text_tower", lambda *_: RandomTower())
    able = dataclasses.replace(captioners[0], tower=RandomTower())
    embeddings, _ = encode_pictures([str(world / f"pictures/{number}.jpg") for number in range(3)], able.encoder, {}, 3)
    settings = check_settings("beam", 5, 2, 1.0, 1.0, "", chosen_by)
    options = SimpleNamespace(**vars(settings), device=torch.device("cpu"))
    for found, embedding in zip(caption_embeddings(able, embeddings, settings), embeddings):
        expected = caption_and_rerank(able.model, embedding[None], options, "any")[0]
        assert [text for text, _ in found] == [text for text, _ in expected] and len(found) == 2


def test_an_unfit_setting_fails_for_one_captioner_and_not_for_the_other(captioners, world):
    worker = Worker([captioners[0], load_captioners([Source(str(world / "second.pt"))], torch.device("cpu"))[0]])
    worker.captioners[0].tower, settings = None, check_settings("beam", 5, 1, 1.0, 1.0, "", "clip")
    assert all("no text tower" in outcome.error for outcome in worker.submit(world / "pictures/1.jpg", False, settings).result())
    worker.close()


def test_mistakes_on_the_command_line_are_one_line(workdir, capsys, monkeypatch):
    assert "Run `make demo`" in error_line(app.main, capsys, ["--host", "0.0.0.0"])
    assert "expected 1 to 65535" in error_line(app.main, capsys, ["--port", "0"])
    assert "expected a folder" in error_line(app.main, capsys, ["--examples", "no"])
    assert "no.pt" in error_line(app.main, capsys, ["--checkpoint", "no.pt"])
    assert "is a URL" in error_line(app.main, capsys, ["--checkpoint", "https://x/y.pt"])


def test_a_taken_port_is_one_line(world, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in error_line(app.main, capsys, ["-C", world / "first.pt", "--port", port])


def test_without_a_checkpoint_the_demos_are_taken(world, workdir):
    for place, sounds in (("demo", False), ("demo_audio", True)):
        paging.save_demo(world, workdir / "data" / place, sounds)
    sources, examples = app.find_sources(app.build_parser().parse_args([]))
    assert [source.checkpoint for source in sources] == ["data/demo/checkpoints/demo-002.pt", "data/demo_audio/checkpoints/demo-002.pt"]
    assert [path.name for path in examples] == ["a.jpg"]
    pictures, sounds = load_captioners(sources, torch.device("cpu"))
    assert not pictures.hears and sounds.hears and pictures.name == "demo/checkpoints/demo-002"
