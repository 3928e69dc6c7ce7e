"""Scripts under a launcher: the same results as one process, and no process outlives another's death."""

import json
import os
import signal
import tarfile
import time
from pathlib import Path

import pytest
import torch
from waiting import wait_until

import evaluate
import miniatures
import parse_clotho
import parse_conceptual
import parse_folder
import parse_huggingface
import predict
import tiny
from features.processes import ALONE, current
from features.store import load_features
from helpers import captioner
from launched import finish, launch, start
from models.checkpoints import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES = 41
PARSE = ["photos", "--val_share", 0, "--batch_size", 2, "--num_workers", 0]


@pytest.fixture
def photos(workdir):
    """photos/ with pictures, one of them damaged, and their captions; small weights for ViT-B/32."""
    rows = ["file_name,caption"]
    for number in range(PICTURES):
        tiny.save_picture(f"photos/{number}.jpg", number)
        rows.append(f"{number}.jpg,Picture {number}.")
    Path("photos/30.jpg").write_bytes(b"no picture")
    Path("photos/metadata.csv").write_text("\n".join(rows))
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    return workdir


def run(main, *words):
    assert main([str(word) for word in words]) == 0


def content(name):
    """The bytes of a feature file and of its list of skipped pictures."""
    return Path(name).read_bytes(), Path(f"{name}.skipped.csv").read_bytes()


def wait_for_pieces(name, processes):
    """Wait until running processes have saved four pieces of a feature file."""

    def enough():
        assert all(process.poll() is None for process in processes), finish(processes)
        return len(list(Path(f"{name}.pieces").glob("*.npz"))) >= 4

    wait_until(enough)


def test_one_process_shares_with_nobody():
    assert current() is ALONE
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    value = [(1, 2)]
    assert ALONE.gather(value)[0] is value
    assert ALONE.first_does(lambda number: number + 1, 1) == 2


@pytest.mark.slow
def test_two_processes_parse_as_one(photos):
    run(parse_folder.main, *PARSE, "--out", "one.pkl")
    printed = launch(2, "parse_folder.py", *PARSE, "--out", "two.pkl")
    assert content("two.pkl") == content("one.pkl")
    assert f"{PICTURES - 1} images" in printed
    assert sorted(path.name for path in photos.glob("[.ot]*")) == ["one.pkl", "one.pkl.skipped.csv", "two.pkl", "two.pkl.skipped.csv"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_others_and_any_number_resumes(photos, victim):
    """The survivor ends in one line that names the dead process; three processes and then one finish what two began."""
    words = ["photos", "--val_share", 0, "--batch_size", 1, "--num_workers", 0, "--save_seconds", 0]
    run(parse_folder.main, *words, "--out", "single.pkl")
    for count in (3, 1):
        processes = start(2, "parse_folder.py", [*words, "--out", "killed.pkl"])
        wait_for_pieces("killed.pkl", processes)
        os.kill(processes[victim].pid, signal.SIGKILL)
        killed = time.monotonic()
        codes, _, errors = finish(processes)
        assert time.monotonic() - killed < 60
        assert codes[1 - victim] == 2, errors
        (line,) = [line for line in errors[1 - victim] if "resuming" not in line]
        assert line.startswith(f"parse_folder.py: error: process {victim} of 2 (process {processes[victim].pid} on ")
        assert "has died. Run the same command again" in line
        assert not [path for path in photos.glob("**/.*") if f"-{processes[1 - victim].pid}." in path.name]
        if count == 1:
            run(parse_folder.main, *words, "--out", "killed.pkl")
        else:
            launch(count, "parse_folder.py", *words, "--out", "killed.pkl")
        assert content("killed.pkl") == content("single.pkl")
        assert not [*photos.glob(".*"), *photos.glob("*.pieces")]
        Path("killed.pkl").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_falls_silent_stops_the_others_within_a_minute(photos, victim):
    """Frozen, as one on a machine that has lost its network: it cannot be seen to be dead, and the first takes the store with it."""
    words = ["photos", "--val_share", 0, "--batch_size", 1, "--num_workers", 0, "--save_seconds", 0, "--out", "o.pkl"]
    processes = start(2, "parse_folder.py", words)
    wait_for_pieces("o.pkl", processes)
    processes[victim].send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    codes, _, errors = finish(processes[1 - victim : 2 - victim])
    assert time.monotonic() - frozen < 90  # the silence allowed is 35 s
    processes[victim].kill()
    finish(processes[victim : victim + 1])
    assert codes == [2]
    assert f"process {victim} of 2 (process {processes[victim].pid} on " in errors[0][-1]
    assert len(errors[0]) == 1


@pytest.mark.slow
def test_interrupted_processes_keep_their_pieces_and_say_nothing_of_deaths(photos):
    words = ["photos", "--val_share", 0, "--batch_size", 1, "--num_workers", 0, "--out", "o.pkl"]
    processes = start(2, "parse_folder.py", [*words, "--save_seconds", 0])
    wait_for_pieces("o.pkl", processes)
    for process in processes:
        process.send_signal(signal.SIGINT)
    codes, _, errors = finish(processes)
    assert codes == [130, 130], errors
    assert errors[1] == []
    assert not any("died" in line for line in errors[0])
    assert launch(3, "parse_folder.py", *words)


@pytest.mark.slow
def test_a_mistake_is_printed_once(photos):
    codes, printed, errors = finish(start(2, "parse_folder.py", ["nowhere", "--out", "o.pkl"]))
    assert codes == [2, 2]
    assert printed == ["", ""]
    assert len(errors[0]) == 1
    assert errors[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_split_train_and_validation_as_one(photos, count):
    words = ["photos", "--val_share", 0.2, "--batch_size", 3]
    run(parse_folder.main, *words, "--out", "one.pkl")
    launch(count, "parse_folder.py", *words, "--out", "many.pkl")
    assert Path("many.pkl").read_bytes() == Path("one.pkl").read_bytes()
    assert Path("many_val.pkl").read_bytes() == Path("one_val.pkl").read_bytes()
    assert not list(photos.glob("*.pieces"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--streaming"]])
def test_processes_parse_a_streamed_set_and_a_directory_as_one(photos, more):
    Path("table.csv").write_text("image,caption\n" + "".join(f"photos/{n}.jpg,Picture {n}.\n" for n in range(PICTURES)))
    words = ["table.csv", "--batch_size", 2, *more]
    run(parse_huggingface.main, *words, "--out", "one")
    launch(3, "parse_huggingface.py", *words, "--out", "many")
    one, many = load_features("one"), load_features("many")
    assert torch.equal(one.clip_embedding[:], many.clip_embedding[:])
    assert one.texts[:] == many.texts[:]
    assert sorted(path.name for path in photos.iterdir() if path.name.startswith(("many", "."))) == ["many", "many.skipped.csv"]


@pytest.mark.slow
def test_processes_parse_sounds_as_one(workdir):
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    miniatures.save_clotho(workdir, (("development", 7),))
    run(parse_clotho.main, "--batch_size", 2, "--out", "one.pkl")
    launch(2, "parse_clotho.py", "--batch_size", 2, "--out", "two.pkl")
    assert Path("two.pkl").read_bytes() == Path("one.pkl").read_bytes()


@pytest.mark.slow
def test_processes_parse_piped_shards_as_one(photos):
    """Three shards, of which one cannot be fetched; the copies of piped ones are removed at the end."""
    for shard in range(2):
        with tarfile.open(f"{shard}.tar", "w") as tar:
            for number in range(20 * shard, 20 * shard + 20):
                Path("caption.txt").write_text(f"Picture {number}.")
                tar.add(f"photos/{number}.jpg", f"{number}.jpg")
                tar.add("caption.txt", f"{number}.txt")
    words = ["--shards", "pipe:cat 0.tar", "pipe:false", "1.tar", "--batch_size", 3]
    run(parse_conceptual.main, *words, "--out", "one.pkl")
    launch(2, "parse_conceptual.py", *words, "--out", "two.pkl")
    assert content("two.pkl") == content("one.pkl")
    assert not list(photos.glob("*.shards"))


# -- Captions and scores -----------------------------------------------------------------------------------------------------


@pytest.fixture
def captions(photos, tiny_gpt2):
    """Beside photos/: a captioner of random weights in captioner.pt, and the pictures' features in val.pkl."""
    save_checkpoint(captioner(tiny_gpt2, clip_width=512), "captioner.pt")
    run(parse_folder.main, *PARSE, "--out", "val.pkl")
    return photos


PREDICT = ["--checkpoint", "captioner.pt", "--batch_size", 4, "--entry_length", 8, "--beam_size", 2, "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "more"), [(2, ["photos"]), (3, ["--data", "val.pkl"]), (2, ["--data", "val.pkl", "--rerank", "consensus"])]
)
def test_processes_caption_as_one(captions, capsys, count, more):
    """Pictures from a folder, one of them damaged, and a feature file: the same words, scores and order; only the first writes."""
    capsys.readouterr()
    run(predict.main, *more, *PREDICT, "--out", "one.jsonl")
    alone = capsys.readouterr().out
    printed = launch(count, "predict.py", *more, *PREDICT, "--out", "many.jsonl")
    assert Path("many.jsonl").read_bytes() == Path("one.jsonl").read_bytes()
    assert printed == alone.replace("one.jsonl", "many.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_evaluate_as_one(captions, count):
    words = ["--data", "val.pkl", *PREDICT, "--metrics", "bleu", "rouge", "cider", "--bootstrap", 20]
    run(evaluate.main, *words, "--out", "one.json")
    launch(count, "evaluate.py", *words, "--out", "many.json")
    assert Path("many.predictions.json").read_bytes() == Path("one.predictions.json").read_bytes()
    one, many = (json.loads(Path(name).read_text()) for name in ("one.json", "many.json"))
    assert many["scores"] == one["scores"]
    assert many["intervals"] == one["intervals"]
