"""What holds for every parse script: one writer, whole pieces, ids, odd names and texts, terminals of any encoding."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from waiting import PATIENCE

import parse_folder
import parse_huggingface
import predict
import tiny
import train
from common import UserError, claim_output
from features.content import EmbeddingKind, check_compatible
from features.extract import Record, extract
from features.packing import tokenize_captions
from features.pieces import Pieces
from features.records import merge_records
from features.shards import fetch_shard, index_shard
from features.store import load_features
from helpers import error_line
from models.encoders import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photos(workdir):
    """photos/ with ten pictures and their captions; small weights for ViT-B/32."""
    rows = ["file_name,caption"]
    for number in range(10):
        tiny.save_picture(f"photos/{number}.jpg", number)
        rows.append(f"{number}.jpg,Picture {number}.")
    Path("photos/metadata.csv").write_text("\n".join(rows))
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    return workdir


# -- One writer --------------------------------------------------------------------------------------------------------------


def test_a_second_run_with_the_same_out_ends_in_one_line(photos, capsys):
    with claim_output("one.pkl"):
        line = error_line(parse_folder.main, capsys, ["photos", "--val_share", "0", "--out", "one.pkl"])
    assert "one.pkl is being written by" in line
    assert not Path("one.pkl").exists()
    assert parse_folder.main(["photos", "--val_share", "0", "--out", "one.pkl"]) == 0


@pytest.mark.slow
def test_runs_at_once_give_one_whole_file(photos, root):
    """Two equal commands: each writes the whole file or ends in one line that names the writer."""
    Path("photos/metadata.csv").write_text("file_name,caption\n" + "".join(f"{n % 10}.jpg,Picture {n}.\n" for n in range(10)))
    command = [sys.executable, str(root / "parse_folder.py"), "photos", "--val_share", "0", "--out", "o.pkl", "--batch_size", "1"]
    several = [subprocess.Popen([*command, "--save_seconds", "0"], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in several:
        err = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0 or "is being written by process" in err, err
    assert [caption["caption"] for caption in load_features("o.pkl").captions] == [f"Picture {n}." for n in range(10)]


def test_pieces_that_are_not_complete_are_not_joined(workdir):
    import numpy as np

    pieces = Pieces(workdir / "p", "run")
    for number in range(3):
        pieces.add(number, [number], np.zeros((1, 2), np.float32), [], 0)
    pieces.write()
    (workdir / "p" / "000000001-000000002.npz").unlink()
    with pytest.raises(UserError, match="was changed while this ran"):
        pieces.gather(3)


def test_a_folder_of_pieces_keeps_what_is_not_ours(photos, capsys):
    Path("o.pkl.pieces").mkdir()
    Path("o.pkl.pieces/thesis.txt").write_text("mine")
    assert parse_folder.main(["photos", "--val_share", "0", "--out", "o.pkl"]) == 0
    assert Path("o.pkl.pieces/thesis.txt").read_text() == "mine"


# -- Content and identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_picture_that_changed_since_is_encoded_again_also_when_a_table_names_it(streaming, photos, monkeypatch):
    Path("table.csv").write_text("image,caption\n" + "".join(f"photos/{number}.jpg,Picture {number}.\n" for number in range(10)))
    command = ["table.csv", "--out", "o.pkl", "--batch_size", "2", "--save_seconds", "0", "--num_workers", "0", *streaming]
    encoder, left = load_encoder("ViT-B/32"), [3]
    encode = encoder.encode

    def interrupted(batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(batch)

    encoder.encode = interrupted
    with monkeypatch.context() as patch:
        patch.setattr(parse_huggingface, "load_encoder", lambda *_: encoder)
        with pytest.raises(SystemExit):
            parse_huggingface.main(command)
    assert list(Path("o.pkl.pieces").glob("*.npz"))
    tiny.save_picture("photos/0.jpg", 77)
    os.utime("photos/0.jpg", ns=(time.time_ns(), time.time_ns() + 10**9))
    assert parse_huggingface.main(command) == 0
    embeddings = load_features("o.pkl").clip_embedding
    assert parse_huggingface.main([*command[:2], "fresh.pkl", *command[3:]]) == 0
    assert torch.equal(embeddings, load_features("fresh.pkl").clip_embedding)


def test_ids_of_a_folder_and_of_predictions_for_it_are_the_same(photos, tiny_gpt2):
    for name in ("a/1.jpg", "b/1.jpg", "cat.jpg", "cat.png", "COCO_val2014_000000000042.jpg"):
        tiny.save_picture(f"photos/{name}", len(name))
        Path(f"photos/{name}").with_suffix(".txt").write_text("A picture.")
    assert parse_folder.main(["photos", "--val_share", "0", "--out", "o.pkl"]) == 0
    ids = {caption["image_id"] for caption in load_features("o.pkl").captions}
    assert {"a/1.jpg", "b/1.jpg", "cat.jpg", "cat.png", 42} <= ids
    words = f"--data o.pkl --out_dir out --gpt2_type {tiny_gpt2} --device cpu --max_steps 1 --bs 4 --prefix_length 2 --warmup_steps 1"
    assert train.main(words.split()) == 0
    assert predict.main(["-C", "out/coco_prefix-000.pt", "photos", "--out", "r.json", "--device", "cpu", "--entry_length", "2"]) == 0
    assert {row["image_id"] for row in json.loads(Path("r.json").read_text())} == ids


@pytest.mark.parametrize("encoding", ["ascii"])
def test_names_that_are_not_utf8_and_terminals_of_any_encoding_lose_nothing(encoding, photos, root):
    name = os.fsdecode(b"caf\xe9.jpg")
    tiny.save_picture(f"photos/{name}", 11)
    Path(f"photos/{os.fsdecode(b'caf' + bytes([0xE9]))}.txt").write_text("Un café → \U0001f415", "utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, str(root / "parse_folder.py"), "photos", "--out", "o.pkl"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    captions = load_features("o.pkl").captions + load_features("o_val.pkl").captions
    assert {"caf\\xe9.jpg": "Un café → \U0001f415"}.items() <= {caption["image_id"]: caption["caption"] for caption in captions}.items()


def test_half_a_surrogate_pair_in_a_caption_is_replaced_and_counted(photos):
    Path("photos/metadata.csv").unlink()
    Path("photos/metadata.jsonl").write_text('{"file_name": "0.jpg", "caption": "half \\ud83d"}\n{"file_name": "1.jpg", "caption": "b"}')
    assert parse_folder.main(["photos", "--val_share", "0", "--out", "o.pkl"]) == 0
    features = load_features("o.pkl")
    assert [caption["caption"] for caption in features.captions] == ["half \ufffd", "b"]
    assert features.meta["captions_with_broken_characters"] == 1
    assert merge_records([Record(1, b"", [{"caption": "\ud83d\udc36"}])]).replaced == 1


def test_a_control_token_in_a_caption_is_text():
    tokenizer = tiny.train_tokenizer()
    tokens = tokenize_captions(["a <|endoftext|> b"], tokenizer, tokenizer.eos_token_id)
    assert list(tokens[0]).count(tokenizer.eos_token_id) == 1, "only the end"
    assert tokenizer.decode(tokens[0][:-1]) == "a <|endoftext|> b"


def test_circles_of_links_are_one_line(photos, capsys):
    for name in ("loop", "loop.parquet"):
        os.symlink(name, name)
    assert "loop" in error_line(parse_folder.main, capsys, ["loop"])
    for name in ("loop", "loop.parquet"):
        error_line(parse_huggingface.main, capsys, [name, "--out", "o.pkl"])
    assert "loop" in error_line(parse_folder.main, capsys, ["photos", "--out", "loop"])


# -- Shards and data sets ----------------------------------------------------------------------------------------------------


def write_tar(path, members):
    """Write a tar with these {name: bytes}."""
    import io
    import tarfile

    with tarfile.open(path, "w:gz" if path.endswith("gz") else "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_captions_of_a_shard_are_found_in_every_usual_place(workdir):
    members = {
        "a.b.jpg": b"1", "a.b.txt": "Café".encode("latin-1"),
        "c.jpg": b"2", "c.txt": b"", "c.json": b'{"caption": "from JSON"}',
        "d.jpg": b"3", "d.json": b'{"caption": ["one", "two"]}',
        "e.jpg": b"4", "e.json": b'{"text": "a text"}',
        "f.jpg": b"5", "f.json": b"[" * 50_000,
        "g.JPG": b"6", "g.caption": b"upper",
    }  # fmt: skip
    samples, fault = index_shard(write_tar("s.tar", members))
    assert fault is None
    found = {key: captions for key, captions, _ in samples}
    assert found == {"a.b": ["Café"], "c": ["from JSON"], "d": ["one", "two"], "e": ["a text"], "f": [], "g": ["upper"]}
    assert [picture.read() for _, _, picture in samples] == [b"1", b"2", b"3", b"4", b"5", b"6"]


def test_a_packed_shard_is_unpacked_once(workdir):
    write_tar("s.tar.gz", {"a.jpg": b"1", "a.txt": b"x"})
    copy = fetch_shard("s.tar.gz", "copies")
    assert index_shard(copy)[0][0][:2] == ("a", ["x"])
    assert fetch_shard("s.tar.gz", "copies") == copy


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_split_that_is_a_column_is_chosen_by_its_name(streaming, photos, capsys):
    rows = "".join(f"photos/{n}.jpg,Picture {n}.,{'test' if n < 3 else 'train'},{'en' if n % 2 else 'de'}\n" for n in range(10))
    Path("t.csv").write_text("image,caption,split,language\n" + rows)
    for words, expected in ((["--split", "test"], [0, 1, 2]), (["--where", "language=en"], [1, 3, 5, 7, 9]), ([], list(range(3, 10)))):
        assert parse_huggingface.main(["t.csv", "--out", "o.pkl", *words, *streaming]) == 0
        assert [caption["caption"] for caption in load_features("o.pkl").captions] == [f"Picture {n}." for n in expected]
    if not streaming:
        assert "no row with split val; there are test, train" in error_line(parse_huggingface.main, capsys, ["t.csv", "--split", "val"])
        assert "has no column x" in error_line(parse_huggingface.main, capsys, ["t.csv", "--where", "x=1"])
        assert "expected COLUMN=VALUE" in error_line(parse_huggingface.main, capsys, ["t.csv", "--where", "x"])


# -- What goes together ------------------------------------------------------------------------------------------------------


CLIP = EmbeddingKind("ViT-B/32", 512)
SOUND = {"spectrogram": "mel", "sample_rate": 44100}
OTHER_SOUND = {**SOUND, "spectrogram": "published"}


@pytest.mark.parametrize("found, expected, message", [
    (CLIP, CLIP, None),
    (EmbeddingKind("data/weights/ViT-B-32.pt", 512), CLIP, None),
    (EmbeddingKind(None, 512), CLIP, None),
    (EmbeddingKind("RN50x4", 640), CLIP, "640-wide embeddings .RN50x4.; b needs 512-wide ones .ViT-B/32.. Parse again with --clip"),
    (EmbeddingKind("ViT-B/16", 512), CLIP, "embeddings of ViT-B/16; b needs those of ViT-B/32"),
    (EmbeddingKind("ViT-B/32", 512, several=True), CLIP, "several embeddings per image .--pooling none.; b needs one"),
    (EmbeddingKind("ViT-B/32", 512, normalized=True), CLIP, "normalised embeddings; b needs unnormalised"),
    (EmbeddingKind("ViT-B/32", 512, normalized=True), EmbeddingKind("ViT-B/32", 512, normalized=None), None),
    (EmbeddingKind("ViT-B/32", 512, audio=SOUND), CLIP, "embeddings of sounds; b needs embeddings of pictures"),
    (EmbeddingKind("ViT-B/32", 512, audio=SOUND), EmbeddingKind("ViT-B/32", 512, audio=OTHER_SOUND), "spectrogram"),
])  # fmt: skip
def test_embeddings_that_do_not_go_together_are_refused_and_named(found, expected, message):
    if message is None:
        return check_compatible(found, expected, "a", "b")
    with pytest.raises(UserError, match=f"a holds .*{message}"):
        check_compatible(found, expected, "a", "b")


def test_validation_data_of_another_kind_is_refused_before_training(photos, tiny_gpt2, capsys):
    assert parse_folder.main(["photos", "--out", "o.pkl"]) == 0
    with open("o_val.pkl", "rb") as file:
        content = pickle.load(file)
    for change, said in (
        ({"encoder": "ViT-B/16"}, "o_val.pkl holds embeddings of ViT-B/16; o.pkl needs those of ViT-B/32"),
        ({"normalized": True}, "o_val.pkl holds normalised embeddings"),
        ({"audio": SOUND}, "o_val.pkl holds embeddings of sounds"),
    ):
        with open("o_val.pkl", "wb") as file:
            pickle.dump({**content, "meta": content["meta"] | change}, file)
        words = f"--data o.pkl --val_data o_val.pkl --out_dir out --gpt2_type {tiny_gpt2} --device cpu".split()
        assert said in error_line(train.main, capsys, words)
    with open("o_val.pkl", "wb") as file:
        pickle.dump({**content, "clip_embedding": content["clip_embedding"][:, None].repeat(1, 3, 1)}, file)
    assert "o_val.pkl holds several embeddings per image" in error_line(train.main, capsys, words)


def test_the_next_command_is_training_only_after_training_data(photos, capsys):
    data = [Record(number, f"photos/{number}.jpg", [{"caption": "x"}]) for number in range(2)]
    extract(data, load_encoder("ViT-B/32"), "o.pkl", source="here")
    for command, expected in ((["--split", "test"], "evaluate.py --data"), ([], "train.py --data")):
        Path("t.csv").write_text("image,caption\nphotos/0.jpg,a\n")
        assert parse_huggingface.main(["t.csv", "--out", "o.pkl", *command]) == 0
        assert f"next: python {expected} o.pkl" in capsys.readouterr().out
