"""Published weights by name: downloaded once, checked at each load, and one message when they cannot be had."""

import hashlib
from types import SimpleNamespace

import gdown
import pytest

from common import UserError
from models.published import downloads as published
from models.published.downloads import WEIGHTS, find_published

CONTENT = b"PK\x03\x04 weights"


@pytest.fixture
def drive(workdir, monkeypatch):
    """A Google Drive that serves CONTENT; lists what was asked of it. The working directory is empty."""
    asked = []

    def download(id, output, hasher):
        asked.append(id)
        with open(output, "wb") as file:
            file.write(drive.content)
        hasher.update(drive.content)

    drive = SimpleNamespace(asked=asked, content=CONTENT, names=["base_model.pt", "Frozen-model.pt", "prompted.pt", "lora_model.pt"])
    files = lambda **words: [SimpleNamespace(path=f"models/{name}", id=f"id of {name}") for name in drive.names]  # noqa: E731
    monkeypatch.setattr(published, "hub_is_reachable", lambda address: True)
    monkeypatch.setattr(gdown, "download", download)
    monkeypatch.setattr(gdown, "download_folder", files)
    return drive


def test_a_name_is_downloaded_once_and_its_digest_kept(drive, workdir):
    path = find_published("coco")
    assert path.read_bytes() == CONTENT
    assert drive.asked == [WEIGHTS["coco"].drive_id]
    assert (workdir / path).with_name("coco_weights.pt.sha256").read_text().startswith(hashlib.sha256(CONTENT).hexdigest())
    assert find_published("coco") == path
    assert len(drive.asked) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["coco_weights.pt", "coco_weights.pt.sha256"]


def test_a_file_that_changed_since_is_refused_in_one_line(drive):
    path = find_published("conceptual")
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(UserError, match="not the file it was.*Remove it to download it again"):
        find_published("conceptual")


def test_a_file_put_there_by_hand_is_taken_and_watched_from_then_on(drive):
    path = published.weights_folder() / "flickr_small_weights.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"by hand")
    assert find_published("flickr_small") == path
    assert not drive.asked
    path.write_bytes(b"changed")
    with pytest.raises(UserError, match="not the file it was"):
        find_published("flickr_small")


@pytest.mark.parametrize(
    ("name", "file"), [("base", "base_model.pt"), ("frozen", "Frozen-model.pt"), ("prompted", "prompted.pt"), ("lora", "lora_model.pt")]
)
def test_the_instagram_weights_are_found_in_their_folder(drive, name, file):
    find_published(f"instagram_{name}")
    assert drive.asked == [f"id of {file}"]


def test_a_folder_without_such_a_file_names_what_it_holds(drive):
    drive.names = ["notes.txt", "lora_a.pt", "lora_b.pt"]
    with pytest.raises(UserError, match="lora_a.pt, lora_b.pt, notes.txt; expected one name with 'lora'"):
        find_published("instagram_lora")


def test_a_page_instead_of_weights_is_not_kept(drive):
    drive.content = b"<!DOCTYPE html> quota exceeded"
    with pytest.raises(UserError, match="not a weight file.*put it at"):
        find_published("coco")
    assert not any(published.weights_folder().glob("*"))


@pytest.mark.parametrize("name", WEIGHTS)
def test_without_a_network_one_message_says_what_to_fetch_and_where_to_put_it(workdir, monkeypatch, name):
    monkeypatch.setattr(published, "hub_is_reachable", lambda address: False)
    with pytest.raises(UserError) as error:
        find_published(name)
    message = str(error.value)
    assert WEIGHTS[name].drive_id in message
    assert f"data/weights/{name}_weights.pt" in message
    assert "\n" not in message
    assert not (workdir / "data").exists()


def test_any_other_name_is_not_published():
    assert find_published("coco.pt") is None
