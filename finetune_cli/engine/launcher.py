"""The workers of one machine: each with its place in the environment, as PyTorch's launchers set it.

PyTorch's own launcher ends the workers itself when it gets a signal and kills them after 30 seconds, saved or not; it
also imports torch, 3 seconds and 0.3 GiB, to wait. This one passes signals on and waits. A worker that fails takes the
others with it, on other machines too (`contact.py`); its exit code is the run's.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from finetune_cli.engine.contact import LOST, SILENT, Contact
from finetune_cli.engine.signals import CAUGHT, held_back, killed_by
from finetune_cli.errors import MachineError

GRACE = 5.0
"""Seconds that the others have to end by themselves when one has failed."""


ENDED = (0, 130, 143)
"""Exit codes of workers that nothing went wrong with."""


def main(argv: Sequence[str] | None = None) -> int:
    """`--nproc_per_node N --master_addr A --master_port P [--nnodes M --node_rank K] -m MODULE ...`; the exit code of
    the first that failed."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, default in (("nproc_per_node", 1), ("master_port", 0), ("nnodes", 1), ("node_rank", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--master_addr")
    parser.add_argument("--error_file", type=Path)
    argv = sys.argv[1:] if argv is None else argv
    given, worker = parser.parse_args(argv[: argv.index("-m")]), argv[argv.index("-m") :]
    here = given.nproc_per_node
    place = {"MASTER_ADDR": given.master_addr, "MASTER_PORT": given.master_port, "WORLD_SIZE": here * given.nnodes}
    place |= {"LOCAL_WORLD_SIZE": here, "GROUP_RANK": given.node_rank}
    place |= interface(given.master_addr) if given.nnodes > 1 else {}
    workers: list[subprocess.Popen[bytes]] = []
    with held_back():
        for local in range(here):
            own = {**place, "RANK": given.node_rank * here + local, "LOCAL_RANK": local}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            workers.append(subprocess.Popen([sys.executable, *worker], env=environment))

        def forward(number: int, _: FrameType | None) -> None:
            for worker in workers:
                if worker.poll() is None:
                    worker.send_signal(number)

        for number in CAUGHT:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
    if given.nnodes == 1:
        return wait(workers)
    contact = Contact(given.node_rank, given.nnodes, given.master_addr, given.master_port + 1)
    return together(workers, contact, given.error_file)


def wait(workers: Sequence["subprocess.Popen[bytes]"], contact: Contact | None = None) -> int:
    """Until all have ended; after the first failure the others are asked to, and then made to. Raises MachineError
    where another machine ends the run."""
    failed, since = 0, 0.0
    while any(worker.poll() is None for worker in workers):
        codes = [code for worker in workers if (code := worker.poll()) is not None and code != 0]
        if codes and not failed:
            failed, since = codes[0], time.monotonic()
        if failed and time.monotonic() - since > GRACE:
            end(workers)
        said = contact.look() if contact is not None and not failed else None
        if said is not None:
            end(workers)
            raise MachineError(said)
        time.sleep(0.1)
    codes = [code for worker in workers if (code := worker.poll())]
    code = failed or (codes[0] if codes else 0)
    return 128 - code if code < 0 else code


def end(workers: Sequence["subprocess.Popen[bytes]"]) -> None:
    """At once: what waits for another process hears no signal. Checkpoints have their name when they are whole."""
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


# ── several machines ──────────────────────────────────────────────────────────────────────────────────────────────────


def together(workers: Sequence["subprocess.Popen[bytes]"], contact: Contact, error_file: Path) -> int:
    """`wait`, in touch with the other machines. Whoever failed first is the one that is told of, on every machine."""
    try:
        code = wait(workers, contact)
    except MachineError as error:
        leave_word(error_file, error.message)
        return MachineError.exit_code
    if code in ENDED:
        contact.close()
        return code
    killed = killed_by(code)
    own = f"a worker was killed by {killed.name}" if killed is not None else told(error_file)
    if own is not None and own.startswith(LOST):  # another machine's failure looks like this from here: it will say why
        until = time.monotonic() + SILENT + GRACE
        while time.monotonic() < until:
            said = contact.look()
            if said is not None:
                leave_word(error_file, said)
                return MachineError.exit_code
            time.sleep(0.1)
    contact.tell(f"machine {contact.rank}: {own or f'a worker ended with exit code {code} and left no word'}")
    time.sleep(1)  # the first machine passes it on
    return code


def interface(address: str) -> dict[str, str]:
    """The network that leads to the first machine, where nothing else is said: libraries go by the host's name, which
    often leads nowhere."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((address, 1))  # sends nothing
        except OSError:
            return {}
        own = s.getsockname()[0]
    on = [name for name, known in psutil.net_if_addrs().items() if any(a.address == own for a in known)]
    return {key: on[0] for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if on and key not in os.environ}


def told(error_file: Path) -> str | None:
    """The message that a worker of this machine left."""
    return str(json.loads(error_file.read_text(encoding="utf-8"))["message"]) if error_file.exists() else None


def leave_word(error_file: Path, message: str) -> None:
    hint = "Look at that machine and the network; go on from the last checkpoint with --resume, on every machine."
    error_file.parent.mkdir(parents=True, exist_ok=True)
    error_file.write_text(json.dumps(MachineError(message, hint).to_json(), indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
