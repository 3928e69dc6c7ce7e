"""Captioners on the Hugging Face Hub, and what a checkpoint file is.

  python -m models.hub describe FILE          print what a checkpoint file is
  python -m models.hub export FILE DIR        write a folder for HubCaptionModel.from_pretrained(DIR)

DIR holds config.json ("model": the fields of CaptionConfig), model.safetensors (published names; a base captioner under
original_model.*; LoRA merged), tokenizer/ and README.md, a model card. HubCaptionModel.from_pretrained reads it, or the same files on the
hub by their name. `model.push_to_hub(NAME)` puts them there. `export` also writes a ready Space: `python DIR/app.py` starts the page.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin

from common import Parser, UserError, one_line_errors, replace_file
from models.captioner import ClipCaptionModel
from models.checkpoints import build_captioner, open_checkpoint, read_config
from models.published.recognise import recognise
from models.space import describe_for_card, version_of, write_space
from models.state_dicts import BASE, trained_state
from models.weights import load_tokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
MODEL_CARD = """---
{{ card_data }}
---

A captioner made with PrefixCap: a mapper from image embeddings to a prefix of a language model.

```python
from models.hub import HubCaptionModel

model = HubCaptionModel.from_pretrained("this folder, or its name on the hub")
```
{% if scores %}
## Scores

Computed by evaluate.py{% if images %} on {{ images }} images{% endif %}, times 100.

| metric | score |
|---|---|
{% for name, value in scores %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}{% if samples %}
## Samples

| caption | one of its references |
|---|---|
{% for caption, reference in samples %}| {{ caption }} | {{ reference }} |
{% endfor %}{% endif %}{% if command %}
## Training

```
{{ command }}
```
{% endif %}"""
SPACE = {"title": "PrefixCap", "sdk": "gradio", "app_file": "app.py"}  # what a Space reads from the head of its README.md


class HubCaptionModel(
    ClipCaptionModel,
    ModelHubMixin,
    library_name="prefixcap",
    pipeline_tag="image-to-text",
    tags=["prefixcap", "clipcap"],
    model_card_template=MODEL_CARD,
):
    """A captioner with huggingface_hub's `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    @classmethod
    def from_checkpoint(cls, path, gpt2_type=None):
        """Build one from a checkpoint file; arguments and errors as in models.checkpoints.load_checkpoint."""
        return build_captioner(open_checkpoint(path, gpt2_type), gpt2_type, model_class=cls).eval()

    def _save_pretrained(self, save_directory):
        """Write config, weights and tokenizer into a folder."""
        from safetensors.torch import save_file

        folder = Path(save_directory)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(self, full=True).items()}
        base = self.base_captioner.model if self.base_captioner else None
        for prefix, part in (("", self), (BASE, base)):
            if part is not None and part.gpt.config.tie_word_embeddings:
                state.pop(f"{prefix}gpt.lm_head.weight", None)  # the same matrix as the token table
        with replace_file(folder / WEIGHTS) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        with replace_file(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps({"model": dataclasses.asdict(self.config)}, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(str(folder / TOKENIZER))

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision=None, cache_dir=None, force_download=False, local_files_only=False, token=None, **others
    ):
        """Read a folder, or its files on the hub; `others` is what huggingface_hub read from config.json, which is read again here."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(model_id)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(
                snapshot_download(
                    str(model_id), revision=revision, cache_dir=cache_dir, force_download=force_download,
                    local_files_only=local_files_only, token=token,
                )
            )  # fmt: skip
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder} has no {name}; expected what `python -m models.hub export FILE DIR` writes.")
        config = read_config(folder / CONFIG)
        try:
            state = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / WEIGHTS} cannot be read ({error}). Export it again.") from error
        found = recognise(state, folder / WEIGHTS, config)
        tokenizer = load_tokenizer(str(folder / TOKENIZER)) if (folder / TOKENIZER).is_dir() else None
        return build_captioner(found, tokenizer=tokenizer, model_class=cls).eval()


def describe_checkpoint(path, gpt2_type=None):
    """Describe a checkpoint file in several lines: kind, parameters of each part, config. No model is built."""
    found = open_checkpoint(path, gpt2_type)
    counts = {
        "mapper": _count(tensor for name, tensor in found.state.items() if name.startswith("clip_project.")),
        "language model": _count(tensor for name, tensor in found.state.items() if name.startswith("gpt.")),
        "adapters (merged when loaded)": _count(matrix for pair in found.adapters.values() for matrix in pair),
        "base captioner": _count(found.base.state.values()) if found.base else 0,
        "vision tower": _count(found.vision.values()) if found.vision else 0,
    }
    head, table = found.state.get("gpt.lm_head.weight"), found.state.get("gpt.transformer.wte.weight")
    if head is not None and table is not None and torch.equal(head, table):
        counts["language model"] -= head.numel()  # one matrix, written twice
    lines = [f"{found.path}: {found.kind}", f"  {Path(found.path).stat().st_size / 2**20:,.1f} MB"]
    lines += [f"  {part}: {count:,} parameters" for part, count in counts.items() if count]
    if not counts["language model"]:
        lines.append(f"  no language model inside: it is {found.config.gpt2_type}, frozen")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.state.values()})
    lines += [f"  stored as {', '.join(dtypes)}", "  config:"]
    for name, value in vars(found.config).items():
        if name in ("gpt_config", "base", "retrieval", "text_training") and value:
            value = ", ".join(f"{key} {item}" for key, item in value.items() if not isinstance(item, (dict, list)) and item is not None)
        lines.append(f"    {name}: {value}")
    return "\n".join(lines)


def _count(tensors):
    """Numbers in several tensors."""
    return sum(tensor.numel() for tensor in tensors)


@one_line_errors
def main(argv=None):
    parser = Parser(prog="python -m models.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="describe | export")
    describe = commands.add_parser("describe", help="print what a checkpoint file is")
    export = commands.add_parser("export", help="write a folder for HubCaptionModel.from_pretrained")
    for command in (describe, export):
        command.add_argument("file", metavar="FILE", help="checkpoint, ours or a published one")
        command.add_argument("--gpt2_type", help="language model that gives number of heads and tokenizer (default: as the file says)")
    export.add_argument("dir", metavar="DIR", help="folder to write into")
    export.add_argument("--scores", metavar="FILE", help="file that evaluate.py --out wrote, for scores and samples in the model card")
    options = parser.parse_args(argv)
    if options.command == "describe":
        print(describe_checkpoint(options.file, options.gpt2_type))
        return 0
    if Path(options.dir).is_file():
        raise UserError(f"{options.dir} is a file; expected a folder to write into.")
    model = HubCaptionModel.from_checkpoint(options.file, options.gpt2_type)
    about = describe_for_card(model.origin.path, options.scores)
    model.save_pretrained(options.dir)
    card = model.generate_model_card(**about)
    for name, value in (SPACE | {"sdk_version": version_of("gradio")}).items():
        setattr(card.data, name, value)
    with replace_file(Path(options.dir) / "README.md") as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    print(f'wrote {options.dir}: HubCaptionModel.from_pretrained("{options.dir}") reads it')
    if model.config.retrieval:
        print(f"no Space: its prompts need a datastore. python app.py --checkpoint {options.dir} --datastore FILE starts its page")
    else:
        write_space(options.dir, model)
        print(f"python {options.dir}/app.py starts its page")
    return 0


if __name__ == "__main__":
    sys.exit(main())
