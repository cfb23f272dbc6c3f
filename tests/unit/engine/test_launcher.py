"""Launchers of several machines: places, and how one that fails ends the others. Workers here are plain scripts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_cli.engine.contact import Contact
from finetune_cli.plan.launch import free_port

WORKER = """
import os, signal, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
os.write(1, (" ".join(os.environ[name] for name in names) + chr(10)).encode())  # at once: they share a pipe
rank, what = os.environ["RANK"], sys.argv[1]
if what == "wait":
    time.sleep(60)
if what == "die" and rank == "3":
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "die":
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    """Launchers of both machines, each with two workers that do `what`."""
    (tmp_path / "worker.py").write_text(WORKER)
    port, started = free_port(), []

    def launchers(what: str) -> list["subprocess.Popen[str]"]:
        for rank in (0, 1):
            options = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(port), "--nnodes"]
            options += ["2", "--node_rank", str(rank), "--error_file", str(tmp_path / str(rank) / "error.json")]
            command = [sys.executable, "-m", "finetune_cli.engine.launcher", *options, "-m", "worker", what]
            root = Path(__file__).parents[3]
            env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
            started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        return started

    yield launchers
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def message(tmp_path: Path, machine: int) -> str:
    return str(json.loads((tmp_path / str(machine) / "error.json").read_text())["message"])


def test_every_worker_has_its_place(start):
    one, other = start("end")
    assert sorted(one.communicate(timeout=30)[0].splitlines()) == ["0 0 4 2 127.0.0.1", "1 1 4 2 127.0.0.1"]
    assert sorted(other.communicate(timeout=30)[0].splitlines()) == ["2 0 4 2 127.0.0.1", "3 1 4 2 127.0.0.1"]
    assert (one.returncode, other.returncode) == (0, 0)


def test_a_worker_that_dies_ends_all_machines_and_all_say_why(start, tmp_path):
    one, other = start("die")
    assert (one.wait(timeout=50), other.wait(timeout=50)) == (4, 137)
    assert message(tmp_path, 0) == "machine 1: a worker was killed by SIGKILL"


def test_a_launcher_that_is_gone_ends_the_others(start, tmp_path):
    one, other = start("wait")
    assert one.stdout is not None
    assert [one.stdout.readline() for _ in range(2)]
    time.sleep(2)
    other.kill()
    assert one.wait(timeout=50) == 4
    assert message(tmp_path, 0) == "machine 1 is gone: its launcher has ended without a word"


def soon(contact: Contact) -> str | None:
    """What a contact hears within two seconds."""
    return next((said for _ in range(200) if (said := contact.look()) is not None or time.sleep(0.01)), None)


def test_a_machine_that_falls_silent_is_told_of():
    """As with its cable pulled: the connection stands, and nothing comes."""
    now, port = [0.0], free_port()
    contacts = [Contact(rank, 3, "127.0.0.1", port, now=lambda: now[0]) for rank in range(3)]

    def look(*ranks: int) -> list[str | None]:
        return [contacts[rank].look() for rank in ranks]

    for _ in range(3):
        assert look(0, 1, 2) == [None] * 3
    for now[0] in (10.0, 20.0, 29.0):
        assert look(1, 0) == [None] * 2
    now[0] = 33.0
    assert look(1, 0) == [None, "machine 2 has been silent for 30 seconds"]
    assert soon(contacts[1]) == "machine 2 has been silent for 30 seconds"  # the first passes it on
    for contact in contacts:
        contact.close()


def test_a_machine_that_has_ended_well_may_be_silent():
    now, port = [0.0], free_port()
    one, other = (Contact(rank, 2, "127.0.0.1", port, now=lambda: now[0]) for rank in range(2))
    for contact in (one, other, one):
        assert contact.look() is None
    other.close()
    now[0] = 100.0
    assert one.look() is None
    one.close()
