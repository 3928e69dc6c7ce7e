"""The notebooks: short and whole; they run to their end, on the demo's models or on others, and show what generate() gives."""

import ast
import importlib
import io
import json
import re
import shutil
import subprocess
import sys

import pytest

from demo import ready, run_audio
from notebooks_read import NOTEBOOKS, PICTURES, ROOT, SOUNDS, WALKTHROUGH, code_of, lasting_text, outputs_of, read_notebook, same_picture

pytestmark = pytest.mark.usefixtures("one_thread")
DOWNLOADING = {"DOWNLOAD = False": "DOWNLOAD = True"}
FEW = {"sounds": 24, "heldout": 4, "clip_steps": 2, "gpt2_steps": 20, "kinds": ("tone", "click"), "in_process": True}


def check_outputs(notebook, model, embeddings, pictures, grid=slice(None)):
    """The notebook's captions and pictures of captions are those of the model.

    embeddings: [N, D] of what it takes; the first is captioned alone, and `grid` of them together.
    """
    from models.decoding import generate
    from reports.plots import show_captions

    install, switch, _, _, captioned, shown, several = outputs_of(notebook)
    assert install == switch == ("", [])
    greedy = generate(model, embeddings[:1], decoding="greedy")[0][0][0]
    beams, scores = zip(*generate(model, embeddings[:1], beam_size=5, num_captions=5)[0])
    best = [captions[0][0] for captions in generate(model, embeddings[grid], beam_size=5)]
    assert len(set(beams)) == 5
    assert beams[0].strip()
    assert len(best) > 1
    text = captioned[0]
    assert text.startswith(f"greedy: {greedy}\n")
    assert text.count("beam: ") == 5
    places = [text.index(f"beam: {caption}  (") for caption in beams]
    assert places == sorted(places)
    assert [float(score) for score in re.findall(r"  \((-\d+\.\d{3})\)$", text, re.MULTILINE)] == pytest.approx(scores, abs=2e-3)
    assert several[0] == "\n".join(best) + "\n"
    texts = [[f"greedy: {greedy}", f"beam: {beams[0]}"]]
    assert same_picture(*shown[1], show_captions(pictures[:1], texts).data)
    assert same_picture(*several[1], show_captions(pictures[grid], [[caption] for caption in best]).data)


def check_picture_notebook(notebook, demo, sources, grid=slice(None)):
    import torch

    from models.checkpoints import load_checkpoint
    from models.encoders import load_encoder
    from models.encoders.images import read_image

    encoder = load_encoder(demo.encoder)
    pictures = [read_image(source) for source in sources]
    embeddings = encoder.encode(torch.stack([encoder.preprocess(picture) for picture in pictures]))
    check_outputs(notebook, load_checkpoint(demo.checkpoint), embeddings, pictures, grid)


@pytest.mark.slow
@pytest.mark.parametrize("stem", PICTURES)
def test_a_notebook_of_pictures_shows_what_generate_gives_and_prints_as_committed(stem, mini_demo, run_notebook, monkeypatch):
    monkeypatch.setenv("PREFIXCAP_DEMO", str(mini_demo))
    demo, notebook = ready.ready_demo(mini_demo), run_notebook(stem)
    check_picture_notebook(notebook, demo, demo.heldout[:8])
    assert lasting_text(notebook) == lasting_text(read_notebook(stem))


@pytest.mark.slow
def test_with_download_a_notebook_takes_weights_by_name_and_photographs(mini_demo, tmp_path, run_notebook):
    """The root is one of links, so that its data/weights can hold a stand-in under the published name."""
    import skimage.data
    from PIL import Image

    root = tmp_path / "linked"
    (root / "data" / "weights").mkdir(parents=True)
    for entry in ROOT.iterdir():
        if entry.suffix == ".py" or (entry / "__init__.py").exists():
            (root / entry.name).symlink_to(entry)
    demo = ready.ready_demo(mini_demo)
    for stem in ("coco", "coco_weights"):
        shutil.copy(demo.checkpoint, root / "data" / "weights" / f"{stem}.pt")
        shutil.copy(demo.checkpoint.with_name("demo.json"), root / "data" / "weights" / f"{stem}.json")
    notebook = run_notebook("clip_prefix_captioning_inference", DOWNLOADING, root)
    photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    check_picture_notebook(notebook, demo, photographs, slice(1, None))


@pytest.fixture(scope="module")
def mini_sounds(tmp_path_factory, one_thread):
    """A finished demo of 24 sounds, whose models are hardly trained."""
    import parse_clotho
    import train

    folder = tmp_path_factory.mktemp("mini_sounds")
    run_audio.build(folder, **FEW)
    lines = run_audio.command_lines(folder, "--prefix_length 2 --bs 20 --epochs 1 --lr 1e-3 --warmup_steps 1")
    for stage, script in (("parse development", parse_clotho), ("train", train)):
        assert script.main([*lines[stage][1:], "--device", "cpu"]) == 0, stage
    return folder


def check_sound_notebook(notebook, demo, spectrogram):
    from features.audio import sound_encoder, spectrogram_picture
    from features.loading import encode_views
    from models.checkpoints import load_checkpoint
    from models.encoders import load_encoder

    encoder = sound_encoder(load_encoder(demo.encoder), spectrogram)
    embeddings = encode_views(encoder, [encoder.preprocess(path) for path in demo.heldout])
    pictures = [spectrogram_picture(path) for path in demo.heldout]
    check_outputs(notebook, load_checkpoint(demo.checkpoint), embeddings, pictures)
    expected = io.BytesIO()
    pictures[0].save(expected, "PNG")
    outputs = outputs_of(notebook)
    assert f"sees {spectrogram} spectrograms" in outputs[2][0]
    assert same_picture(*outputs[3][1], expected.getvalue())
    sound_cell = next(cell for cell in notebook.cells if cell.source.startswith("SOUND = "))
    assert any("<audio" in output.get("data", {}).get("text/html", "") for output in sound_cell.outputs)


@pytest.mark.slow
def test_the_notebook_of_sounds_shows_what_generate_gives_and_prints_as_committed(mini_sounds, run_notebook, monkeypatch):
    monkeypatch.setenv("PREFIXCAP_DEMO_AUDIO", str(mini_sounds))
    notebook = run_notebook(SOUNDS)
    check_sound_notebook(notebook, ready.ready_demo(mini_sounds, sounds=True), "mel")
    shown = lasting_text(read_notebook(SOUNDS))
    eight, fewer = "a caption\n" * 8, "a caption\n" * FEW["heldout"]
    assert shown.endswith(f"\n{eight}")
    assert lasting_text(notebook) == shown.removesuffix(eight) + fewer


@pytest.mark.slow
def test_with_download_the_sound_notebook_takes_a_checkpoint_without_sound_settings_and_own_sounds(mini_sounds, tmp_path, run_notebook):
    import torch

    demo = ready.ready_demo(mini_sounds, sounds=True)
    config = json.loads(demo.checkpoint.with_name("demo.json").read_text())
    assert config["model"].pop("audio")["spectrogram"] == "mel"
    torch.save(dict(torch.load(demo.checkpoint)), tmp_path / "mine.pt")  # as published files are, without a config of its own
    (tmp_path / "mine.json").write_text(json.dumps(config))
    changes = {"CHECKPOINT": tmp_path / "mine.pt", "SOUND": demo.heldout[0], "FOLDER": demo.heldout[0].parent}
    notebook = run_notebook(SOUNDS, DOWNLOADING | {f'{name} = ""': f"{name} = {str(path)!r}" for name, path in changes.items()})
    check_sound_notebook(notebook, demo, "published")


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_notebook_is_short_and_set_to_download_nothing(stem):
    notebook = read_notebook(stem)
    assert 5 <= len(notebook.cells) <= 10
    assert notebook.cells[0].cell_type == notebook.cells[-1].cell_type == "markdown"
    first, second, *_ = code_of(notebook)
    assert first.splitlines()[1] == 'REPOSITORY = ""'
    assert second.splitlines()[0].startswith("DOWNLOAD = False")
    assert "**The saved outputs** below are those of `DOWNLOAD = False`" in notebook.cells[0].source


def test_there_are_no_other_notebooks():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted((*NOTEBOOKS, WALKTHROUGH))


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_every_import_of_a_notebook_resolves(stem):
    for source in code_of(read_notebook(stem)):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"from {node.module} import {alias.name}"


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_the_names_files_and_options_in_a_notebook_exist(stem):
    from models.published.downloads import WEIGHTS

    notebook = read_notebook(stem)
    names = re.findall(r'^NAME = "(\w+)"', "\n".join(code_of(notebook)), re.MULTILINE)
    assert len(names) == (stem != SOUNDS)
    assert set(names) <= set(WEIGHTS)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert set(re.findall(r'"(\w+)" and the same pictures', text)) <= set(WEIGHTS)
    for name in re.findall(r"[\w/]+\.(?:ipynb|md)\b|\b\w+\.py\b", text):
        assert (ROOT / "notebooks" / name).is_file() or (ROOT / name).is_file(), name
    sources = "".join(path.read_text() for folder in (".", "training", "prediction", "features") for path in (ROOT / folder).glob("*.py"))
    for option in re.findall(r"(?<![\w-])--([a-z]\w*)", text):
        assert f'"--{option}"' in sources, option


def run_install(source, folder):
    """Run the install cell in `folder`, then print where it led."""
    code = source + "\nprint(os.getcwd(), sys.path[0])"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_all_install_cells_are_the_same():
    assert len({code_of(read_notebook(stem))[0] for stem in (*NOTEBOOKS, WALKTHROUGH)}) == 1


def test_outside_a_clone_the_install_cell_asks_for_the_address_and_with_it_clones_once(tmp_path):
    source = code_of(read_notebook(NOTEBOOKS[0]))[0]
    here = tmp_path / "here"
    here.mkdir()
    done = run_install(source, here)
    assert done.returncode == 1
    assert "set REPOSITORY" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(here.iterdir())

    origin = tmp_path / "origin"
    (origin / "models").mkdir(parents=True)
    for name in ("models/captioner.py", "requirements.txt"):
        (origin / name).write_text("")
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    source = source.replace('REPOSITORY = ""', f"REPOSITORY = {origin.as_uri()!r}", 1)
    clone = (here / "prefixcap").resolve()
    assert run_install(source, here).stdout == f"{clone} {clone}\n"
    (clone / "mine").write_text("")
    assert run_install(source, here).stdout == f"{clone} {clone}\n"
    assert (clone / "mine").exists()
    assert run_install(source, clone / "models").stdout == f"{clone} {clone}\n"
