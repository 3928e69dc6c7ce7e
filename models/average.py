"""Average the weights of several checkpoints of one run, so that no epoch has to be chosen.

  python -m models.average out/coco_prefix-0*.pt --last 3 --out out/coco_prefix_average.pt

The mean of the last epochs' weights is usually as good as the best epoch's, and no validation data is needed to choose
(arXiv:1706.03762, section 6.1; arXiv:1803.05407). This works for epochs of one run; the mean of different runs is of no use.
Use the result like any other checkpoint.
"""

import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from models.checkpoints import find_config, save_state
from models.published.recognise import plain_state
from models.tensors import read_tensors


def average_checkpoints(paths):
    """Compute the mean of several checkpoints' weights, in float32.

    Args:
        paths: checkpoints that train.py wrote. Two are in memory at a time, beside the sums.

    Returns:
        dict of name to tensor, in the dtypes of the first file; CaptionConfig of all.

    Raises:
        UserError: a file cannot be read, has no config, or differs from the first in its config, names, shapes or whole numbers.
    """
    first, config = _read(paths[0])
    sums = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in first.items()}
    for path in paths[1:]:
        state, other = _read(path)
        differing = [name for name, value in vars(config).items() if value != getattr(other, name)]
        differing += sorted(set(first) ^ set(state))
        differing += [name for name in first if name in state and not _agree(first[name], state[name])]
        if differing:
            raise UserError(f"{path} differs from {paths[0]} in {', '.join(differing[:5])}; expected epochs of one run.")
        sums = {name: total + state[name] if total.is_floating_point() else total for name, total in sums.items()}
    mean, places = {}, {}
    for name, total in sums.items():
        own = first[name]
        mean[name] = (total / len(paths)).to(own.dtype) if own.is_floating_point() else own
        if not mean[name].isfinite().all():
            raise UserError(f"the mean of {name} is not finite. Leave out the checkpoint with NaN or infinite weights.")
        same = places.setdefault((own.data_ptr(), own.shape), mean[name])  # a tied output layer is the token table, written once
        mean[name] = same if same.equal(mean[name]) else mean[name]
    return mean, config


def _agree(one, other):
    """Whether two weights can be averaged: floating-point numbers of one shape, or equal whole numbers."""
    return one.shape == other.shape and (one.is_floating_point() and other.is_floating_point() or one.equal(other))


def _read(path):
    """Read a checkpoint. Returns its state dict and its config. Raises UserError."""
    content = read_tensors(path)
    config = find_config(content, path)
    if isinstance(config, dict):
        raise UserError(f"{path} has no config; expected a checkpoint that train.py wrote. Published weights cannot be averaged.")
    return plain_state(content, path), config


@one_line_errors
def main(argv=None):
    parser = Parser(prog="python -m models.average", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="checkpoints of one run, in the order of its epochs")
    parser.add_argument("--last", type=int, metavar="N", help="average only the last N of them (default: all)")
    parser.add_argument("--out", required=True, metavar="FILE", help="checkpoint to write")
    options = parser.parse_args(argv)
    if options.last is not None and options.last < 1:
        parser.error(f"--last is {options.last}; expected at least 1")
    if len({Path(path).resolve() for path in options.files}) < len(options.files):
        raise UserError("a checkpoint is given twice. Give each epoch once.")
    if Path(options.out).resolve() in {Path(path).resolve() for path in options.files}:
        raise UserError(f"--out {options.out} is one of the checkpoints. Give another name.")
    files = options.files[-(options.last or len(options.files)) :]
    state, config = average_checkpoints(files)
    save_state(state, config, options.out)
    print(f"wrote {options.out}: the mean of {', '.join(Path(path).name for path in files)}")


if __name__ == "__main__":
    sys.exit(main())
