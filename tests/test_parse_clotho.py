"""parse_clotho.py from the command line, in a tree laid out as the published one is; then train.py and predict.py on what it wrote."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from test_audio import published_step_by_step

import helpers
import parse_clotho
import predict
import tiny
import tiny_towers
import train
from features.annotation_tables import read_clotho
from features.audio import read_sound
from features.store import load_features
from models.encoders import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = (
    "python parse_clotho.py --clip_model_type ViT-B/32 "
    "--captions_path ./data/clotho_captions_development.csv --audio_path ./data/development"
)
OUT = Path("data/clotho/oscar_split_ViT-B_32_train.pkl")
COLUMNS = ["file_name", *(f"caption_{number}" for number in range(1, 6))]
CLIPS = {"rain&storm.wav": 0.4, "Kettle 01.wav": 2.5, "door.wav": 0.1, "Vögel.wav": 0.3}  # seconds
NAMED = ("rain&amp;storm.wav", " Kettle 01.wav ", "door.wav", "Vögel.wav")  # the same, as the captions name them


def save_sound(path, seconds=0.3, seed=0, rate=22050):
    samples = np.arange(round(seconds * rate))
    wave = np.random.default_rng(seed).uniform(-0.3, 0.3, len(samples)) * np.sin(samples * (0.02 + 0.01 * seed))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate)
    return path


def captions_of(name):
    return [f"{text} ({name})" for text in (*tiny.CAPTIONS[:3], "雨が降っている", "Rain on a roof 🌧️ “heavy”")]


def write_csv(path, rows, columns=COLUMNS, encoding="utf-8"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def tree(workdir):
    """data/ as the published recipe has it: four clips, one named in the CSV with an HTML escape, one with spaces around its name."""
    for seed, (name, seconds) in enumerate(CLIPS.items()):
        save_sound(f"data/development/{name}", seconds, seed)
    write_csv("data/clotho_captions_development.csv", [[name, *captions_of(name)] for name in NAMED])
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    return workdir


def run(*words):
    assert parse_clotho.main([*map(str, words), "--device", "cpu"]) == 0


def error_line(capsys, *words):
    return helpers.error_line(parse_clotho.main, capsys, [*words, "--device", "cpu"])


def test_the_published_command_line_then_train_then_predict(tree, tiny_gpt2, capsys):
    run(*shlex.split(COMMAND)[2:])
    said = capsys.readouterr().out
    assert f"next: python train.py --data {OUT} --out_dir ./clotho_train/" in said
    assert "4 sounds, 20 captions" in said
    features = load_features(OUT)
    assert features.clip_embedding.shape == (4, 512)
    assert features.clip_embedding.isfinite().all()
    assert [caption["image_id"] for caption in features.captions[::5]] == list(CLIPS)
    texts = [caption["caption"] for caption in features.captions]
    assert texts == [text for name in NAMED for text in captions_of(name)]
    assert features.meta["audio"] | {"windows": 0} == {
        "sample_rate": 44100, "spectrogram": "mel", "n_fft": 2560, "hop_length": 694, "n_mels": 128, "fmin": 20, "fmax": 22050,
        "decibels": 80, "windows": 0,
    }  # fmt: skip
    assert features.meta["audio"]["windows"] == {"columns": 128, "hop": 64}
    assert features.meta["split"] == "train"

    words = f"--data {OUT} --out_dir clotho_train --gpt2_type {tiny_gpt2} --device cpu --epochs 1 --bs 4 --warmup_steps 1 --lr 1e-3"
    assert train.main([*words.split(), "--prefix_length", "4"]) == 0
    checkpoint = "clotho_train/coco_prefix-000.pt"
    assert json.loads(Path("clotho_train/coco_prefix.json").read_text())["model"]["audio"] == features.meta["audio"]

    caption = ["--checkpoint", checkpoint, "--device", "cpu", "--entry_length", "5"]
    tiny.save_picture("data/development/cover.jpg", 0)
    soundfile.write("data/development/zero.ogg", np.zeros((0, 1)), 44100)
    capsys.readouterr()
    assert predict.main([*caption, "data/development", "--out", "captions.json", "--plot", "captions.png"]) == 0
    assert "skipped data/development/zero.ogg: zero length" in capsys.readouterr().err
    assert {row["image_id"] for row in json.loads(Path("captions.json").read_text())} == set(CLIPS), "a folder is searched for sounds"
    assert Path("captions.png").stat().st_size > 10_000
    assert predict.main([*caption, "--data", str(OUT), "--out", "stored.json"]) == 0
    by_id = [{row["image_id"]: row["caption"] for row in json.loads(Path(name).read_text())} for name in ("captions.json", "stored.json")]
    assert by_id[0] == by_id[1], "a sound is encoded as its features were"
    with pytest.raises(SystemExit):
        predict.main([*caption, "data/development/door.wav", "data/development/cover.jpg"])
    assert "cover.jpg is a picture; this checkpoint captions sounds" in capsys.readouterr().err


def test_a_checkpoint_of_pictures_refuses_sounds_and_stands_not_beside_one_of_sounds(tree, tiny_gpt2, capsys):
    tiny.save_published_features("oscar_split_ViT-B_32_train.pkl", [[text] for text in tiny.CAPTIONS])
    run("--out", "sounds.pkl")
    short = f"--out_dir out --gpt2_type {tiny_gpt2} --device cpu --epochs 1 --bs 8 --warmup_steps 1 --prefix_length 2".split()
    assert train.main(["--data", "oscar_split_ViT-B_32_train.pkl", "--prefix", "seen", *short]) == 0
    assert train.main(["--data", "sounds.pkl", "--prefix", "heard", *short]) == 0
    for words, said in (
        (["-C", "out/seen-000.pt", "data/development/door.wav"], "door.wav is a sound; this checkpoint captions pictures"),
        (["-C", "out/seen-000.pt", "-C", "out/heard-000.pt", "data/development/door.wav"], "heard-000.pt captions sounds, out/seen-000.pt"),
        (["-C", "out/heard-000.pt", "data/weights"], "holds no sound; expected files ending in"),
        (["-C", "out/heard-000.pt", "nowhere.wav"], "no sound or folder nowhere.wav"),
    ):
        with pytest.raises(SystemExit):
            predict.main([*words, "--device", "cpu"])
        assert said in capsys.readouterr().err
    run("--out", "published.pkl", "--spectrogram", "published")
    with pytest.raises(SystemExit):
        train.main(["--data", "sounds.pkl", "published.pkl", *short])
    assert "holds sounds under different settings (spectrogram published)" in capsys.readouterr().err


def test_the_published_recipe_has_the_published_picture_and_one_caption(tree):
    run("--spectrogram", "published", "--captions", "first")
    features = load_features(OUT)
    assert len(features.captions) == 4
    assert features.meta["audio"]["windows"] is None
    encoder = load_encoder("ViT-B/32")
    for name, row in zip(CLIPS, features.clip_embedding):
        picture = Image.fromarray(published_step_by_step(f"data/development/{name}"))
        assert torch.allclose(row, encoder.encode(encoder.preprocess(picture)[None])[0], atol=1e-5), name


@pytest.mark.parametrize(
    ("name", "split", "out"),
    [
        ("clotho_captions_development", "train", "train"),
        ("clotho_captions_validation", "val", "val"),
        ("clotho_captions_evaluation", "test", "test"),
        ("mine", "train", "train"),
    ],
)
def test_the_name_of_the_captions_names_the_split(name, split, out):
    assert parse_clotho.default_out(Path(f"x/{name}.csv"), "ViT-B/32") == (Path(f"data/clotho/oscar_split_ViT-B_32_{out}.pkl"), split)


def test_captions_in_latin_1_and_files_in_another_format_are_found(tree):
    save_sound("data/validation/caf\u00e9 \u2013 noon.flac", 0.2)
    save_sound("data/validation/x&amp;y.wav", 0.2)
    rows = [["caf\u00e9 \u2013 noon.wav", *["A d\u00e9j\u00e0 vu\u2019s sound."] * 5], ["x&y.wav", *["Wind."] * 5]]
    write_csv("data/clotho_captions_validation.csv", rows, encoding="cp1252")
    run("--captions_path", "data/clotho_captions_validation.csv", "--audio_path", "data/validation")
    features = load_features("data/clotho/oscar_split_ViT-B_32_val.pkl")
    assert features.captions[0]["caption"] == "A d\u00e9j\u00e0 vu\u2019s sound."
    assert features.captions[0]["image_id"] == rows[0][0]
    assert len(features.clip_embedding) == 2


def test_a_byte_order_mark_and_unused_columns_do_not_matter(tree):
    write_csv("bom.csv", [["x", "door.wav", "One.", "Two."]], ["keywords", " file_name", "caption_2", "caption_1 "], "utf-8-sig")
    assert [row["caption"] for row in read_clotho(Path("bom.csv")).images[0].captions] == ["Two.", "One."]
    assert [row["caption"] for row in read_clotho(Path("bom.csv"), "first").images[0].captions] == ["Two."]


def test_bad_clips_are_skipped_and_listed(tree, capsys):
    Path("data/development/door.wav").write_text("not a sound")
    soundfile.write("data/development/Vögel.wav", np.zeros((0, 1)), 44100)
    run("--out", "some.pkl")
    assert len(load_features("some.pkl").clip_embedding) == 2
    listed = {row["image_id"]: row["reason"] for row in csv.DictReader(open("some.pkl.skipped.csv", encoding="utf-8"))}
    assert listed == {"door.wav": "not a sound in a known format", "Vögel.wav": "zero length: no samples in it"}
    assert "2 sounds, 10 captions" in capsys.readouterr().out


def test_mistakes_are_one_line(tree, capsys):
    write_csv("data/other.csv", [["a.wav", "x"]], ["file", "text"])
    Path("data/empty.csv").touch()
    write_csv("data/nameless.csv", [["", *"abcde"]])
    write_csv("data/far.csv", [[f"{number}.wav", *"abcde"] for number in range(3)])
    Path("data/null.csv").write_bytes(b'file_name,caption_1\n"a.wav,\0x' + b"x" * 200_000)
    write_csv("data/rowless.csv", [])
    for words, said in (
        (["--captions_path", "data/other.csv"], "has the columns 'file', 'text'; expected the columns file_name and caption_1"),
        (["--captions_path", "data/empty.csv"], "has the columns none: it is empty"),
        (["--captions_path", "data/nameless.csv"], "no file_name in row 1"),
        (["--captions_path", "data/null.csv"], "null.csv holds NUL characters"),
        (["--captions_path", "data/rowless.csv"], "no sound with a caption"),
        (["--captions_path", "data/none.csv"], "no captions data/none.csv"),
        (["--audio_path", "data/elsewhere"], "no audio folder data/elsewhere"),
        (["--captions_path", "data/far.csv"], "sounds are not where they should be: found 0 of 3; data/development/0.wav"),
        (["--spectrogram", "waveform"], "ViT-B/32 takes pictures: --spectrogram waveform is not for it"),
    ):
        line = error_line(capsys, *words)
        assert line.startswith("parse_clotho.py: error: "), line
        assert said in line, line
    assert not list(Path("data").glob("clotho/*"))


def test_clap_hears_the_waveform_and_the_same_trainer_learns_from_it(tree, tiny_gpt2, capsys):
    tiny_towers.save_clap("clap")
    run("--clip_model_type", "clap:clap", "--audio_path", "data/development", "--out", "clap.pkl")
    features, encoder = load_features("clap.pkl"), load_encoder("clap:clap")
    assert features.meta["audio"]["spectrogram"] == "waveform"
    assert features.width == encoder.width
    samples = read_sound("data/development/door.wav", encoder.preprocessing["sample_rate"])
    row = next(caption["clip_embedding"] for caption in features.captions if caption["file_name"] == "door.wav")
    assert torch.allclose(features.clip_embedding[row], encoder.encode(encoder.preprocess(samples)[None])[0], atol=1e-5)
    words = ["--data", "clap.pkl", "--out_dir", "out", "--gpt2_type", str(tiny_gpt2), "--device", "cpu", "--max_steps", "2"]
    assert train.main(words) == 0
    assert predict.main(["-C", "out/coco_prefix-000.pt", "data/development/door.wav", "--device", "cpu", "--entry_length", "4"]) == 0
    assert "data/development/door.wav" in capsys.readouterr().out


def test_the_real_captions_are_read_whole(shared_data):
    sounds = read_clotho(shared_data / "clotho" / "clotho_captions_development.csv").images
    assert len(sounds) == 2893
    assert all(len(sound.captions) == 5 for sound in sounds)
    finder = parse_clotho.SoundFinder(shared_data / "clotho")
    for sound in read_clotho(shared_data / "clotho" / "two_clips.csv").images:
        assert Path(finder.find(sound.file_name)).is_file(), sound.image_id
        assert len(sound.captions) == 5, sound.image_id
