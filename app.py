"""Serve a web page that captions pictures, sounds and folders.

  python app.py --checkpoint ./coco_train/coco_prefix-009.pt
  python app.py --checkpoint first.pt --checkpoint second.pt --port 8000      # captioners side by side
  python app.py                                                               # the models of make demo and make demo-audio

The page is at http://127.0.0.1:7860. Only this machine reaches it, unless --host says otherwise. Where there are no models
of the demo yet, the page offers to make them. docs/page.md describes it, and its endpoint for programs.
"""

import os
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from prediction.captions import add_running_options
from prediction.datastores import add_store_options

ROOT = Path(__file__).resolve().parent
LOOPBACK = "127.0.0.1"
MISSING = "there is no --checkpoint, and no finished demo to take one from"
EXAMPLES = 6


def build_parser():
    """Build the parser of app.py."""
    parser = Parser(prog="app.py", description=__doc__)
    group = parser.add_argument_group("what captions")
    group.add_argument("-C", "--checkpoint", action="append", default=[], metavar="FILE",
                       help="checkpoint, or a folder that python -m models.hub export wrote; repeat it to compare several "
                            "(default: those of the demo)")  # fmt: skip
    group.add_argument("--clip_model_type", metavar="NAME", help="encoder to use instead of the checkpoint's")
    group.add_argument("--examples", metavar="FOLDER", help="folder of pictures that visitors can try (default: those of the demo)")
    group = parser.add_argument_group("the page")
    group.add_argument("--host", default=LOOPBACK, metavar="ADDRESS",
                       help="address to listen on; 0.0.0.0 lets other machines in (default %(default)s)")  # fmt: skip
    group.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen on (default 7860)")
    group.add_argument("--max_upload", type=int, default=50, metavar="MB", help="largest file that may be uploaded, in MB (default 50)")
    add_store_options(parser)
    add_running_options(parser)
    return parser


def check_options(parser, options):
    """Cross-check the options; a mistake ends in one line and exit code 2."""
    if not 1 <= options.port <= 65535:
        parser.error(f"--port is {options.port}; expected 1 to 65535")
    if not 1 <= options.max_upload <= 2000:
        parser.error(f"--max_upload is {options.max_upload}; expected 1 to 2000 MB")
    if options.examples and not Path(options.examples).is_dir():
        parser.error(f"--examples is {options.examples}; expected a folder of pictures")


def find_sources(options):
    """Find the captioners to serve, and pictures to try. Returns a list of page.captioners.Source, empty for none, and paths."""
    demos = [] if options.checkpoint else find_demos()
    if not options.checkpoint and not demos:
        return [], []

    from features.image_ids import PICTURE_SUFFIXES
    from page.captioners import Source

    inside = sorted(Path(options.examples).iterdir()) if options.examples else []
    examples = [path for path in inside if path.suffix.lower() in PICTURE_SUFFIXES]
    if options.checkpoint:
        return [Source(path, options.gpt2_type, options.clip_model_type) for path in options.checkpoint], examples[:EXAMPLES]
    pictures = [] if options.examples else [path for sounds, demo in demos if not sounds for path in demo.heldout]
    return [Source(str(demo.checkpoint), demo.gpt2_type, demo.encoder) for _, demo in demos], (examples or pictures)[:EXAMPLES]


def find_demos():
    """Find finished demos. Returns a list of (whether of sounds, demo.ready.Ready)."""
    from demo.ready import find_demo

    return [(sounds, found) for sounds in (False, True) if (found := find_demo(sounds=sounds)) is not None]


def load_sources(options):
    """Load the captioners to serve. Returns a list of page.captioners.Captioner, empty for none, and pictures to try."""
    sources, examples = find_sources(options)
    if not sources:
        return [], examples

    from models.encoders import pick_device
    from page.captioners import load_captioners

    device = pick_device(options.device)
    return load_captioners(sources, device, options.mixed_precision, options.datastore, options.memory), examples


def demo_command():
    """The command that makes the demo where find_demos looks for it, and what it needs of environment variables."""
    from demo.ready import demo_folder

    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return [sys.executable, "-m", "demo.run", "--folder", str(demo_folder())], {"PYTHONPATH": places}


def make_captioner(options):
    """Serve a page that offers to run the demo, until that has made a captioner.

    Returns:
        What load_sources does, and the page.watched.WatchedRun, to be told when its visitors find the captions in the same place.
    """
    from page.offer import offer_run

    if options.host != LOOPBACK:  # a stranger must not start it
        raise UserError(f"{MISSING}. Run `make demo` (about four minutes), or give --checkpoint.")
    with offer_run(*demo_command(), options.host, options.port) as run:
        print(f"{MISSING}. Open http://{options.host}:{options.port} to run the demo (stop with Ctrl-C)", flush=True)
        while True:
            run.wait_for_success()
            try:
                captioners, examples = load_sources(options)
            except UserError as error:
                run.fail(error)
                continue
            if captioners:
                return captioners, examples, run
            run.fail("it ended, but its models are not where they should be")


@one_line_errors
def main(argv=None):
    """Load the captioners and serve the page until interrupted."""
    parser = build_parser()
    options = parser.parse_args(argv)
    check_options(parser, options)
    captioners, examples = load_sources(options)
    run = None
    if not captioners:
        captioners, examples, run = make_captioner(options)

    from page.serve import serve_page
    from page.worker import Worker

    with serve_page(Worker(captioners), options.host, options.port, options.max_upload, examples) as page:
        if run is not None:
            run.finish()
        print(f"captions by {', '.join(captioner.name for captioner in captioners)} at {page.local_url} (stop with Ctrl-C)", flush=True)
        page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
