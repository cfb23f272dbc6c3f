"""Several workers on one machine: each with its place in the environment, as PyTorch's launchers set it.

PyTorch's own launcher ends the workers itself when it gets a signal and kills them after 30 seconds, saved or not; it
also imports torch, 3 seconds and 0.3 GiB, to wait. This one passes signals on and waits. A worker that fails takes the
others with it; its exit code is the run's.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from finetune_cli.engine.signals import CAUGHT, held_back

GRACE = 5.0
"""Seconds that the others have to end by themselves when one has failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """`--nproc_per_node N --master_addr A --master_port P -m MODULE ...`; the exit code of the first that failed."""
    argv = sys.argv[1:] if argv is None else argv
    given = dict(zip(argv[0:6:2], argv[1:6:2], strict=True))
    world = int(given["--nproc_per_node"])
    place = {"MASTER_ADDR": given["--master_addr"], "MASTER_PORT": given["--master_port"]}
    workers: list[subprocess.Popen[bytes]] = []
    with held_back():
        for rank in range(world):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            environment = {**os.environ, **place, **{name: str(value) for name, value in own.items()}}
            workers.append(subprocess.Popen([sys.executable, *argv[6:]], env=environment))

        def forward(number: int, _: FrameType | None) -> None:
            for worker in workers:
                if worker.poll() is None:
                    worker.send_signal(number)

        for number in CAUGHT:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
    return wait(workers)


def wait(workers: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Until all have ended; after the first failure the others are asked to, and then made to."""
    failed, since = 0, 0.0
    while any(worker.poll() is None for worker in workers):
        codes = [code for worker in workers if (code := worker.poll()) is not None and code != 0]
        if codes and not failed:
            failed, since = codes[0], time.monotonic()
        if failed and time.monotonic() - since > GRACE:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
        time.sleep(0.1)
    codes = [code for worker in workers if (code := worker.poll())]
    code = failed or (codes[0] if codes else 0)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
