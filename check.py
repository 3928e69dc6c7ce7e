"""Check feature files before training on them: numbers, captions, images in two splits, and whether captions belong to their images.

  python check.py train.pkl val.pkl
  python check.py data/cc3m --sample 5000 --json

The last check needs the text tower of the encoder that made the file (CLIP, SigLIP, CLAP), under the name the file holds or
--clip_model_type. Exit code 0: nothing found; 1: problems; 2: the command was wrong. Notes are things to know, not problems.
"""

import functools
import sys

from common import Parser, one_line_errors
from features.check import add_options, run


@one_line_errors
def main(argv=None):
    parser = Parser(prog="check.py", description=__doc__)
    add_options(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto, for the text tower (default auto)")
    options = parser.parse_args(argv)

    @functools.cache
    def tower(name):
        from models.encoders import pick_device
        from models.encoders.text import load_text_tower

        return load_text_tower(name, str(pick_device(options.device)))

    return run(options, tower)


if __name__ == "__main__":
    sys.exit(main())
