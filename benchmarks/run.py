"""Compare the published recipe with ours, taking turns in one process on the same work: ratios, rates, peak memory.

    python -m benchmarks.run                         everything on the CPU: five to nine minutes on two cores (make bench)
    python -m benchmarks.run --only train --repeats 5
    python -m benchmarks.run --device cuda           the same on a GPU

Networks have full size (ViT-B/32, GPT-2) and random weights; caption lengths are COCO's (benchmarks/lengths.json). Nothing is downloaded.
It prints a table with the floor and the aim of each ratio, and writes benchmarks/results/{machine}.json. See benchmarks/README.md.
"""

import json
import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

from common import Parser, UserError, one_line_errors, replace_file

HERE = Path(__file__).resolve().parent
SECTIONS = ("features", "train", "decode", "memory")
# Ratios to reach on a CPU: floor and aim.
FLOORS = {
    "train mlp images fp32": (3.5, 4.5),
    "train transformer images fp32": (7, 9),
    "train transformer images bf16": (11, 15),
    "features fp32": (7, 10),
    "features bf16": (14, 20),
    "beam fp32": (9, 14),
    "beam bf16": (15, 25),
    "greedy fp32": (20, 30),
    "memory mlp fp32": (1, None),
    "memory mlp bf16": (1, None),
    "memory transformer fp32": (2, None),
    "memory transformer bf16": (2, None),
}
# Rates to reach on one H200: what is measured, its row, floor, aim.
GPU_FLOORS = (
    ("features, ViT-B/32, images/s", "features bf16", 1500, 3000),
    ("beam 5, captions/s", "beam bf16", 300, 1500),
    ("training, captions/s for 10 epochs of COCO in 10 (5) minutes", "train mlp images bf16 400", 9446, 18892),
    ("the same, frozen GPT-2", "train transformer images bf16 400", 9446, 18892),
)
BUSY = 0.05  # share of the cores used by other programs above which the figures are not reliable


def table(rows):
    """Format the rows of benchmarks/sections.py as lines of text, with floor and aim."""
    heading = ("", "published", "ours", "", "ratio", "low to high", "floor", "aim", "", "of matmul rate", "equal")
    lines = [heading]
    for row in rows:
        floor, aim = FLOORS.get(row["row"], (None, None))
        met = "" if floor is None else "below" if row["ratio"] < floor else "aim" if aim and row["ratio"] >= aim else "floor"
        shown = [f"{number:g}×" if number else "" for number in (floor, aim)]
        if row["unit"] == "MB":
            cells = [f"{row['published_mb']:,}", f"{row['ours_mb']:,}", "MB above the model", f"{row['ratio']:.1f}×"]
            cells += ["", *shown, met, "", ""]
        else:
            equal = "" if row["equal"] is None else row["compared"] if row["equal"] else f"NOT EQUAL: {row['compared']}"
            spread = f"{row['lowest']:.1f} to {row['highest']:.1f}"
            speeds = [f"{row[side]:.3g}" for side in ("published_per_s", "ours_per_s")]
            share = f"{row['share_of_matmul_rate']:.0%}"
            cells = [*speeds, f"{row['unit']}/s", f"{row['ratio']:.1f}×", spread, *shown, met, share, equal]
        lines.append((row["row"], *cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    to_the_left = [True, False, False, True, False, True, False, False, True, False, True]
    aligned = [[cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(line, widths, to_the_left)] for line in lines]
    return ["  ".join(cells).rstrip() for cells in aligned]


def gpu_table(rows, device):
    """Format the rates that a GPU has to reach as lines of text."""
    by_name = {row["row"]: row for row in rows}
    lines = []
    for what, name, floor, aim in GPU_FLOORS:
        measured = device == "cuda" and name in by_name
        found = f"{by_name[name]['ours_per_s']:,.0f}" if measured else "not measured here"
        lines.append(f"GPU: {what}: {found} (floor {floor:,}, aim {aim:,} on one H200)")
    return lines


def file_name(machine):
    """Turn "AMD EPYC, 2 cores" into "amd-epyc-2-cores"."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def build_parser():
    """Build the parser of benchmarks.run."""
    parser = Parser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to measure (default: all)")
    parser.add_argument("--repeats", type=int, metavar="N",
                        help="number of rounds in which each side runs once (default 3; 2 for the slowest rows on a CPU)")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=os.environ.get("PREFIXCAP_DATA", "../shared/data"),
                        help="folder with coco_mini/train2017 (default $PREFIXCAP_DATA); else pictures are drawn")  # fmt: skip
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/{machine}.json)")
    return parser


def measure(sections, device, repeats, data, scale=None, say=print):
    """Measure the named sections. Returns a dict of plain values."""
    import torch
    import transformers

    from benchmarks import work
    from benchmarks.sections import SECTIONS as rows_of
    from benchmarks.sections import Context
    from models.operators import keep_freed_memory

    watch, began = work.OthersWatch(), time.time()
    if device == "cpu":
        keep_freed_memory()  # a setting of the process: both sides gain
    rates = {"fp32": work.matmul_rate(device, torch.float32), "bf16": work.matmul_rate(device, torch.bfloat16)}
    say(f"square matrix products: {rates['fp32'] / 1e9:,.0f} GFLOP/s in fp32, {rates['bf16'] / 1e9:,.0f} in bf16", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="prefixcap.") as folder:
        context = Context(scale or (work.GPU_SCALE if device == "cuda" else work.Scale()), device, repeats, rates, Path(folder), Path(data))
        pictures = work.find_pictures(folder, data, context.scale.pictures)[1] if "features" in sections else None
        for section in sections:
            for row in rows_of[section](context):
                rows.append(row)
                say(f"  {row['row']}: {row['ratio']:.2f}×", flush=True)
    return {
        "machine": work.machine_name(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.localtime(began)),
        "seconds": round(time.time() - began),
        "commit": work.commit(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__},
        "repeats": repeats,
        "pictures": pictures,
        "matmul_gflops": {name: round(rate / 1e9) for name, rate in rates.items()},
        "share_of_cores_taken_by_others": watch.share(),
        "rows": rows,
    }


@one_line_errors
def main(argv=None):
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; expected at least 1")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU. Use --device cpu")
    results = measure([name for name in SECTIONS if name in options.only], options.device, options.repeats, options.data)
    results["command"] = shlex.join(["python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)])
    out = options.out or HERE / "results" / f"{file_name(results['machine'])}.json"
    with replace_file(out) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{results['machine']}, {results['threads']} threads, torch {results['versions']['torch']}, {results['seconds']} s")
    print("\n".join(table(results["rows"]) + gpu_table(results["rows"], options.device)))
    others = results["share_of_cores_taken_by_others"]
    if others is not None and others > BUSY:
        print(f"other programs used {others:.0%} of the cores meanwhile: measure again on an idle machine")
    print(f"wrote {out}")
    unequal = [row["row"] for row in results["rows"] if row.get("equal") is False]
    if unequal:
        raise UserError(f"the two sides differ in {', '.join(unequal)}: the ratios compare different things.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
