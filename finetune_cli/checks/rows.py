"""Rules on rows as they are trained: lengths, what ends a turn, prompts, pairs, duplicates, and how long the run is."""

import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from finetune_cli.checks.lints import in_steps
from finetune_cli.checks.rule import FEW, Found, SeenRows, Severity, counted, share
from finetune_cli.types import Branch, Row

SPAN_END = re.compile(b"\x01(?=\x00|$)")
MARKER = re.compile(r"<[^<>\s]{1,40}>\Z|\[/?[A-Z_]{2,20}\]\Z")
TAIL = 24
"""Tokens that are looked at for a marker of the template."""
LONGER = 1.5
"""Mean length of chosen answers to that of rejected ones, either way, from which length alone tells them apart."""
NO_TARGETS = ("no_targets", "empty", "unrenderable")


def untrained(seen: SeenRows) -> Iterator[Found]:
    """Rows that teach nothing. More than data.max_dropped_fraction of them has stopped the check already."""
    for key, found in seen.encoded.items():
        for cause in NO_TARGETS:
            if number := found.report["dropped"].get(cause):
                first, *more = found.report["examples"][cause]
                said = (
                    f"{share(number, found.report['read'])} are dropped as {cause}, the first {first.removesuffix('.')}"
                )
                then = ", ".join(line.partition(": ")[0].rpartition("/")[2] for line in more)
                yield Found(key, said + (f", then {then}" if then else ""))


def lengths(seen: SeenRows) -> Iterator[Found]:
    for key, found in seen.encoded.items():
        report, most = found.report, seen.recipe.data.max_length
        dropped = report["dropped"].get("overlength", 0) + report["parts_dropped"].get("overlength", 0)
        if not dropped and not report["truncated"]:
            continue
        cut = report["targets"]["cut"]
        trained = cut + report["targets"]["trained"]  # prompts alone have none
        lost = f", with them {share(cut, trained, 'trained tokens')}" if trained else ""
        told = {"dropped": dropped, "cut": report["truncated"]}
        what = " and ".join(f"{counted(number, 'row')} {what}" for what, number in told.items() if number)
        spread = ", ".join(f"{name} {length}" for name, length in report["lengths"].items())
        said = f"of {report['read']:,} rows {what} at {most} tokens (data.overlength: {seen.recipe.data.overlength})"
        room = f"a data.max_length of {report['lengths']['max']} takes them all"
        yield Found(key, f"{said}{lost}; lengths: {spread}", room)


def ends(row: Row) -> Iterator[tuple[Branch, int]]:
    """(branch, place) of the last token of every run of trained tokens; the end of a cut row is none."""
    for branch in row.branches:
        for found in SPAN_END.finditer(bytes(branch.trained)):
            if not (row.truncated and found.end() == len(branch.ids)):
                yield branch, found.start()


def stops(seen: SeenRows) -> Iterator[tuple[str, str, list[int], int]]:
    """(key, kind, rows, ends in all) where trained spans do not end in a token that inference stops on. The kinds:
    special (another special token), marker (text that is no token), other."""
    if not seen.recipe.method.generates:  # a score is no answer that has to stop
        return
    declared = set(seen.stops)
    special = set(seen.tokenizer.all_special_ids) | {
        i for i, token in seen.tokenizer.added_tokens_decoder.items() if token.special
    }
    for key, found in seen.encoded.items():
        kinds: dict[str, list[int]] = {}
        total = 0
        for row in found.rows:
            for branch, at in ends(row):
                total += 1
                last = branch.ids[at]
                if last in declared:
                    continue
                text = "" if last in special else seen.tokenizer.decode(branch.ids[max(0, at + 1 - TAIL) : at + 1])
                kind = "special" if last in special else "marker" if MARKER.search(text) else "other"
                kinds.setdefault(kind, []).append(row.source)
        yield from ((key, kind, sources, total) for kind, sources in kinds.items())


def never_stops(seen: SeenRows) -> Iterator[Found]:
    for key, kind, sources, total in stops(seen):
        if kind == "other" and len(sources) == total:
            yield Found(
                key, f"none of the {total:,} trained answers ends in a token that stops inference: {names(seen)}"
            )


def sometimes_stops(seen: SeenRows) -> Iterator[Found]:
    for key, kind, sources, total in stops(seen):
        if kind == "other" and FEW * total <= len(sources) < total:
            said = f"{share(len(sources), total, 'trained answers')} do not end in a token that stops inference"
            yield Found(key, f"{said} ({names(seen)}); {seen.first(key, sources)}")


def other_stop(seen: SeenRows) -> Iterator[Found]:
    """The template's turns end in one token, inference stops on another."""
    for key, kind, sources, total in stops(seen):
        if kind == "special" and len(sources) >= FEW * total:
            branch, at = first_end(seen, key, sources)
            end = branch.ids[at]
            ends_in = f"{share(len(sources), total, 'trained answers')} end in {seen.tokenizer.decode([end])!r} ({end})"
            wide = sorted({*seen.stops, end})
            fix = f'write "eos_token_id": {wide} into the generation_config.json of the model, in a folder of your own'
            yield Found(key, f"{ends_in}, and inference stops on {names(seen)}", fix)


def split_marker(seen: SeenRows) -> Iterator[Found]:
    """What ends a turn is text that is no token, so nothing can stop on it."""
    for key, kind, sources, total in stops(seen):
        if kind == "marker" and len(sources) >= FEW * total:
            branch, at = first_end(seen, key, sources)
            text = seen.tokenizer.decode(branch.ids[max(0, at + 1 - TAIL) : at + 1])
            marker = found[0] if (found := MARKER.search(text)) else text
            count = len(seen.chat.encoder.one(marker))
            said = f"{share(len(sources), total, 'trained answers')} end in {marker!r}, which is no token of this "
            yield Found(key, f"{said}tokenizer but text of {count} tokens: inference stops on {names(seen)}")


def first_end(seen: SeenRows, key: str, sources: list[int]) -> tuple[Branch, int]:
    """The first end that is no stop, among the rows of `sources`."""
    wanted, declared = set(sources), set(seen.stops)
    rows = (row for row in seen.encoded[key].rows if row.source in wanted)
    return next((branch, at) for row in rows for branch, at in ends(row) if branch.ids[at] not in declared)


def names(seen: SeenRows) -> str:
    """`'<|im_end|>' (2)`."""
    return ", ".join(f"{seen.tokenizer.decode([i])!r} ({i})" for i in seen.stops) or "nothing"


def double_bos(seen: SeenRows) -> Iterator[Found]:
    bos = seen.tokenizer.bos_token_id
    if bos is None:
        return
    for key, found in seen.encoded.items():
        twice = [row.source for row in found.rows if head(row, 2) == [bos, bos]]
        if twice:
            name = seen.tokenizer.decode([bos])
            said = f"{share(len(twice), len(found.rows))} begin with {name!r} twice; {seen.first(key, twice)}"
            yield Found(key, said)


def head(row: Row, count: int) -> list[int]:
    return [*row.prefix, *(row.branches[0].ids if row.branches else ())][:count]


def noted(seen: SeenRows, *ids: str) -> Iterator[tuple[str, str, Mapping[str, Any], int]]:
    """(key, id, note, kept rows) of what encoding noted about rows."""
    for key, found in seen.encoded.items():
        for name in ids:
            if told := found.report["warnings"].get(name):
                yield key, name, told, found.report["read"]


def of_note(seen: SeenRows, *ids: str, few: float = 0.0) -> Iterator[Found]:
    for key, _, told, read in noted(seen, *ids):
        if told["rows"] >= few * read:
            yield Found(key, f"{share(told['rows'], read)}; {told['example']}; {seen.first(key, told['sources'])}")


def reasoning_lost(seen: SeenRows) -> Iterator[Found]:
    yield from of_note(seen, "reasoning_lost", few=FEW)


def tools_lost(seen: SeenRows) -> Iterator[Found]:
    yield from of_note(seen, "tools_lost")


def control_tokens(seen: SeenRows) -> Iterator[Found]:
    yield from of_note(seen, "control_token")


def template_kwargs(seen: SeenRows) -> Iterator[Found]:
    yield from of_note(seen, "template_kwargs", few=FEW)


def boundary(seen: SeenRows) -> Iterator[Found]:
    """Prompts that, encoded alone as inference does, have other ids than in the row."""
    if not seen.recipe.method.generates:  # what is scored is the whole row
        return
    for key, name, told, read in noted(seen, "straddling", "retokenised"):
        severity: Severity = "error" if told["rows"] > seen.recipe.data.max_dropped_fraction * read else "warning"
        what = {
            "straddling": "have a token that lies half in the prompt and half in the answer",
            "retokenised": "have a prompt whose ids differ from those that inference makes of it",
        }[name]
        row = next((row for row in seen.encoded[key].rows if row.source in told["sources"]), None)
        shown = f", around it {around(seen, row)}" if row else ""
        said = f"{share(told['rows'], read)} {what}; {seen.first(key, told['sources'])}{shown}"
        yield Found(key, said, severity=severity)


def around(seen: SeenRows, row: Row) -> str:
    """The pieces before and after the place where training starts."""
    ids = [*row.prefix, *row.branches[0].ids]
    at = len(row.prefix) + (row.branches[0].trained.index(True) if any(row.branches[0].trained) else 0)
    pieces = [repr(seen.tokenizer.decode([i])) for i in ids[max(0, at - 2) : at + 2]]
    cut = min(at, 2)
    return " ".join([*pieces[:cut], "|", *pieces[cut:]])


def pairs(seen: SeenRows) -> Iterator[Found]:
    """Pairs that say nothing: both answers the same, or one of them empty."""
    quiet = {*seen.stops, *seen.tokenizer.all_special_ids}
    for key, found in seen.encoded.items():
        both = [(row, *branches) for row in found.rows if (branches := pair(row))]
        same = [row.source for row, chosen, rejected in both if chosen.ids == rejected.ids]
        empty = [row.source for row, *answers in both if not all(says(answer, seen, quiet) for answer in answers)]
        for sources, what in ((same, "have a rejected answer that is the chosen one"), (empty, "have an empty answer")):
            if sources:
                share_of = seen.recipe.data.max_dropped_fraction * len(both)
                severity: Severity = "error" if len(sources) > share_of else "warning"
                said = f"{share(len(sources), len(both), 'pairs')} {what}; {seen.first(key, sources)}"
                yield Found(key, said, severity=severity)


def pair(row: Row) -> tuple[Branch, Branch] | None:
    named = {branch.name: branch for branch in row.branches}
    return (named["chosen"], named["rejected"]) if {"chosen", "rejected"} <= set(named) else None


def says(answer: Branch, seen: SeenRows, quiet: set[int]) -> bool:
    """Whether an answer holds more than white space and special tokens."""
    return any(seen.tokenizer.decode([i]).strip() for i in answer.ids if i not in quiet)


def length_bias(seen: SeenRows) -> Iterator[Found]:
    """Chosen answers so much longer or shorter that length alone is the easiest thing to learn (arXiv 2403.19159)."""
    for key, found in seen.encoded.items():
        both = [branches for row in found.rows if (branches := pair(row))]
        if len(both) < 2:
            continue
        chosen, rejected = (sum(len(b.ids) for b in column) / len(both) for column in zip(*both, strict=True))
        ratio = chosen / rejected if rejected else math.inf
        if not 1 / LONGER <= ratio <= LONGER:
            said = (
                f"chosen answers have {chosen:.0f} tokens on average, rejected ones {rejected:.0f} ({ratio:.2f} times)"
            )
            yield Found(key, said, "balance the pairs by length, or set method.ld_alpha where the method has it")


def digests(rows: Iterable[Row]) -> dict[int, int]:
    """The number of each conversation -> a hash of all its tokens. A row that `weight` repeats is one conversation."""
    parts: dict[int, dict[int, bytes]] = {}
    for row in rows:
        ids = (row.prefix, *(branch.ids for branch in row.branches))
        parts.setdefault(row.source, {})[row.part] = b"|".join(array("q", some).tobytes() for some in ids)
    return {source: hash(tuple(sorted(found.items()))) for source, found in parts.items()}


def duplicates(seen: SeenRows) -> Iterator[Found]:
    train = digests(seen.sets.train.rows)
    first = {digest: source for source, digest in reversed(train.items())}
    again = [source for source, digest in train.items() if first[digest] != source]
    if len(again) > FEW * len(train):
        said = f"{share(len(again), len(train))} are copies of an earlier one; {seen.first('data.train', again)}"
        yield Found("data.train", said, "take the copies out; `weight:` is the way to see rows more often")
    for name, (encoded, _) in seen.sets.evals.items():
        held_out = not name and not (seen.recipe.data.eval_sets or {}).get("")
        key = "data.eval_split" if held_out else f"data.eval_sets.{name}".rstrip(".")
        theirs = digests(encoded.rows)
        inside = [source for source, digest in theirs.items() if digest in first]
        if inside:
            places = seen.first("data.train" if held_out else key, inside)
            said = f"{share(len(inside), len(theirs), 'evaluation rows')} are also trained on; {places}"
            yield Found(
                key, said, "take them out of one side: evaluation on rows seen in training shows memory, not skill"
            )


def copies_and_lengths(seen: SeenRows) -> Iterator[Found]:
    yield from duplicates(seen)
    yield from length_bias(seen)


def run_length(seen: SeenRows) -> Iterator[Found]:
    """Where the number of steps follows from the number of rows."""
    train, batch = seen.recipe.train, seen.plan.resolved.global_batch_size
    asked = seen.recipe.method.steps_in_all(batch)
    if asked is not None:
        yield from in_steps(seen, asked, "method.total_episodes")
    elif train.max_steps is None:
        each = math.ceil(units(seen) / batch)
        yield from in_steps(seen, max(1, math.ceil(train.num_train_epochs * each)), "train.num_train_epochs")


def numbers(seen: SeenRows) -> Iterator[Found]:
    yield from run_length(seen)
    yield from beyond_positions(seen)


def beyond_positions(seen: SeenRows) -> Iterator[Found]:
    """Rows, and prompts with the answers that will be drawn to them, for which the model has no positions: its forward
    ends in an error, whenever one comes up."""
    most, sets, new = seen.weights.positions, seen.sets, seen.recipe.generation.max_new_tokens
    if most is None:
        return
    rows = [row for found in (sets.train, *(found for found, _ in sets.evals.values())) for row in found.rows]
    longest = max((row.longest for row in rows), default=0)
    if longest > most:
        said = f"a row has {longest:,} tokens, and the model has positions for {most:,}"
        yield Found("data.max_length", said, f"use {most} or less", "error")
    lists = (sets.train_prompts, *(prompts for _, prompts in sets.evals.values()))
    asked = [len(prompt.ids) for prompts in lists for prompt in prompts]
    asked += [len(row.prefix) for row in rows] if seen.recipe.method.online else []
    if (longest := max(asked, default=0)) + new > most:
        said = (
            f"{new:,} tokens behind a prompt of {longest:,} are more than the {most:,} that the model has positions for"
        )
        fits = f"use {most - longest} or less, or shorter prompts" if longest < most else "use shorter prompts"
        yield Found("generation.max_new_tokens", said, fits, "error")


def no_prompts(seen: SeenRows) -> Iterator[Found]:
    """Evaluation sets without a prompt, of which a metric judges no answer."""
    if seen.recipe.eval.metric is None or not seen.recipe.method.generates:
        return
    silent = [name for name, (_, prompts) in seen.sets.evals.items() if not prompts]
    if silent:
        which = ", ".join(f"the evaluation set {name}" if name else "the rows for evaluation" for name in silent)
        said = f"is never computed on {which}: none of these rows has a prompt to answer"
        fix = "use rows of messages, or of prompt and completion, or take eval.metric out"
        yield Found("eval.metric", said, fix, "warning" if len(silent) < len(seen.sets.evals) else "error")


def units(seen: SeenRows) -> int:
    """What a batch is counted in: rows, or bins where they are packed."""
    rows, capacity = seen.sets.train.rows, seen.recipe.method.bin_tokens(seen.recipe.data.max_length)
    if capacity is None:
        return len(rows)
    from finetune_cli.data.batches import pack

    return len(pack([row.length for row in rows], capacity, seed=seen.recipe.seed))
