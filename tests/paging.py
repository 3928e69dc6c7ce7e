"""A small world for tests of the page: captioners of random weights that say something else about each picture, and the page with them."""

import contextlib
import os
import shutil
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch
from waiting import PATIENCE

import tiny
from features.audio import sound_encoder
from helpers import captioner
from models.checkpoints import config_path, save_checkpoint, save_config
from models.encoders import load_encoder
from prediction.inputs import encode_pictures

PICTURES = 50
WIDTH, VOCABULARY = 32, 60
WAIT = 1000 * PATIENCE  # milliseconds
SHOWN = "(place) => [...document.querySelectorAll(place + ' .result, ' + place + ' .problem')].map((one) => one.outerHTML).join('')"


def save_world(folder):
    """Write pictures/{n}.jpg, rain.wav, clip.pt, gpt2/, first.pt and second.pt (pictures) and sounds.pt into `folder`. → the folder"""
    folder = Path(folder)
    encoder = str(tiny.save_clip(folder / "clip.pt", WIDTH, "resnet"))
    tiny.random_gpt2(VOCABULARY, width=32, positions=24, scale=0.3).save_pretrained(folder / "gpt2")  # short captions
    tiny.word_tokenizer(VOCABULARY).save_pretrained(folder / "gpt2")
    pictures = [tiny.save_picture(folder / f"pictures/{number}.jpg", number) for number in range(PICTURES)]
    soundfile.write(folder / "rain.wav", np.random.default_rng(0).uniform(-0.3, 0.3, 22050), 22050)
    images = load_encoder(encoder)
    embeddings, _ = encode_pictures(pictures, images, {}, PICTURES)
    audio = sound_encoder(images).audio
    for name, seed, more in (("first", 1, {}), ("second", 2, {}), ("sounds", 3, {"audio": audio})):
        model = captioner(folder / "gpt2", seed=seed, encoder=encoder, clip_width=WIDTH, **more)
        first = model.clip_project.model[0]
        with torch.no_grad():  # the embeddings hardly differ: stretch what does
            first.weight.copy_(first.weight / embeddings.std(0) * 10)
            first.bias.copy_(-(first.weight @ embeddings.mean(0)))
        save_checkpoint(model, folder / f"{name}.pt", full=True)
        save_config(model.config, {"command": "python train.py --data x.pkl"}, config_path(folder / f"{name}.pt"))
    return folder


def save_demo(world, folder, sounds=False):
    """Write what a finished demo leaves into `folder`, from the small world."""
    checkpoint, heldout, example = ("sounds", "evaluation/a.wav", "rain.wav") if sounds else ("first", "heldout/a.jpg", "pictures/1.jpg")
    for name in ("checkpoints", "weights", str(Path(heldout).parent)):
        (folder / name).mkdir(parents=True)
    shutil.copy(world / f"{checkpoint}.pt", folder / "checkpoints/demo-002.pt")
    shutil.copy(world / f"{checkpoint}.json", folder / "checkpoints/demo-002.json")
    shutil.copy(world / example, folder / heldout)
    shutil.copytree(world / "gpt2", folder / "weights/demo_gpt2")
    shutil.copy(world / "clip.pt", folder / "weights/demo_clip.pt")
    return folder


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def serving(*checkpoints, most_upload=5, examples=()):
    """Serve the page with these checkpoints. Yields its URL."""
    from page.captioners import Source, load_captioners
    from page.serve import serve_page
    from page.worker import Worker

    worker = Worker(load_captioners([Source(str(path)) for path in checkpoints], torch.device("cpu")))
    with mock.patch.dict(os.environ), serve_page(worker, "127.0.0.1", free_port(), most_upload, examples) as page:
        yield page.local_url
    worker.close()


class Visit:
    """A browser tab with the page, and what went wrong in it."""

    def __init__(self, browser, url, **settings):
        self.said, self.url = [], url
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.page.on("console", lambda message: message.type == "error" and self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: request.url.startswith((url, "data:", "blob:")) or self.said.append(request.url))
        self.page.on("response", lambda response: response.status >= 400 and self.said.append(f"{response.status} {response.url}"))
        self.page.goto(url)
        self.page.wait_for_selector("#picture input[type=file]", state="attached")

    def shown(self, thing):
        """What the page shows as an answer: HTML of results and errors."""
        return self.page.evaluate(f"({SHOWN})('#{thing}-captions')")

    def give(self, thing, path):
        """Upload a file and wait for the answer. Returns its text."""
        before = self.shown(thing)
        self.page.set_input_files(f"#{thing} input[type=file]", path)
        return self.answer(thing, before)

    def answer(self, thing, before):
        """Wait until there is an answer that differs from `before`. Returns its text."""
        self.page.wait_for_function(
            f"([place, before]) => {{ const now = ({SHOWN})(place); return now && now !== before; }}", arg=[f"#{thing}-captions", before]
        )
        return self.page.locator(f"#{thing}-captions").inner_text()
