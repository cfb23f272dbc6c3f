"""The row cache: the same rows come back, everything that matters is in the key, one process builds."""

import json
import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune_cli.data import cache
from finetune_cli.data.chat import Chat
from finetune_cli.data.encode import Encoded
from finetune_cli.methods.sft import Sft
from finetune_cli.recipe.sections import Data, Source
from finetune_cli.types import Branch, Row
from tests.helpers import CHATML, LLAMA3, said, tiny_tokenizer

PAIR = Row(
    [1, 2], (Branch([3], [True], "chosen"), Branch([4, 5], [False, True], "rejected")), 7, 1, True, {"margin": 0.5}
)
FOUND = Encoded([PAIR, Row([], (Branch([9, 70000], [False, True]),), 8)], {"read": 2, "dropped": {"empty": 1}})


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": said("one", f"two {i}")}) + "\n" for i in range(4)))
    source = Source(path=str(path))
    return {"method": Sft(), "sources": [source], "chat": Chat.bind(tiny_tokenizer()), "data": Data(train=[source])}


def entries(tmp_path):
    return list((tmp_path / "cache" / "rows").glob("*.safetensors"))


def test_rows_come_back(tmp_path):
    path = tmp_path / "a.safetensors"
    assert cache.load(path) is None
    cache.save(FOUND, path)
    assert cache.load(path) == FOUND
    arrays = load_file(path)
    assert (arrays["ids"].dtype, arrays["trained"].dtype) == (np.int32, np.bool_)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_no_rows_come_back_too(tmp_path):
    cache.save(Encoded([], {}), tmp_path / "a.safetensors")
    assert cache.load(tmp_path / "a.safetensors") == Encoded([], {})


def test_second_time_is_read(tmp_path, job, monkeypatch):
    first = cache.encoded(**job, seed=1)
    assert len(entries(tmp_path)) == 1
    monkeypatch.setattr(cache, "encode_set", lambda *_, **__: pytest.fail("tokenised again"))
    assert cache.encoded(**job, seed=1) == first


@pytest.mark.parametrize("where", ["cut", "flipped", "not one"])
def test_a_damaged_entry_is_made_anew_and_said(tmp_path, job, caplog, where):
    first = cache.encoded(**job, seed=1)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    damage = {"cut": whole[:-5], "flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "not one": b"no"}
    entry.write_bytes(damage[where])
    with caplog.at_level(logging.WARNING, "finetune_cli"):
        assert cache.encoded(**job, seed=1) == first
    assert "damaged" in caplog.text
    assert entry.read_bytes() == whole


def test_the_key_follows_what_matters(tmp_path, job, monkeypatch):
    def key(*, seed=1, **changes):
        return cache.key_of(**{**job, **changes}, seed=seed)

    data, (source,) = job["data"], job["sources"]
    keys = [
        key(),
        key(seed=2),
        key(method=Sft(loss_on="all")),
        key(chat=Chat.bind(tiny_tokenizer(), template=LLAMA3)),
        key(chat=Chat.bind(tiny_tokenizer(more=("<more>",)))),
        key(chat=Chat.bind(tiny_tokenizer(), stop_ids=[0])),
        key(data=data.model_copy(update={"max_length": 7})),
        key(sources=[source.model_copy(update={"weight": 2.0})]),
        key(sources=[source, source]),
    ]
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "other"}))
    keys.append(key())
    monkeypatch.setattr(cache, "code", lambda _: "other code")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == key(data=data.model_copy(update={"shuffle": False}))
    assert key() == key(method=Sft(packing=True, neftune_noise_alpha=5))


def test_a_template_that_prints_the_date_is_cached_for_the_day(job, monkeypatch):
    chat = Chat.bind(tiny_tokenizer(), template=CHATML + "{# strftime_now #}")

    class Tomorrow(cache.date):
        @classmethod
        def today(cls):
            return cls(2999, 1, 1)

    keys = [cache.key_of(**{**job, "chat": one}, seed=1) for one in (chat, job["chat"])]
    monkeypatch.setattr(cache, "date", Tomorrow)
    later = [cache.key_of(**{**job, "chat": one}, seed=1) for one in (chat, job["chat"])]
    assert (keys[0] != later[0], keys[1] == later[1]) == (True, True)


def test_one_builds_and_the_others_wait(tmp_path):
    built, found = [], []

    def build():
        built.append(1)
        time.sleep(0.2)
        return FOUND

    threads = [
        threading.Thread(target=lambda: found.append(cache.cached(tmp_path / "a.safetensors", build))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(built), found) == (1, [FOUND] * 3)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "finetune_cli"):
        assert cache.cached(tmp_path / "file" / "rows" / "a.safetensors", lambda: FOUND) == FOUND
    assert "cannot be written" in caplog.text


def test_an_entry_is_read_where_nothing_can_be_written(tmp_path, monkeypatch, caplog):
    path = tmp_path / "a.safetensors"
    cache.save(FOUND, path)

    def refused(_):
        raise PermissionError("read-only")

    monkeypatch.setattr(cache, "FileLock", refused)
    assert cache.cached(path, lambda: pytest.fail("made anew")) == FOUND
    assert not caplog.text


@pytest.mark.parametrize("failing", ["NamedTemporaryFile", "save_file"])
def test_a_full_disk_is_no_error(tmp_path, monkeypatch, caplog, failing):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, failing, full)
    assert cache.cached(tmp_path / "a.safetensors", lambda: FOUND) == FOUND
    assert "No space left" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".lock"] == []


RACE = """
import sys, time
from pathlib import Path
from finetune_cli.data import cache
from finetune_cli.data.encode import Encoded
from finetune_cli.types import Branch, Row

def build():
    with open(sys.argv[2], "a") as file:
        file.write("built\\n")
    time.sleep(0.3)
    return Encoded([Row([], (Branch([1, 2], [False, True]),))], {"read": 1})

print(len(cache.cached(Path(sys.argv[1]), build).rows))
"""


def test_of_two_processes_one_builds(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path / "a.safetensors"), str(tmp_path / "built")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [racer.communicate(timeout=120)[0] for racer in racers] == ["1\n", "1\n"]
    assert (tmp_path / "built").read_text() == "built\n"


def test_an_error_while_building_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cache.cached(tmp_path / "a.safetensors", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert not list(tmp_path.glob("*.safetensors"))
    assert cache.cached(tmp_path / "a.safetensors", lambda: FOUND) == FOUND
