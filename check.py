"""Check feature files before training on them, or describe what is in them.

  python check.py train.pkl val.pkl
  python check.py data/cc3m --sample 5000 --json
  python check.py describe train.pkl

A check looks at numbers, captions, images that are in two files, and whether captions belong to their images. The last one needs the text
tower of the encoder that made the file (CLIP, SigLIP, CLAP). The exit code is 0 when nothing is found, 1 for problems, and 2 for a mistake
in the command. Notes are things to know, not problems.
"""

import functools
import sys

from common import Parser, one_line_errors
from features.check import add_options, run
from features.store import describe


def describe_files(words):
    """Print what feature files say of themselves: `describe FILE ...`."""
    parser = Parser(prog="check.py describe", description="Print the shape, the counts and the meta of feature files.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="Feature files or directories")
    for path in parser.parse_args(words).files:
        print("\n".join(f"{key}: {value}" for key, value in describe(path).items()))
    return 0


@one_line_errors
def main(argv=None):
    """Check feature files, or describe them."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["describe"]:
        return describe_files(words[1:])
    parser = Parser(prog="check.py", description=__doc__)
    add_options(parser)
    parser.add_argument("--device", default="auto", help="Device of the text tower: cpu, cuda, mps or auto (default auto)")
    options = parser.parse_args(words)

    @functools.cache
    def tower(name):
        from models.encoders import pick_device
        from models.encoders.text import load_text_tower

        return load_text_tower(name, str(pick_device(options.device)))

    return run(options, tower)


if __name__ == "__main__":
    sys.exit(main())
