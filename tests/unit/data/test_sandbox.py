"""The process in which templates run: bounds on time, memory and output, deaths, and that nothing of it is left."""

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from finetune_cli.data.chat import Chat
from finetune_cli.data.render import bounded
from finetune_cli.data.sandbox import STRIKES, Sandbox
from finetune_cli.errors import DataError
from tests.helpers import CHATML, said, tiny_tokenizer, trained_texts

HOSTILE = {
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}": r"more than 0.3 s of CPU time",
    "{{ 'a' * 20000000 }}": "it renders 20000000 characters",
    "{% for i in range(90000) %}{% for j in range(90000) %}aaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}": "0.3 s of CPU",
    "{% set x = namespace(s='aaaa') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}": "Memory|CPU time",
    "{{ 'a' * 100000000000 }}": "Memory|CPU time",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% for m in messages %}": "TemplateSyntaxError",
}
MARK = "{% if 'boom' in messages[0].content %}" + next(iter(HOSTILE)) + "{% endif %}"


def chat_of(template: str, **bounds: float) -> Chat:
    chat = Chat.bind(tiny_tokenizer(template))
    chat.sandbox.settings |= {"seconds": 0.3, "memory": 2**29, "seconds_a_message": 0.0, **bounds}
    return chat


def trained(chat: Chat, *turns: str) -> list[str]:
    (row,) = chat.conversation({"messages": said(*turns)}, loss_on="assistant")
    return trained_texts(chat.tokenizer, row)


def pid(chat: Chat) -> int:
    assert chat.sandbox._process is not None
    return chat.sandbox._process.pid


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("template", "reason"), HOSTILE.items())
def test_a_hostile_template_is_refused_with_the_reason(template, reason):
    with pytest.raises(DataError, match=reason):
        trained(chat_of(template), "a", "b")


def test_only_the_row_that_breaks_a_bound_is_refused():
    chat = chat_of(CHATML + MARK).batched()
    asked = [chat.conversation({"messages": said(q, "b")}, loss_on="assistant") for q in ("a", "boom", "c")]
    assert [trained_texts(chat.tokenizer, row) for row in asked[0]] == [["b<|im_end|>"]]
    with pytest.raises(DataError, match=r"more than 0.3 s of CPU time"):
        list(asked[1])
    assert len(list(asked[2])) == 1


def test_a_template_that_breaks_bounds_again_and_again_is_given_up():
    chat = chat_of(CHATML + MARK)
    for _ in range(STRIKES):
        with pytest.raises(DataError, match="CPU time"):
            trained(chat, "boom", "b")
    with pytest.raises(DataError, match="not tried again"):
        trained(chat, "a", "b")
    assert chat.sandbox._process is None


def test_a_process_that_somebody_ended_is_started_again():
    chat = chat_of(CHATML)
    assert trained(chat, "a", "b") == ["b<|im_end|>"]
    first = pid(chat)
    os.kill(first, signal.SIGKILL)
    assert trained(chat, "a", "c") == ["c<|im_end|>"]
    assert pid(chat) != first
    assert gone(first)


def test_a_process_that_cannot_work_says_so(monkeypatch):
    monkeypatch.setattr("finetune_cli.data.sandbox.MAIN", "import sys; sys.exit(3)")
    with pytest.raises(DataError, match="its process ended with status 3"):
        trained(chat_of(CHATML), "a", "b")


def test_nothing_is_left_of_it():
    chat = chat_of(CHATML)
    trained(chat, "a", "b")
    process = pid(chat)
    del chat
    gc.collect()
    assert gone(process)


def test_it_ends_with_its_parent(tmp_path: Path):
    program = """
        import os
        from finetune_cli.data.sandbox import Sandbox
        sandbox = Sandbox({"template": "", "names": {}, "stops": [], "specials": [], "mismatch": "refuse"})
        sandbox.answers([{"want": "all", "turns": [], "messages": [{"role": "user", "content": "a"}]}])
        print(sandbox._process.pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL
    until = time.monotonic() + 10
    while not gone(int(done.stdout)) and time.monotonic() < until:
        time.sleep(0.02)
    assert gone(int(done.stdout))


def test_secrets_of_the_environment_stay_outside(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("finetune_cli.data.sandbox.MAIN", "import os, sys; sys.exit('HF_TOKEN' in os.environ)")
    with pytest.raises(DataError, match="ended with status 0"):
        trained(chat_of(CHATML), "a", "b")


def test_no_request_starts_no_process():
    sandbox = Sandbox({})
    assert sandbox.answers([]) == []
    assert sandbox._process is None


def test_whatever_goes_wrong_costs_one_row():
    reply = json.loads(bounded(None, {"messages": []}, {"seconds": 9, "seconds_a_message": 0}))
    assert reply["error"][0].startswith("the row cannot be rendered: ")
