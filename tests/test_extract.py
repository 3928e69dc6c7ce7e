"""What any extraction promises, whatever the data set: counted, resumable, equal bytes."""

import os
from pathlib import Path

import pytest
import torch

import tiny
from common import UserError
from features.extract import Record, check_images, extract, merge_records
from features.store import load_features
from models.encoders import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(workdir):
    """Paths of seven pictures."""
    return [str(tiny.save_picture(workdir / f"{number}.jpg", number)) for number in range(7)]


@pytest.fixture
def encoder(workdir):
    return load_encoder(tiny.save_clip(workdir / "clip.pt", 512, "vit"))


def test_blank_captions_are_dropped_and_counted_and_an_image_left_without_one_too(pictures, encoder):
    captions = ((0, "One."), (1, "  "), (0, "\n"), (2, "Two.\n"))
    extract([Record(n, pictures[n], [{"caption": text}]) for n, text in captions], encoder, "some.pkl", source="here")
    features = load_features("some.pkl")
    assert [(c["caption"], c["clip_embedding"]) for c in features.captions] == [("One.", 0), ("Two.\n", 1)]
    assert features.meta["blank_captions"] == 2
    assert features.meta["images_without_caption"] == 1


def test_one_id_for_two_pictures_is_refused():
    with pytest.raises(UserError, match="stands for two pictures"):
        merge_records([Record(1, "a.jpg", [{"caption": "x"}]), Record("1", "b.jpg", [{"caption": "y"}])])


def test_pictures_may_be_bytes_and_other_keys_of_a_caption_are_kept(pictures, encoder):
    for name, image in (("path.pkl", pictures[0]), ("bytes.pkl", Path(pictures[0]).read_bytes())):
        extract([Record("a", image, [{"caption": "x", "split": "y"}])], encoder, name, source="here")
    assert torch.equal(load_features("path.pkl").clip_embedding, load_features("bytes.pkl").clip_embedding)
    assert load_features("bytes.pkl").captions == [{"image_id": "a", "caption": "x", "split": "y", "id": 0, "clip_embedding": 0}]


def test_missing_pictures_are_counted_before_anything_is_loaded(workdir):
    records = [Record(number, f"{number}.jpg", [{"caption": "x"}]) for number in range(1000)]
    for found in range(3):
        Path(f"{found}.jpg").touch()
    with pytest.raises(UserError, match="found 3 of 1000; 3.jpg, for example, is missing"):
        check_images(records, "50%")
    check_images(records, 997)
    check_images(records[:13], "1%")
    with pytest.raises(UserError, match="found 3 of 14"):
        check_images(records[:14], "1%")
    with pytest.raises(UserError, match="found 0 of 5"):
        check_images(records[10:15], 100)


class Stopping:
    """An encoder that is interrupted after some batches, and counts them."""

    def __init__(self, encoder, batches):
        self.encoder, self.left, self.encoded = encoder, batches, 0

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def encode(self, batch):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.encoded += len(batch)
        return self.encoder.encode(batch)


def test_an_interrupted_extraction_goes_on_where_it_stopped_or_starts_anew_when_anything_changed(pictures, encoder, capsys):
    Path(pictures[2]).write_text("not a picture")
    records = [Record(number, path, [{"caption": f"Caption {number}."}]) for number, path in enumerate(pictures)]
    options = dict(source="here", batch_size=2, num_workers=0)
    extract(records, encoder, "whole.pkl", **options)

    def stopped_after(batches):
        with pytest.raises(SystemExit) as caught:
            extract(records, Stopping(encoder, batches), "resumed.pkl", **options)
        assert caught.value.code == 130
        assert not Path("resumed.pkl").exists()

    def finished():
        counting = Stopping(encoder, 100)
        extract(records, counting, "resumed.pkl", **options)
        assert Path("resumed.pkl").read_bytes() == Path("whole.pkl").read_bytes()
        assert Path("resumed.pkl.skipped.csv").read_bytes() == Path("whole.pkl.skipped.csv").read_bytes()
        assert not Path("resumed.pkl.pieces").exists()
        Path("resumed.pkl").unlink()
        return counting.encoded

    stopped_after(2)
    stopped_after(1)
    assert finished() == 1, "three of four batches were kept"
    stopped_after(2)
    os.utime(pictures[0], ns=(1, 1))
    assert finished() == 6
    assert "starting over" in capsys.readouterr().err
    stopped_after(3)
    damaged = sorted(Path("resumed.pkl.pieces").glob("*.npz"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert finished() == 6


def test_a_name_without_suffix_makes_a_folder_of_the_same_features(pictures, encoder):
    records = [Record(n, path, [{"caption": f"{n} {k}"} for k in range(2)]) for n, path in enumerate(pictures)]
    for out in ("file.pkl", "folder", "folder"):  # the second time it is replaced
        extract(records, encoder, out, source="here")
    file, folder = load_features("file.pkl"), load_features("folder")
    assert torch.equal(folder.clip_embedding[:], file.clip_embedding)
    assert list(folder.captions) == file.captions
    assert folder.meta == file.meta
    assert not Path("folder.pieces").exists()
    Path("mine").mkdir()
    Path("mine/thesis.tex").touch()
    with pytest.raises(UserError, match="holds other things"):
        extract(records, encoder, "mine", source="here")


def test_an_extraction_is_the_same_from_pieces_as_from_memory(pictures, encoder):
    records = [Record(n, path, [{"caption": f"{n} {k}"} for k in range(2)]) for n, path in enumerate(pictures)]
    for suffix in (".pkl", ""):
        extract(records, encoder, f"memory{suffix}", source="here", batch_size=2, num_workers=0, save_seconds=1000)
        extract(records, encoder, f"pieces{suffix}", source="here", batch_size=2, num_workers=0, save_seconds=0)
    assert Path("pieces.pkl").read_bytes() == Path("memory.pkl").read_bytes()
    files = sorted(path for path in Path("memory").rglob("*") if path.is_file())
    assert [path.read_bytes() for path in files] == [(Path("pieces") / path.relative_to("memory")).read_bytes() for path in files]


def test_fast_decoding_is_written_down_and_changes_jpegs_only_and_does_not_mix_with_other_work(workdir, encoder, capsys):
    from PIL import Image

    noise = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    picture = Image.fromarray(noise).resize((1200, 900), Image.Resampling.BICUBIC)
    records = []
    for name in ("a.jpg", "b.jpg", "c.png", "d.png"):
        picture.rotate(90 * len(records)).save(name)
        records.append(Record(name, name, [{"caption": name}]))
    options = dict(source="here", batch_size=2, num_workers=0)
    extract(records, encoder, "plain.pkl", **options)
    extract(records, encoder, "fast.pkl", **options, fast_decode=True)
    plain, fast = load_features("plain.pkl"), load_features("fast.pkl")
    assert fast.meta.pop("fast_decode") is True
    assert fast.meta == plain.meta
    assert torch.equal(fast.clip_embedding[2:], plain.clip_embedding[2:])
    assert not torch.equal(fast.clip_embedding, plain.clip_embedding)
    assert (torch.cosine_similarity(fast.clip_embedding, plain.clip_embedding) > 0.98).all()

    with pytest.raises(SystemExit):
        extract(records, Stopping(encoder, 1), "resumed.pkl", **options)
    extract(records, encoder, "resumed.pkl", **options, fast_decode=True)
    assert "starting over" in capsys.readouterr().err
    assert Path("resumed.pkl").read_bytes() == Path("fast.pkl").read_bytes()


def test_fast_decoding_wants_an_encoder_that_crops(pictures, encoder):
    encoder.preprocess.short_side = None
    with pytest.raises(UserError, match="--fast_decode is for encoders"):
        extract([Record("a", pictures[0], [{"caption": "x"}])], encoder, "a.pkl", source="here", fast_decode=True)
