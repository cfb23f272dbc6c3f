"""Several workers on one machine: PyTorch's own launcher, with the failing worker's exit code and no report of its own.

The worker that failed has written error.json; the parent tells of it once.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        return int(first.exitcode)
    except SignalException as stopped:  # passed on to the workers
        return 128 + int(stopped.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
