"""Unknown keys: where the key belongs, what it is called here, or what was probably meant."""

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from finetune_cli.recipe.names import REMEDIES, RENAMED
from finetune_cli.recipe.shape import METHOD, fields, item_leaves, leaves, methods
from finetune_cli.recipe.words import LONGEST, close
from finetune_cli.spec import Spec

FEW = 14
ALIKE = 0.8
APART = 0.1
"""A typo is meant to be the one key that is this much like it, and so much more than the next."""


class Advice(NamedTuple):
    """What to say about an unknown key, and the dotted key that it stands for; none where that is not certain."""

    text: str
    target: str = ""


def unknown_key(trail: Sequence[str | int], valid: Sequence[str], root: type[Spec], method: str) -> Advice:
    """About the key at the end of `trail`, in a block that takes `valid` keys."""
    *above, last = trail
    key = str(last)
    section = ".".join(step for step in above if isinstance(step, str) and step)
    renamed = RENAMED.get(f"{section}.{key}")
    advice = (
        (Advice(f"here it is {renamed}", renamed) if renamed else None)
        or _elsewhere(key, section, root, method)
        or _other_method(key, root, method)
        or _other_name(key, section)
        or _meant(key, written(above), valid, root)
    )
    if advice:
        return Advice(f"unknown key; {advice.text}", advice.target)
    where = f"{section}: takes" if section else "the top level takes"
    few = 0 < len(valid) <= FEW
    return Advice(f"unknown key; {where} {', '.join(valid)}" if few else "unknown key; see `finetune schema`")


def written(trail: Iterable[str | int]) -> str:
    """`data.train[0]`; the unnamed set has no name in it."""
    key = ""
    for step in trail:
        key += f"[{step}]" if isinstance(step, int) else f".{step}" if key and step else step
    return key


def _elsewhere(key: str, section: str, root: type[Spec], method: str) -> Advice | None:
    known = leaves(root)
    if section and key in fields(root):
        return Advice("it belongs at the top level", key)
    if known.get(key, key) != key:
        home = known[key]
        return Advice(f"it belongs under {home.partition('.')[0]}: ({home})", home)
    if section != METHOD and method in methods(root) and key in fields(methods(root)[method]) and key != "name":
        return Advice(f"it belongs under method: (method.{key})", f"method.{key}")
    items = item_leaves(root)
    if section in (items.get(key, "").partition(".")[0], "") and key in items:
        return Advice(f"it belongs to an item of {items[key].partition('[')[0]}: ({items[key]})", items[key])
    if not section and key.partition(".")[2] and (key in known.values() or key.partition(".")[0] in fields(root)):
        above, _, below = key.partition(".")
        return Advice(f"write `{above}:` and under it `{below}:`", key if key in known.values() else "")
    return None


def _other_method(key: str, root: type[Spec], method: str) -> Advice | None:
    owners = [name for name, spec in methods(root).items() if key in fields(spec) and key != "name" and name != method]
    if not owners:
        return None
    which = f"method {owners[0]}" if len(owners) == 1 else f"methods {', '.join(owners)}"
    return Advice(f"it belongs to {which}" + (f", not to {method}" if method in methods(root) else ""))


def _other_name(key: str, section: str) -> Advice | None:
    for name in (f"{section}.{key}", key, key.replace("-", "_").lower()):
        if name in RENAMED:
            return Advice(f"here it is {RENAMED[name]}", RENAMED[name])
        if name in REMEDIES:
            return Advice(REMEDIES[name])
    return None


def _meant(key: str, where: str, valid: Sequence[str], root: type[Spec]) -> Advice | None:
    if near := close(key, valid):
        full = f"{where}.{near}" if where else near
        return Advice(f"did you mean {full}?", full if certain(key, near, valid) else "")
    if len(key) > LONGEST:
        return None
    near = close(key, leaves(root)) or close(key, RENAMED, cutoff=0.85)
    full = leaves(root).get(near) or RENAMED.get(near, "")
    sure = full and certain(key, near, [*leaves(root), *RENAMED])
    return Advice(f"did you mean {full}?", full if sure else "") if full else None


def certain(key: str, near: str, choices: Iterable[str]) -> bool:
    """Whether no other choice is nearly as much like the key."""
    likeness = {choice: SequenceMatcher(None, key.lower().replace("-", "_"), choice).ratio() for choice in choices}
    next_best = max((ratio for choice, ratio in likeness.items() if choice != near), default=0.0)
    return likeness[near] >= ALIKE and likeness[near] - next_best >= APART
