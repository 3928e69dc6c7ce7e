"""The outputs that the notebooks are committed with: of one run, of the demo's models, and what they show holds."""

import io
import re

import nbformat
import pytest

from demo import run, run_audio, scenes, sounds
from notebooks_read import NOTEBOOKS, PICTURES, ROOT, SOUNDS, WALKTHROUGH, captions_of, outputs_of, read_notebook, same_picture

pytestmark = pytest.mark.usefixtures("one_thread")
SHOWN = 8  # of the demo's held-out pictures or sounds, in a notebook's grid


@pytest.mark.parametrize("stem", [*NOTEBOOKS, WALKTHROUGH])
def test_a_notebook_is_committed_with_the_outputs_of_one_run(stem):
    path, notebook = ROOT / "notebooks" / f"{stem}.ipynb", read_notebook(stem)
    nbformat.validate(notebook)
    assert path.stat().st_size < 2**20
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    _, pictures = zip(*outputs_of(notebook))
    assert sum(map(len, pictures)) == (3 if stem == SOUNDS else 2)
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8"))


def heldout_scenes():
    """The first held-out scenes of the demo."""
    return scenes.make_scenes(scenes.split_pairs(0)[1], run.FULL["heldout"], "heldout 0")[:SHOWN]


def heldout_sounds():
    """The first held-out sounds of the demo of sounds."""
    pairs = scenes.split_pairs(0, tuple(sounds.PITCHES), sounds.KINDS)[1]
    return sounds.make_sounds(pairs, run_audio.FULL["heldout"], "evaluation 0")[:SHOWN]


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_the_captions_shown_are_true_of_what_the_demo_draws_and_plays(stem):
    truth, is_true = (heldout_sounds(), sounds.caption_is_true) if stem == SOUNDS else (heldout_scenes(), scenes.caption_is_true)
    greedy, beams, grid = captions_of(read_notebook(stem))
    assert len(set(beams)) == 5
    assert len(grid) == SHOWN and grid[0] == beams[0]
    assert is_true(greedy, truth[0])
    assert sum(not is_true(caption, one) for caption, one in zip(grid, truth)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("stem", PICTURES)
def test_the_pictures_shown_are_those_that_the_demo_draws(stem):
    from PIL import Image

    from reports.plots import show_captions

    pictures = []
    for scene in heldout_scenes():
        scenes.draw_scene(scene).save(content := io.BytesIO(), "JPEG", quality=95, subsampling=0)
        pictures.append(Image.open(content).convert("RGB"))
    notebook = read_notebook(stem)
    greedy, beams, grid = captions_of(notebook)
    *_, alone, together = (pictures for _, pictures in outputs_of(notebook))
    assert same_picture(*alone, show_captions(pictures[:1], [[f"greedy: {greedy}", f"beam: {beams[0]}"]]).data)
    assert same_picture(*together, show_captions(pictures, [[caption] for caption in grid]).data)


@pytest.mark.slow
def test_the_spectrograms_shown_are_those_of_what_the_demo_plays(workdir):
    from features.audio import spectrogram_picture
    from reports.plots import show_captions

    sounds.write_split(workdir, "evaluation", heldout_sounds())
    pictures = [spectrogram_picture(path) for path in sorted((workdir / "evaluation").glob("*.wav"))]
    notebook = read_notebook(SOUNDS)
    grid = captions_of(notebook)[2]
    assert same_picture(*outputs_of(notebook)[6][1], show_captions(pictures, [[caption] for caption in grid]).data, tolerance=1)


def lasting(text):
    """What a walkthrough prints on any machine and of any world: lines without figures, rates and captions."""
    beginnings = ("no problem found", "all files together", "score x 100", "CIDEr", "BLEU-4", "wrote ", "validation: ", "device: ")
    return {begin for line in text.splitlines() for begin in beginnings if line.startswith(begin)}


@pytest.mark.slow
def test_the_walkthrough_runs_and_prints_what_it_shows(mini_demo, run_notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIXCAP_DEMO", str(mini_demo))
    (root := tmp_path / "linked").mkdir()
    for entry in ROOT.iterdir():
        if entry.suffix == ".py" or (entry / "__init__.py").exists():
            (root / entry.name).symlink_to(entry)
    changes = {'    TRAINING = "--epochs 8 ': '    TRAINING = "--epochs 1 '}
    done, shown = (outputs_of(notebook) for notebook in (run_notebook(WALKTHROUGH, changes, root), read_notebook(WALKTHROUGH)))
    assert "no problem found" in lasting("\n".join(text for text, _ in shown))
    assert [lasting(text) for text, _ in done] == [lasting(text) for text, _ in shown]
    assert [len(pictures) for _, pictures in done] == [len(pictures) for _, pictures in shown]
