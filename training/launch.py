"""Start a script in several processes of this machine that work together.

    python -m training.launch 2 train.py --data train.pkl --out_dir my_train/

torchrun does the same, but ends a user's mistake with a traceback of its own and exit code 1. Here the script's line is the last one, and
its exit code is passed on. torchrun also looks up the machine's own name, and waits for minutes where no server and no file knows it.
"""

import logging
import os
import sys

from common import UserError, one_line_errors

HERE = "127.0.0.1"  # a number, since the machine's own name may lead nowhere


@one_line_errors
def main(argv=None):
    """Start the processes and wait for them; returns the exit code of the first that failed, or 0."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) < 2 or not words[0].isdecimal() or not int(words[0]):
        raise UserError(
            f"found {' '.join(words[:2]) or 'nothing'}; expected a number of processes and a script. Start with 2 train.py, for example."
        )
    logging.disable(logging.ERROR)  # the launcher's notes; the scripts are other processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else the launcher does so, and says it at length
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every process warns that the machine's name has no address
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{HERE}:0", "--local_addr", HERE, "--nproc_per_node", *words])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # ended by signal -code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
