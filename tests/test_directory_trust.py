"""Feature directories of strangers: lying headers, bombs, FIFOs, foreign columns. One line, or read as meant; other people's files stay."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import check
from common import UserError
from features.columns import read_columns
from features.store import load_features, save_features

META = {"encoder": "ViT-B/32", "normalized": False}
CAPTIONS = [{"image_id": number, "caption": f"text {number}", "clip_embedding": number} for number in range(4)]


@pytest.fixture
def ours(tmp_path):
    save_features(tmp_path / "a", torch.ones(4, 8), CAPTIONS, META)
    return tmp_path / "a"


@pytest.fixture
def foreign(ours):
    (ours / "meta.json").unlink()
    return ours


def array_of(folder):
    return folder / "img_emb" / "img_emb_0.npy"


def table_of(folder):
    return folder / "metadata" / "metadata_0.parquet"


def set_columns(folder, **columns):
    frame = pd.read_parquet(table_of(folder))
    frame.assign(**columns).to_parquet(table_of(folder))


@pytest.mark.parametrize("shape", ["(4000000000000, 8)", "(4611686018427387904, 8)", "(4, 99999999999999999999)", "(-4, 8)", "(4.0, 8)",
                                   "(True, 8)", "4", "(4, 8", "[" * 2000, "(4, 0)"])  # fmt: skip
def test_a_header_that_promises_something_else_is_one_line(ours, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    array_of(ours).write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(128))
    with pytest.raises(UserError, match="img_emb_0.npy"):
        load_features(ours)


def test_arrays_in_fortran_order_and_of_other_machines_are_read(ours):
    array = np.arange(32, dtype=">f4").reshape(4, 8)
    np.save(array_of(ours), np.asfortranarray(array))
    assert torch.equal(load_features(ours).clip_embedding[:], torch.arange(32.0).reshape(4, 8))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)], ids=["fifo", "folder", "loop"])
@pytest.mark.parametrize("which", [array_of, table_of, lambda folder: folder / "meta.json"], ids=["array", "table", "meta"])
def test_what_is_no_regular_file_is_refused_unread(ours, which, make):
    which(ours).unlink()
    make(which(ours))
    with pytest.raises(UserError, match=which(ours).name):
        load_features(ours)


def test_a_caption_repeated_by_a_small_table_is_refused_before_it_is_unfolded(ours):
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), ["x" * 900_000])
    pq.write_table(pa.table({"caption": column}), table_of(ours))
    np.save(array_of(ours), np.ones((100_000, 1), np.float16))
    with pytest.raises(UserError, match="far more than"):
        load_features(ours)
    assert table_of(ours).stat().st_size < 100_000


def test_a_table_of_more_rows_than_embeddings_is_refused_unread(ours):
    pq.write_table(pa.table({"caption": pa.DictionaryArray.from_arrays(pa.array([0] * 3_000_000, pa.int8()), ["x"])}), table_of(ours))
    with pytest.raises(UserError, match="3000000 rows"):
        load_features(ours)


@pytest.mark.parametrize("value", ["x", 7, None, ["a"], {"a": 1}, [["a"]], ["{}"], b"\xff"], ids=str)
@pytest.mark.parametrize("column", ["details", "more_captions"])
def test_columns_of_other_tools_are_ignored(foreign, column, value):
    set_columns(foreign, **{column: [value] * 4})
    assert load_features(foreign).captions[:] == CAPTIONS


@pytest.mark.parametrize("value", [1.5, {"a": 1}, ["a"], None, b"\xff"], ids=str)
def test_an_id_column_that_cannot_be_one_gives_way_to_the_next(foreign, value):
    set_columns(foreign, image_id=[value] * 4, key=["a", "b", "c", "d"])
    pq.write_table(pq.read_table(table_of(foreign)).drop(["image_path"]), table_of(foreign))
    ids = [caption["image_id"] for caption in load_features(foreign).captions]
    assert ids == ["a", "b", "c", "d"] == list(load_features(foreign).image_ids())


def test_missing_ids_are_named_after_their_rows(foreign):
    set_columns(foreign, image_id=["a", None, "c", "d"])
    features = load_features(foreign)
    ids = [caption["image_id"] for caption in features.captions]
    assert ids == ["a", "metadata_0:1", "c", "d"] == list(features.image_ids())


@pytest.mark.parametrize("value", [[], ["[1]"], ["{"], ['{"image_id": []}'], ["[" * 100_000], [None]], ids=range(6))
def test_damaged_details_of_ours_are_one_line(ours, value):
    set_columns(ours, details=[value] * 4)
    with pytest.raises(UserError, match="details that are not an object"):
        load_features(ours).captions[:]
    if "image_id" not in str(value):
        assert list(load_features(ours).image_ids()) == [0, 1, 2, 3]


@pytest.mark.parametrize("meta", ["[" * 100_000, "[]", '{"images": "4"}', '{"images": 4.5}', '{"encoder": 5}', '{"normalized": []}',
                                  '{"audio": {"a": []}}', '{"encoder": "\\ud800"}'])  # fmt: skip
def test_a_meta_of_other_types_is_one_line(ours, meta):
    (ours / "meta.json").write_text(meta)
    with pytest.raises(UserError, match="meta.json"):
        load_features(ours)


@pytest.mark.parametrize("mine", ["mine.txt", "img_emb/notes.txt", "metadata/deep/file.parquet", "text_emb"])
def test_a_feature_directory_with_other_things_in_it_is_never_replaced(ours, mine):
    (ours / mine).parent.mkdir(exist_ok=True)
    (ours / mine).write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        save_features(ours, torch.zeros(4, 8), CAPTIONS, META)
    assert (ours / mine).read_text() == "mine"
    assert load_features(ours).clip_embedding[0][0] == 1


def test_a_link_to_a_feature_directory_stays_a_link(ours, tmp_path):
    (tmp_path / "link").symlink_to("a")
    save_features(tmp_path / "link", torch.zeros(4, 8), CAPTIONS, META)
    assert (tmp_path / "link").is_symlink()
    assert load_features(ours).clip_embedding[0][0] == 0


def test_a_fifo_without_a_suffix_is_no_place_for_a_directory(tmp_path):
    os.mkfifo(tmp_path / "new")
    with pytest.raises(UserError, match="FIFO"):
        save_features(tmp_path / "new", torch.zeros(4, 8), CAPTIONS, META)
    assert (tmp_path / "new").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_writer_killed_between_two_renames_left_is_put_back(ours, tmp_path, monkeypatch):
    real, renames = os.rename, []

    def rename(source, target):
        renames.append(source)
        if len(renames) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr("features.directory_writer.shutil.rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        save_features(ours, torch.zeros(4, 8), CAPTIONS, META)
    monkeypatch.undo()
    assert not ours.exists()
    with pytest.raises(UserError, match="Unicode"):
        save_features(ours, torch.zeros(1, 8), [{**CAPTIONS[0], "caption": "\ud800"}], META)
    assert load_features(ours).clip_embedding[0][0] == 1


def test_ids_and_captions_of_a_pickle_are_plain(tmp_path, capsys):
    ids = [np.int64(7), torch.tensor(8), 9.0, np.str_("a")]
    captions = [{**caption, "image_id": image_id, "caption": "half \ud83c."} for caption, image_id in zip(CAPTIONS, ids)]
    torch_free = {"clip_embedding": torch.ones(4, 8), "captions": captions, "meta": META}
    pd.to_pickle(torch_free, tmp_path / "a.pkl")
    features = load_features(tmp_path / "a.pkl")
    assert json.dumps([caption["image_id"] for caption in features.captions]) == '[7, 8, 9, "a"]'
    assert features.texts == ["half \ufffd."] * 4
    assert "4 captions hold half" in capsys.readouterr().err


@pytest.mark.parametrize("image_id", [[1], {"a": 1}, None, 1.5, float("nan"), True, b"a", (1,)], ids=str)
def test_an_id_of_another_type_is_one_line(tmp_path, image_id, capsys):
    pd.to_pickle(
        {"clip_embedding": torch.ones(4, 8), "captions": [{**CAPTIONS[0], "image_id": image_id}], "meta": META}, tmp_path / "a.pkl"
    )
    with pytest.raises(UserError, match="image_id"):
        load_features(tmp_path / "a.pkl")
    assert check.main([str(tmp_path / "a.pkl"), "--sample", "0"]) == 1


def write_lying_table(path, size):
    """Write a table whose one caption unpacks to `size` bytes while the footer says 40. Returns the size of the file."""
    pq.write_table(pa.table({"image_path": ["a.jpg"], "caption": ["a" * size]}), path, compression="zstd", use_dictionary=False,
                   write_statistics=False)  # fmt: skip

    def number(value):
        return bytes((value >> shift & 127) | (128 if value >> shift + 7 else 0) for shift in range(0, value.bit_length(), 7))

    true = number(2 * pq.ParquetFile(path).metadata.row_group(0).column(1).total_uncompressed_size)
    content = path.read_bytes()
    assert content.count(true) >= 1
    at = content.rindex(true)
    path.write_bytes(content[:at] + bytes([80 | 128, *[128] * (len(true) - 2), 0]) + content[at + len(true) :])
    assert pq.ParquetFile(path).metadata.row_group(0).column(1).total_uncompressed_size == 40
    return path.stat().st_size


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is read from /proc")
def test_pages_that_unpack_to_more_than_the_footer_says_are_refused_before_they_are_read(tmp_path):
    size = write_lying_table(tmp_path / "lie.parquet", 400_000_000)
    assert size < 100_000
    program = (
        "import re, sys; from common import UserError; from features.columns import read_columns\n"
        "try: read_columns(sys.argv[1], ['caption'])\n"
        "except UserError as error: print(error, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "lie.parquet"], capture_output=True, text=True, check=True)
    message, kilobytes = done.stdout.splitlines()
    assert "far more than a file of" in message and "\n" not in message
    assert int(kilobytes) < 200_000


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_tables_of_several_row_groups_and_pages_are_read_whole(tmp_path, version, compression, dictionary):
    captions = [None if row % 5 == 0 else f"{row} " * (row % 7) for row in range(500)]
    lists = [[f"{row}", "y"][: row % 3] for row in range(500)]
    table = pa.table({"caption": captions, "more": pa.array(lists, pa.list_(pa.string()))})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=70, data_page_size=100, data_page_version=version, compression=compression,
                   use_dictionary=dictionary, write_page_checksum=True)  # fmt: skip
    columns = read_columns(tmp_path / "t.parquet", ["caption", "more"])
    assert columns["caption"].to_pylist() == captions and columns["more"].to_pylist() == lists


def read_changed_tables(seed, path):
    """Read a table with one byte changed, for every byte of its footer and some of its pages; a line for each, their number last."""
    draw = random.Random(seed)
    table = pa.table({"caption": [f"a caption {row}" for row in range(40)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=bool(seed), data_page_version=f"{seed + 1}.0")
    whole = Path(path).read_bytes()
    footer = range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole))
    places = [*footer, *(draw.randrange(footer.start) for _ in range(50))]
    changes = [(place, byte) for place in places for byte in (0, draw.randrange(256))]
    for place, byte in changes:
        Path(path).write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        try:
            print("read", len(read_columns(path, ["caption"])["caption"]), flush=True)
        except UserError as error:
            print("refused", error, flush=True)
    print(len(changes))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_damaged_table_is_read_or_refused_in_one_line(tmp_path, seed):
    """In a process of its own, which numbers of a footer that contradict each other could end."""
    path = str(tmp_path / "damaged.parquet")
    program = f"import test_directory_trust as tests; tests.read_changed_tables({seed}, {path!r})"
    places = {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(check.__file__).parent)))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **places})
    assert done.returncode == 0, done.stderr
    *lines, count = done.stdout.splitlines()
    assert len(lines) == int(count)
    refused = [line for line in lines if not line.startswith("read ")]
    assert refused and all(line.startswith("refused ") and path in line for line in refused)
