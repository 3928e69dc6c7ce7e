"""What a run and its evaluation left, read and checked before any of it is shown."""

import functools
import json
from pathlib import Path

from common import UserError
from features.schema import check_structure

EXPECTED = {
    "scores": "what evaluate.py --out wrote",
    "captions": "the captions that evaluate.py wrote beside its scores",
    "config": "what train.py wrote beside its checkpoints",
    "log": "the log that train.py wrote, a JSON object per line",
    "samples": "the samples that train.py wrote, a JSON object per line",
}


@functools.cache
def _schemas():
    """Build the schemas, once. Of numbers and texts that are only shown, any is taken."""
    from pydantic import Field, StrictFloat, StrictInt, StrictStr, TypeAdapter
    from typing_extensions import Annotated, NotRequired, TypedDict

    real = StrictFloat | Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
    number = real | None
    plain = number | StrictStr
    numbers = dict[str, number]
    made_by = TypedDict("made_by", {
        "command": NotRequired[StrictStr], "seed": NotRequired[plain], "arguments": NotRequired[dict], "versions": NotRequired[dict],
        "sha256": NotRequired[dict], "data": NotRequired[TypedDict("data", {"files": NotRequired[list], "digest": NotRequired[plain]})],
    })  # fmt: skip
    scores = TypedDict("scores", {
        "scores": numbers, "predictions_file": StrictStr, "intervals": NotRequired[dict[str, list[number]]],
        "captions": NotRequired[numbers], "domains": NotRequired[dict[str, numbers]], "notes": NotRequired[list[StrictStr]],
        "made_by": NotRequired[made_by],
        **dict.fromkeys(("images", "split", "tokeniser", "predictions", "references"), NotRequired[plain]),
    })  # fmt: skip
    shown = {"image_id": plain, "caption": StrictStr, "file_name": NotRequired[plain]}
    caption = TypedDict("caption", {**shown, "references": list[StrictStr], "metrics": numbers})
    sample = TypedDict("sample", {**shown, "step": StrictInt, "reference": StrictStr, "cider": number})
    names = ("loss", "lr", "val_loss", "val_gap", "val_cider", "val_distinct", "val_ended")
    line = TypedDict("line", {
        "step": StrictInt, "epoch": number, "val_collapse": NotRequired[StrictStr | None],
        **dict.fromkeys(names, NotRequired[real]),
    })  # fmt: skip
    config = TypedDict("config", {"model": NotRequired[dict], "made_by": NotRequired[made_by]})
    kinds = {"scores": scores, "captions": list[caption], "config": config, "log": list[line], "samples": list[sample]}
    return {name: TypeAdapter(kind) for name, kind in kinds.items()}


def read_json(path):
    """Read a JSON file. Raises UserError where there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}. Check the path.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}).") from error


def read_checked(path, kind):
    """Read a JSON file and check it. kind: a key of EXPECTED. Raises UserError where it is something else."""
    return check_structure(_schemas()[kind], read_json(path), path, EXPECTED[kind])


def read_lines(path, kind):
    """Read a .jsonl file as a list of dicts, checked; a last line that a running job has not finished is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return check_structure(_schemas()[kind], lines, path, EXPECTED[kind])


def find_scores(out_dir, given):
    """Read the score files that were given, or else those in the folder.

    Returns:
        List of (path, content).

    Raises:
        UserError: a file that was given holds no scores, or one of them is damaged.
    """
    found = []
    for path in map(Path, given) if given else sorted(Path(out_dir).glob("*.json")):
        content = read_json(path) if given or path.stat().st_size else None
        if isinstance(content, dict) and isinstance(content.get("scores"), dict) and "predictions_file" in content:
            found.append((path, check_structure(_schemas()["scores"], content, path, EXPECTED["scores"])))
        elif given:
            raise UserError(f"{path} holds no scores; expected {EXPECTED['scores']}.")
    return found
