"""A first signal is a wish, a second an order, and the same one told twice is one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from finetune_cli.engine.signals import TOGETHER, Stop, exit_code

PROCESS = """
import signal, sys, time
from finetune_cli import log
from finetune_cli.engine.signals import Stop
log.setup()
stop = Stop()
stop.patient = sys.argv[1] == "patient"
stop.listen()
print("listens", flush=True)
while not stop.wanted: time.sleep(0.02)
if sys.argv[2] == "stuck": time.sleep(60)
print("saved", flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_exit_codes(number, code):
    assert exit_code(number) == code


def test_what_comes_together_is_one_request(monkeypatch):
    left = []
    monkeypatch.setattr("finetune_cli.engine.signals.leave", left.append)
    stop = Stop()
    stop.patient = True
    for now in (10.0, 10.1, 10 + TOGETHER):
        stop.hear(signal.SIGINT, now)
    assert (stop.number, left) == (signal.SIGINT, [])
    stop.hear(signal.SIGTERM, 10.1 + TOGETHER)
    assert left == [signal.SIGTERM]


def test_before_there_is_anything_to_save_the_first_ends_it(monkeypatch):
    left = []
    monkeypatch.setattr("finetune_cli.engine.signals.leave", left.append)
    Stop().hear(signal.SIGUSR1, 10.0)
    assert left == [signal.SIGUSR1]


def test_a_process_whose_parent_is_gone_ends(monkeypatch):
    stop = Stop()
    stop.patient = True
    assert not stop.wanted
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.wanted
    assert stop.number == signal.SIGTERM


@pytest.mark.parametrize(
    ("patience", "state", "sent", "code", "said"),
    [
        ("patient", "free", [signal.SIGTERM], 7, "saved"),
        ("patient", "free", [signal.SIGINT] * 30, 7, "saved"),
        ("hasty", "free", [signal.SIGINT], 130, ""),
        ("patient", "stuck", [signal.SIGUSR1, TOGETHER + 0.3, signal.SIGTERM], 143, ""),
        ("patient", "stuck", [signal.SIGTERM, TOGETHER + 0.3, signal.SIGINT], 130, ""),
    ],
)
def test_of_a_process(patience, state, sent, code, said):
    command = [sys.executable, "-c", PROCESS, patience, state]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listens\n"
    for each in sent:
        time.sleep(each) if isinstance(each, float) else process.send_signal(each)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out.strip()) == (code, said)
    assert "Traceback" not in err
