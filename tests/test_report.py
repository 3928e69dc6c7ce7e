"""The page of a run: what it shows, what it escapes, what it refuses, and how a browser takes it."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import evaluate
import tiny
from evaluating import mutate, write, write_coco
from reports import page
from reports.pictures import PictureFolders, picture_uri
from reports.run import main

NASTY = "<script>document.title='taken'</script> & \"quotes\" 'n <img src=x onerror=alert(1)>"


@pytest.fixture
def run_folder(workdir, monkeypatch):
    """out/, as train.py and evaluate.py leave it: one run, one file of scores, captions with HTML in them; and photos/ with pictures."""
    monkeypatch.setattr("evaluation.tokens.java_is_here", lambda: False)  # the plain tokenizer takes less time
    truth = write_coco()
    content = json.loads(Path("captions_val2017.json").read_text())
    content["images"] = [{"id": key, "file_name": f"{key:012d}.jpg"} for key in truth]
    write("captions_val2017.json", content)
    write("predictions.json", [{"image_id": key, "caption": NASTY if key == 2 else texts[0]} for key, texts in truth.items()])
    for key in (1, 2):
        tiny.save_picture(workdir / f"photos/val/{key:012d}.jpg", seed=key)
    options = "--predictions predictions.json --references captions_val2017.json --metrics bleu cider --bootstrap 20 --out out/scores.json"
    assert evaluate.main([*options.split(), "--plot", "grid.png", "--images", "photos"]) == 0
    lines = [{"step": step, "epoch": 0, "loss": 4 - 0.3 * step, "lr": 1e-5 * step, "captions_per_s": 9.5} for step in range(1, 9)]
    figures = {"val_loss": 2.0, "val_gap": 0.002, "val_cider": 0.4, "val_captions": 4, "val_distinct": 2, "val_ended": 1.0}
    lines += [{"step": step, "epoch": 0, **figures, "val_collapse": f"a sign {NASTY}"} for step in (4, 8)]
    write("out/toy_metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"half a li')
    row = {"epoch": 0, "image_id": NASTY, "reference": NASTY, "caption": NASTY, "cider": 0.5}
    write("out/toy_samples.jsonl", "".join(json.dumps({"step": step, **row}) + "\n" for step in (4, 8)))
    made_by = {"command": f"python train.py --prompt {NASTY}", "arguments": {"prompt": NASTY, "lr": 2e-5}, "versions": {"torch": "2"}}
    write("out/toy.json", {"model": {"prefix_length": 4, "prompt": NASTY, "gpt_config": {}}, "made_by": made_by})
    return workdir


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and all its text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.words = [], ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data


def test_the_page_shows_the_run_and_escapes_it(run_folder, capsys):
    assert main(["out", "--images", "photos"]) == 0
    assert "wrote out/toy_report.html" in capsys.readouterr().out
    read = Tags(Path("out/toy_report.html").read_text(encoding="utf-8"))
    names = {tag for tag, _ in read.tags}
    assert names <= set("html head meta title style body h1 h2 h3 section p pre table thead tbody tr th td details summary img div".split())
    assert not [attribute for _, attributes in read.tags for attribute in attributes if attribute.startswith("on") or attribute == "href"]
    sources = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
    assert len(sources) == 3
    assert all(source.startswith("data:image/") for source in sources)  # curves, and two of four pictures
    assert read.words.count(NASTY) >= 7
    parts = ["Best captions by CIDEr", "Worst captions by CIDEr", "A surfer on a wave.", "BLEU-4", "hardly depend on their images"]
    parts += ["Step 8, epoch 0: loss 1.6000 nats per token"]
    parts += ["prefix_length", "python evaluate.py --predictions", "SHA-256 of predictions.json"]
    for part in parts:
        assert part in read.words, part


def test_the_best_captions_come_first_and_the_worst_last(run_folder):
    rows = json.loads(Path("out/scores.predictions.json").read_text())
    assert rows[0]["file_name"] == "000000000001.jpg"
    assert len(rows[0]["references"]) == 2
    main(["out", "--out", "elsewhere.html"])
    words = Tags(Path("elsewhere.html").read_text(encoding="utf-8")).words
    scores = [float(score) for score in re.findall(r"· CIDEr ([\d.]+)", words[words.index("Best captions") :])][:4]
    assert scores[0] >= scores[1] >= scores[3] >= scores[2] == 0
    assert words.index(NASTY, words.index("Best")) > words.index("Worst captions")
    assert "No pictures: give the folder" in words


def test_a_grid_has_the_pictures_that_are_there(run_folder, capsys):
    assert Image.open("grid.png").size[0] > 500
    options = "--predictions predictions.json --references captions_val2017.json --metrics bleu --bootstrap 0"
    refused = [("--plot grid.png", "--plot and --images go together"), ("--plot g.png --images none", "--images none is no folder")]
    for more, message in [*refused, ("--plot g.png --images out", "none of the 4 images has a picture in out")]:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            evaluate.main([*options.split(), *more.split()])
        assert message in capsys.readouterr().err
        assert not Path("g.png").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere"], "no folder nowhere"),
    (["photos"], "holds no *_metrics.jsonl"),
    (["out", "--prefix", "other"], "has no run 'other'; it has toy"),
    (["out", "--scores", "predictions.json"], "predictions.json holds no scores"),
    (["out", "--scores", "no.json"], "no file no.json"),
    (["out", "--images", "nowhere"], "--images nowhere is no folder"),
])  # fmt: skip
def test_a_mistake_is_one_line(run_folder, capsys, words, message):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(words)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_drawn_changes_of_what_a_run_left_end_with_a_page_or_one_line(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("reports.plots.plot_training", lambda lines, title, path: path.write_text(str(sum(line["step"] for line in lines))))
    draw, ended = random.Random(3), {0: 0, 2: 0}
    names = ("scores.json", "scores.predictions.json", "toy.json", "toy_metrics.jsonl", "toy_samples.jsonl")
    kept = {name: Path("out", name).read_text() for name in names}
    for _ in range(250):
        name = draw.choice(names)
        if name.endswith(".jsonl"):
            rows = mutate([json.loads(line) for line in kept[name].splitlines()[:10]], draw)
            write(f"out/{name}", "\n".join(map(json.dumps, rows)))
        else:
            write(f"out/{name}", json.dumps(mutate(json.loads(kept[name]), draw)))
        try:
            code = main(["out", "--out", "page.html"])
        except SystemExit as end:
            code = end.code
            assert len(capsys.readouterr().err.splitlines()) == 1
        ended[code] += 1
        write(f"out/{name}", kept[name])
    assert min(ended.values()) > 30, ended


def test_several_runs_in_a_folder_want_a_name_and_a_run_without_scores_says_how(run_folder, capsys):
    Path("out/scores.json").unlink()
    write("out/b_metrics.jsonl", "")
    with pytest.raises(SystemExit):
        main(["out"])
    assert "2 runs: b, toy. Choose one with --prefix" in capsys.readouterr().err
    assert main(["out", "--prefix", "b"]) == 0
    words = Tags(Path("out/b_report.html").read_text()).words
    assert "No step yet." in words
    assert "python evaluate.py --data val.pkl --checkpoint out/b_best.pt" in words


def test_pictures_are_found_by_name_id_and_stem(workdir):
    for name in ("a/rain 1.png", "b/COCO_val2014_000000000007.jpg", "b/000000000009.jpg", "b/odd.jpeg"):
        tiny.save_picture(workdir / "p" / name, seed=1)
    Path("p/broken.jpg").write_bytes(b"no picture")
    found = PictureFolders(["p"])
    names = [found.find(*one) for one in ((5, "rain 1.wav"), (7,), ("9",), ("odd",), ("odd.jpeg",), (8,), (9, "gone.jpg"))]
    assert [path and path.name for path in names] == [
        "rain 1.png", "COCO_val2014_000000000007.jpg", "000000000009.jpg", "odd.jpeg", "odd.jpeg", None, None,
    ]  # fmt: skip
    for name in ("q/a/1.jpg", "q/b/1.jpg", "q/cat.jpg", "q/cat.png"):
        tiny.save_picture(workdir / name, seed=1)
    found = PictureFolders(["q"])
    shown = [found.find(name) for name in ("b/1.jpg", "b\\1.jpg", "1.jpg", "cat.png", "cat", "\xb2")]
    assert [path and str(path) for path in shown] == ["q/b/1.jpg", "q/b/1.jpg", None, "q/cat.png", None, None]
    assert picture_uri(Path("p/broken.jpg")) is None
    assert picture_uri(names[0]).startswith("data:image/jpeg;base64,")


def test_cells_escape_whatever_they_hold():
    made = page.table(["<b>"], [["</td><script>"], [3]]) + page.cards([{"image_id": "\"'>", "caption": "<i>", "references": ["\ud800<"]}])
    assert not {"script", "b", "i"} & {tag for tag, _ in Tags(made).tags}


def test_a_browser_shows_the_page_and_asks_for_nothing(run_folder, chromium):
    main(["out", "--images", "photos"])
    said, asked = [], []
    opened = chromium.new_page()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(Path("out/toy_report.html").resolve().as_uri())
    assert opened.title() == "toy in out"
    widths = opened.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
    assert len(widths) == 3
    assert min(widths) > 50
    assert opened.locator("img.curves").is_visible()
    assert opened.locator(".caption", has_text="<script>document.title").first.inner_text() == NASTY
    assert opened.locator("script").count() == 0
    opened.close()
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [Path("out/toy_report.html").resolve().as_uri()]
