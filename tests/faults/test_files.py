"""A checkpoint of which any byte is another, or any is missing, is named and passed over."""

import os
import random
import shutil
import sys

import pytest

from finetune_cli.engine import manifest

EVERY = bool(int(os.environ.get("FAULT_POINTS", "0")))


def flip(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path, draw):
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))


def lose(path, draw):
    path.unlink()


DAMAGE = [flip, cut, lose]


@pytest.fixture
def unfinished(sft, tmp_path_factory):
    """A copy of a run that was stopped just before its report was written."""

    def make(name):
        run = sft.folder / name
        shutil.copytree(sft.folder / "whole", run)
        (run / "report.json").unlink()
        return run

    return make


def test_every_file_is_watched(unfinished, capsys):
    draw, count = random.Random(6), 0
    run = unfinished("watched")
    newest = manifest.found(run)[-1]
    kept = run.parent / "kept"
    shutil.copytree(newest, kept)
    names = sorted(path.name for path in kept.iterdir())
    assert {"manifest.json", "optimizer.pt", "rng_0.pt", "trainer_state.json", "adapter_model.safetensors"} < set(names)
    for name in names:
        for damage in DAMAGE * 4:
            damage(newest / name, draw)
            found = manifest.damage(newest)
            spaces = name == "manifest.json" and found is None  # a changed blank that changes no word
            assert found or spaces, (name, damage.__name__)
            assert not spaces or manifest.read(newest) == manifest.read(kept)
            shutil.copy2(kept / name, newest / name)
            count += 1
    assert manifest.damage(newest) is None
    with capsys.disabled():
        sys.stdout.write(f"\nbytes flipped, cut off and files lost: {count}, all seen\n")


@pytest.mark.parametrize("damage", DAMAGE if EVERY else [flip], ids=lambda d: d.__name__)
def test_the_run_goes_on_from_the_one_before(sft, unfinished, damage):
    draw = random.Random(6)
    newest = manifest.found(sft.folder / "whole")[-1].name
    names = sorted(path.name for path in (sft.folder / "whole" / newest).iterdir())
    for name in names if EVERY else ["optimizer.pt"]:
        run = unfinished(f"{damage.__name__}-{name}")
        damage(run / newest / name, draw)
        if manifest.damage(run / newest) is None:
            continue
        outcome = sft.ends_as_if_undisturbed(run.name, at_most=1)
        assert f"{newest} is passed over" in outcome.said
        shutil.rmtree(run)


def test_none_is_whole(sft, unfinished):
    """The run starts afresh, and says so."""
    run = unfinished("none")
    for folder in manifest.found(run):
        cut(folder / "adapter_model.safetensors", random.Random(1))
    outcome = sft.ends_as_if_undisturbed("none", at_most=1)
    assert "starts afresh" in outcome.said
