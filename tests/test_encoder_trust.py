"""Weight files and folders of strangers: nothing in them is run, and nothing is allocated that the files do not hold."""

import json
import pickle
import random
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import tiny
import tiny_towers
from common import UserError
from models.encoders import load_encoder
from models.encoders.text import load_text_tower
from models.encoders.torchscript import read_torchscript

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def save_archive(path, seed=0):
    """Write OpenAI's archive of a tiny CLIP, with the buffers theirs has. Returns the model."""
    from clip.model import CLIP

    torch.manual_seed(seed)
    model = CLIP(512, 64, 1, 64, 32, 77, 64, 64, 1, 1).eval()
    for name, number in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 64)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(number))
    inputs = torch.randn(1, 3, 64, 64), torch.randint(0, 64, (1, 77))
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path)
    return model


def refused(name, words, load=load_encoder):
    """The one line that a name is refused with."""
    with pytest.raises(UserError, match=words) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(source, target, change):
    """Copy a zip; change(name, bytes) gives each member's bytes and how it is compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data, how = change(member.filename, old.read(member))
            new.writestr(member.filename, data, how)


def test_an_archive_is_read_as_torch_reads_it_without_running_it(workdir, monkeypatch):
    save_archive("archive.pt")
    expected = torch.jit.load("archive.pt").state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    found = read_torchscript("archive.pt")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert load_encoder("archive.pt").width == 512


def test_half_precision_archives_are_read(workdir):
    model = torch.jit.trace(torch.nn.Linear(3, 2).half(), torch.ones(1, 3).half())
    torch.jit.save(model, "half.pt")
    found = read_torchscript("half.pt")
    assert torch.equal(found["weight"], model.weight)
    assert found["bias"].dtype == torch.float16


class Payload:
    def __reduce__(self):
        return open, ("was_run", "w")


def test_an_archive_that_asks_for_code_is_refused(workdir):
    save_archive("archive.pt")
    for data, words in (
        (pickle.dumps(Payload(), 2), "asks for io.open|asks for __builtin__"),
        (b"\x80\x02]\x8e\xff\xff\xff\xff\xff\xff\xff\x00.", "does not hold CLIP weights"),  # BINBYTES8
        (b"\x80\x02X\xff\xff\xff\x7fab.", "does not hold CLIP weights"),
        (b"", "does not hold CLIP weights"),
    ):
        rewrite("archive.pt", "bad.pt", lambda name, old: (data if name.endswith("/data.pkl") else old, zipfile.ZIP_STORED))
        refused("bad.pt", words)
    assert not (workdir / "was_run").exists()


def test_compressed_and_overlapping_members_are_refused(workdir):
    save_archive("archive.pt")
    tiny.save_clip("plain.pt", 512, "vit")
    tiny_towers.add_open_clip_config(".")
    tiny_towers.save_open_clip("oc.pt")
    tiny_towers.save_timm("timm", "test_vit.r160_in1k")
    from safetensors.torch import load_file

    (workdir / "data" / "weights").mkdir(parents=True)
    torch.save(load_file("timm/model.safetensors"), "timm.pt")
    for source, target, name in (
        ("archive.pt", "a.pt", "a.pt"),
        ("plain.pt", "b.pt", "b.pt"),
        ("oc.pt", "c.pt", f"open_clip:{tiny_towers.OPEN_CLIP}/c.pt"),
        ("timm.pt", "data/weights/test_vit.r160_in1k.pt", "timm:test_vit.r160_in1k"),
    ):
        rewrite(source, target, lambda name, data: (data, zipfile.ZIP_DEFLATED))
        refused(name, "holds compressed data")


def test_a_tensor_that_promises_more_than_its_bytes_is_refused(workdir):
    state = torch.load(tiny.save_clip("plain.pt", 512, "vit"), weights_only=True)
    for name in ("visual.conv1.weight", "positional_embedding", "text_projection"):
        shape = [100_000, *state[name].shape[1:]]
        torch.save({**state, name: torch.zeros(1).expand(shape)}, "lying.pt")
        refused("lying.pt", f"promises more data than it holds .{name}")
    wide = {**state, "visual.conv1.weight": torch.zeros(200_000, 3, 1, 1), "visual.positional_embedding": torch.zeros(5, 64)}
    torch.save(wide, "wide.pt")  # a few megabytes, whose transformer would have 10^11 numbers
    refused("wide.pt", "does not hold CLIP weights")
    save_archive("archive.pt")

    def lie(name, data):
        return (data[:64] if name.endswith("data/0") else data), zipfile.ZIP_STORED

    rewrite("archive.pt", "short.pt", lie)
    refused("short.pt", "a tensor of size")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with whole encoders of the families that are kept in folders, and the beginnings of their names."""
    import timm
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("families")
    tiny_towers.save_hf_clip(root / "clip")
    tiny_towers.save_hf_siglip2(root / "siglip2")
    tiny_towers.save_hf_dinov2(root / "dino")
    tiny_towers.save_clap(root / "clap")
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=7), root / "timm")
    config = tiny_towers.add_open_clip_config(root)
    (root / "oc").mkdir()
    save_file(tiny_towers.save_open_clip(root / "mine.pt").state_dict(), root / "oc" / "open_clip_model.safetensors")
    shown = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash", "size": 32}
    (root / "oc" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": shown}))
    return root, {"clip": "hf:", "siglip2": "hf:", "dino": "hf:", "clap": "clap:", "timm": "timm:", "oc": "open_clip:"}


def spoil(content, draw):
    """Put something unexpected into one place of a JSON value, in place."""
    inner = [value for value in (content.values() if isinstance(content, dict) else content) if isinstance(value, (dict, list)) and value]
    if inner and draw.random() < 0.6:
        return spoil(draw.choice(inner), draw)
    values = ["x", 10**9, 10**18, -1, 0, 1.5, None, [], {}, [1, 2], True, float("nan"), "\ud800", {"a": {"b": 1}}, 4097, 65536, 10**400]
    place = draw.choice(list(content) if isinstance(content, dict) else range(len(content)))
    if draw.random() < 0.2:
        del content[place]
    else:
        content[place] = draw.choice(values)


BROKEN = [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"a":' * 100_000, b"[" * 200_000, b"{}", b'{"model_type": ["clip"]}']


@pytest.mark.parametrize("kind", ["clip", "siglip2", "dino", "clap", "timm", "oc"])
def test_spoiled_configs_load_or_give_one_line(folders, workdir, kind):
    root, names = folders
    draw, refusals = random.Random(kind), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(16 + len(BROKEN)):
        shutil.rmtree("bad", ignore_errors=True)
        shutil.copytree(root / kind, "bad")
        file = draw.choice(sorted(path for path in Path("bad").glob("*config.json") if "tokenizer" not in path.name))
        if number < len(BROKEN):
            file.write_bytes(BROKEN[number])
        else:
            content = json.loads(file.read_text())
            spoil(content, draw)
            file.write_text(json.dumps(content))
        for load in (load_encoder, load_text_tower):
            try:
                load(names[kind] + "bad")
            except UserError as error:
                refusals += 1
                assert "\n" not in str(error)
    assert refusals > 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


def change(folder, file, **fields):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **fields}))


def test_a_config_larger_than_its_weights_is_refused_before_it_takes_memory(folders, workdir):
    root, _ = folders
    for kind, name, file, fields, words in (
        ("dino", "hf:bad", "config.json", {"hidden_size": 2**14, "num_attention_heads": 16}, "a model of .* numbers for .* bytes"),
        ("dino", "hf:bad", "config.json", {"num_hidden_layers": 10**6}, "says num_hidden_layers 1000000"),
        ("dino", "hf:bad", "preprocessor_config.json", {"crop_size": {"height": 10**6, "width": 10**6}}, "1000000 pixels a side"),
        ("clip", "hf:bad", "preprocessor_config.json", {"crop_size": {"height": 10**9, "width": 10**9}}, "at most"),
        ("siglip2", "hf:bad", "preprocessor_config.json", {"patch_size": 4097}, "patches of 4097 pixels"),
        ("clap", "clap:bad", "preprocessor_config.json", {"fft_window_size": 2**19}, "says fft_window_size"),
        ("timm", "timm:bad", "config.json", {"model_args": {"embed_dim": 2**14}}, "a model of .* numbers for .* bytes"),
    ):
        shutil.rmtree("bad", ignore_errors=True)
        shutil.copytree(root / kind, "bad")
        change(Path("bad"), file, **fields)
        refused(name, words)


def test_no_code_of_a_folder_is_run(folders, workdir):
    root, _ = folders
    shutil.copytree(root / "oc", "oc")
    content = json.loads(Path("oc/open_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    Path("oc/open_clip_config.json").write_text(json.dumps(content))
    refused("open_clip:oc", "has tokenizer_kwargs", load_text_tower)
    shutil.copytree(root / "clip", "clip")
    (workdir / "clip" / "mine.py").write_text(f"open({str(workdir / 'was_run')!r}, 'w')\n")
    change(Path("clip"), "config.json", auto_map={"AutoConfig": "mine.C", "AutoModel": "mine.M"}, model_type="mine")
    change(Path("clip"), "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]}, tokenizer_class="T")
    change(Path("clip"), "preprocessor_config.json", auto_map={"AutoImageProcessor": "mine.P"})
    refused("hf:clip", "clip")
    refused("hf:clip", "clip", load_text_tower)
    assert not (workdir / "was_run").exists()
