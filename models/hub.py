"""The way out: what a checkpoint file is, and a folder that huggingface_hub can publish.

DIR holds config.json ("model": the fields of CaptionConfig), model.safetensors (published names; a base captioner under
original_model.*; LoRA merged), tokenizer/ and README.md. `ClipCaptionModel.from_pretrained(DIR)` reads it, and the same folder on the
hub by its name; `model.push_to_hub(NAME)` puts it there.
"""

import dataclasses
import json
from pathlib import Path

from common import Parser, UserError, one_line_errors, replace_file

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"


def describe_checkpoint(path, gpt2_type=None):
    """What a checkpoint file is → text of several lines: kind, parts with their parameters, config. No model is built."""
    from models.checkpoints import open_checkpoint

    found = open_checkpoint(path, gpt2_type)
    parts = {"mapper": "clip_project.", "language model": "gpt."}
    counts = {what: sum(t.numel() for name, t in found.state.items() if name.startswith(start)) for what, start in parts.items()}
    head, table = found.state.get("gpt.lm_head.weight"), found.state.get("gpt.transformer.wte.weight")
    if head is not None and table is not None and head.shape == table.shape:
        import torch

        if torch.equal(head, table):
            counts["language model"] -= head.numel()  # one matrix, written twice
    counts["adapters (merged when loaded)"] = sum(a.numel() + b.numel() for a, b in found.adapters.values())
    counts["base captioner"] = sum(t.numel() for t in found.base.state.values()) if found.base else 0
    counts["vision tower"] = sum(t.numel() for t in found.vision.values()) if found.vision else 0
    lines = [f"{found.path}: {found.kind}", f"  {Path(found.path).stat().st_size / 2**20:,.1f} MB"]
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in found.state.values()})
    lines += [f"  {what}: {count:,} parameters" for what, count in counts.items() if count]
    if not counts["language model"]:
        lines.append(f"  no language model inside: it is {found.config.gpt2_type}, frozen")
    lines += [f"  stored as {', '.join(dtypes)}", "  config:"]
    for field in dataclasses.fields(found.config):
        value = getattr(found.config, field.name)
        if field.name in ("gpt_config", "base") and value:
            value = ", ".join(f"{key} {item}" for key, item in value.items() if not isinstance(item, (dict, list)) and item is not None)
        lines.append(f"    {field.name}: {value}")
    return "\n".join(lines)


def write_pretrained(model, folder):
    """Write a captioner into `folder`, made if need be: config, weights as safetensors, tokenizer. Raises UserError when it cannot."""
    from safetensors.torch import save_file

    from models.checkpoints import trained_state

    folder = Path(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(model, full=True).items()}
    for prefix, part in (("", model), ("original_model.", model.base_model)):
        if part is not None and part.gpt.config.tie_word_embeddings:
            state.pop(f"{prefix}gpt.lm_head.weight", None)  # the token table, written once
    with replace_file(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    with replace_file(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps({"model": dataclasses.asdict(model.config)}, indent=2) + "\n", encoding="utf-8")
    model.tokenizer.save_pretrained(str(folder / TOKENIZER))


def read_pretrained(source, revision=None, cache_dir=None, force_download=False, local_files_only=False, token=None, **more):
    """Read what write_pretrained wrote, from a folder or the hub → ClipCaptionModel in eval mode.

    more: what huggingface_hub passes on from config.json, which is read here anyway.
    Raises UserError when a file is missing or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from models.checkpoints import build_captioner, read_config
    from models.published.recognise import recognise
    from models.weights import load_tokenizer

    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                str(source), revision=revision, cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only,
                token=token,
            )
        )  # fmt: skip
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; expected what `python -m models.checkpoints export FILE DIR` writes.")
    config = read_config(folder / CONFIG)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}). Export it again.") from error
    found = recognise(state, folder / WEIGHTS, config)
    tokenizer = load_tokenizer(str(folder / TOKENIZER)) if (folder / TOKENIZER).is_dir() else None
    return build_captioner(found, tokenizer=tokenizer).eval()


@one_line_errors
def main(argv=None):
    """python -m models.checkpoints describe FILE | export FILE DIR"""
    parser = Parser(prog="python -m models.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="describe | export")
    describe = commands.add_parser("describe", help="print what a checkpoint file is")
    export = commands.add_parser("export", help="write config.json and model.safetensors, for from_pretrained")
    for command in (describe, export):
        command.add_argument("file", metavar="FILE", help="checkpoint, ours or a published one")
        command.add_argument("--gpt2_type", help="language model whose heads and tokenizer it has, where the file does not tell")
    export.add_argument("dir", metavar="DIR", help="folder to write into")
    options = parser.parse_args(argv)
    if options.command == "describe":
        print(describe_checkpoint(options.file, options.gpt2_type))
        return 0
    from models.checkpoints import load_checkpoint

    if Path(options.dir).is_file():
        raise UserError(f"{options.dir} is a file; expected a folder to write into.")
    model = load_checkpoint(options.file, options.gpt2_type)
    model.save_pretrained(options.dir)
    print(f'wrote {options.dir}: ClipCaptionModel.from_pretrained("{options.dir}") reads it')
    return 0
