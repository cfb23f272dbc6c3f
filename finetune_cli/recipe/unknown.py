"""Unknown keys: where the key belongs, what it is called here, or what was probably meant."""

from collections.abc import Sequence

from finetune_cli.recipe.names import REMEDIES, RENAMED
from finetune_cli.recipe.shape import METHOD, fields, item_leaves, leaves, methods
from finetune_cli.recipe.words import LONGEST, close
from finetune_cli.spec import Spec

FEW = 14


def unknown_key(trail: Sequence[str | int], valid: Sequence[str], root: type[Spec], method: str) -> str:
    """What to say about the key at the end of `trail`, in a block that takes `valid` keys."""
    *above, last = trail
    key = str(last)
    section = ".".join(step for step in above if isinstance(step, str) and step)
    renamed = RENAMED.get(f"{section}.{key}")
    advice = (
        (f"here it is {renamed}" if renamed else "")
        or _elsewhere(key, section, root, method)
        or _other_method(key, root, method)
        or _other_name(key, section)
        or _meant(key, section, valid, root)
    )
    if advice:
        return f"unknown key; {advice}"
    where = f"{section}: takes" if section else "the top level takes"
    return f"unknown key; {where} {', '.join(valid)}" if 0 < len(valid) <= FEW else "unknown key; see `finetune schema`"


def _elsewhere(key: str, section: str, root: type[Spec], method: str) -> str:
    known = leaves(root)
    if section and key in fields(root):
        return "it belongs at the top level"
    if known.get(key, key) != key:
        home = known[key]
        return f"it belongs under {home.partition('.')[0]}: ({home})"
    if section != METHOD and method in methods(root) and key in fields(methods(root)[method]) and key != "name":
        return f"it belongs under method: (method.{key})"
    items = item_leaves(root)
    if section in (items.get(key, "").partition(".")[0], "") and key in items:
        return f"it belongs to an item of {items[key].partition('[')[0]}: ({items[key]})"
    if not section and key.partition(".")[2] and (key in known.values() or key.partition(".")[0] in fields(root)):
        above, _, below = key.partition(".")
        return f"write `{above}:` and under it `{below}:`"
    return ""


def _other_method(key: str, root: type[Spec], method: str) -> str:
    owners = [name for name, spec in methods(root).items() if key in fields(spec) and key != "name" and name != method]
    if not owners:
        return ""
    which = f"method {owners[0]}" if len(owners) == 1 else f"methods {', '.join(owners)}"
    return f"it belongs to {which}" + (f", not to {method}" if method in methods(root) else "")


def _other_name(key: str, section: str) -> str:
    for name in (f"{section}.{key}", key, key.replace("-", "_").lower()):
        if name in RENAMED:
            return f"here it is {RENAMED[name]}"
        if name in REMEDIES:
            return REMEDIES[name]
    return ""


def _meant(key: str, section: str, valid: Sequence[str], root: type[Spec]) -> str:
    near = close(key, valid)
    if near:
        return f"did you mean {f'{section}.' if section else ''}{near}?"
    if len(key) > LONGEST:
        return ""
    near = close(key, leaves(root)) or close(key, RENAMED, cutoff=0.85)
    near = leaves(root).get(near) or RENAMED.get(near, "")
    return f"did you mean {near}?" if near else ""
