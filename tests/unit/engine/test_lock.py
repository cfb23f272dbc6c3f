"""One run per folder, whoever dies and however."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from finetune_cli.engine import lock as module
from finetune_cli.engine.lock import NAME, RunLock
from finetune_cli.errors import RecipeError

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom finetune_cli.engine.lock import RunLock\n"
    "lock = RunLock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(100)"
)
RACE = (
    "import sys, time\nfrom pathlib import Path\nfrom finetune_cli.engine.lock import RunLock\n"
    "from finetune_cli.errors import RecipeError\n"
    "while time.time() < float(sys.argv[2]): pass\n"
    "try:\n  lock = RunLock(Path(sys.argv[1])); print('won', flush=True); time.sleep(1)\n"
    "except RecipeError: print('lost')"
)


def start(script, *arguments):
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_held_is_refused_and_released_is_free(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(RecipeError, match=f"another run .process {os.getpid()} on .* is writing to") as caught:
        RunLock(tmp_path)
    assert caught.value.exit_code == 2
    lock.release()
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path).release()


def test_lock_of_a_killed_process_is_taken_over(tmp_path, caplog):
    holder = start(HOLD, tmp_path)
    holder.stdout.readline()
    with pytest.raises(RecipeError, match=str(holder.pid)):
        RunLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with caplog.at_level("WARNING", logger="finetune_cli"):
        RunLock(tmp_path).release()
    assert f"process {holder.pid}" in caplog.text
    assert "taken over" in caplog.text


def test_a_child_holds_it_when_its_parent_is_gone(tmp_path):
    """The worker goes on writing when the command that started it was killed."""
    lock = RunLock(tmp_path)
    child = subprocess.Popen(["sleep", "100"], pass_fds=(lock.descriptor,))
    lock._released.set()  # it is dead, so gives no sign of life either
    os.close(lock.file)
    with pytest.raises(RecipeError):
        RunLock(tmp_path)
    child.kill()
    child.wait()
    RunLock(tmp_path).release()


@pytest.mark.parametrize(("age", "refused"), [(10, True), (50, True), (70, False), (100000, False)])
def test_a_holder_on_another_machine_is_alive_while_it_gives_signs(tmp_path, age, refused):
    """The lock of the kernel is not seen from here; the time of the file is."""
    (tmp_path / NAME).write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "then"}))
    then = time.time() - age
    os.utime(tmp_path / NAME, (then, then))
    if refused:
        with pytest.raises(RecipeError, match="process 1 on elsewhere") as caught:
            RunLock(tmp_path)
        assert "seconds" in caught.value.hint
    else:
        RunLock(tmp_path).release()


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    lock = RunLock(tmp_path)
    os.utime(tmp_path / NAME, (0, 0))
    until = time.monotonic() + 20
    while (tmp_path / NAME).stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert (tmp_path / NAME).stat().st_mtime > 0
    lock.release()


@pytest.mark.parametrize("left", [None, "", "{", '{"host": 1}', "[]"])
def test_a_race_has_one_winner(tmp_path, left):
    """Whatever a dead process left in the file."""
    if left is not None:
        (tmp_path / NAME).write_text(left)
    racers = [start(RACE, tmp_path, time.time() + 1.5) for _ in range(4)]
    said = sorted(racer.communicate()[0].strip() for racer in racers)
    assert said == ["lost", "lost", "lost", "won"]
