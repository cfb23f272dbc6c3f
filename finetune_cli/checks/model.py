"""Rules on tokenizer, chat template and configuration: what can be said before rows are read. No weights."""

import os
from collections.abc import Iterator, Mapping

from finetune_cli.checks.rule import Found, SeenModel
from finetune_cli.plan.facts import look

QUERY_AND_VALUE = {"q_proj", "v_proj", "query", "value", "q", "v", "q_lin", "v_lin", "wq", "wv"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30


def vocabulary(seen: SeenModel) -> Iterator[Found]:
    """Ids without a row of the embedding."""
    names = seen.tokenizer.get_vocab()
    rows = seen.weights.embedding_rows
    outside = sorted((token for token, i in names.items() if i >= rows), key=lambda token: names[token])
    if outside:
        shown = ", ".join(repr(token) for token in outside[:3])
        said = f"{len(outside)} tokens of the tokenizer ({shown}) have no row among the {rows:,} of the embedding"
        yield Found("model.name_or_path", said)


def base_for_reference(seen: SeenModel) -> Iterator[Found]:
    if seen.plan.resolved.reference is not None and seen.chat.template is None:
        said = f"the tokenizer has no chat template, so this is probably a base model; {seen.recipe.method.name} "
        yield Found("model.name_or_path", f"{said}only shifts what a model says already")


def other_models(seen: SeenModel) -> Iterator[Found]:
    """A starting adapter that is not of its base; a reference of another base or vocabulary, whose log-probabilities
    are of other things."""
    if seen.weights.misfit:
        yield Found("model.name_or_path", seen.weights.misfit, "name the adapter and the base that it was trained on")
    reference = seen.plan.resolved.reference
    if reference is None or reference.model is None:
        return
    theirs, ours = adapter_base(reference.model), seen.facts.base or seen.recipe.model.name_or_path
    if theirs is not None and not same_model(theirs, ours):
        yield Found("method.ref_model", f"{reference.model} is an adapter of {theirs}, and the policy is of {ours}")
    elif wrong := differing(seen.tokenizer.get_vocab(), seen.reference_tokens):
        yield Found("method.ref_model", f"{reference.model} has another vocabulary: {wrong}")


def adapter_base(folder: str) -> str | None:
    """The base of an adapter; None for what is no folder of one."""
    return look(folder).base if os.path.isdir(folder) else None


def same_model(one: str, other: str) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def differing(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """The first token that is another id there, in words; empty where there is none."""
    wrong = [token for token, i in sorted(ours.items(), key=lambda pair: pair[1]) if theirs.get(token) != i]
    if wrong:
        there = f"id {theirs[wrong[0]]}" if wrong[0] in theirs else "no token"
        return f"{len(wrong)} of {len(ours)} tokens, {wrong[0]!r} is id {ours[wrong[0]]} here and {there} there"
    return f"{len(theirs) - len(ours)} tokens more than the policy's {len(ours)}" if len(theirs) != len(ours) else ""


def targets(seen: SeenModel) -> Iterator[Found]:
    """Which layers get an adapter, and how large a share is trained."""
    lora, weights = seen.recipe.lora, seen.weights
    if weights.refused:
        yield Found("lora.target_modules", weights.refused, severity="error")
        return
    left = [name for name in weights.linear if name not in weights.adapted]
    if lora is not None and left and set(weights.adapted) <= QUERY_AND_VALUE:
        said = (
            f"only {', '.join(weights.adapted)} get an adapter ({weights.trained / weights.total:.2%} of all weights)"
        )
        yield Found("lora.target_modules", f"{said}, and {', '.join(left)} none")


def float32(seen: SeenModel) -> Iterator[Found]:
    resolved = seen.plan.resolved
    if (
        seen.recipe.quantization is None
        and seen.adapted
        and resolved.dtype == "float32"
        and resolved.precision != "fp32"
    ):
        frozen = seen.weights.total - seen.weights.trained
        half = f"{frozen * 2 / GIB:.2f} in {'float16' if resolved.precision == 'fp16' else 'bfloat16'}"
        yield Found("model.dtype", f"the frozen weights take {frozen * 4 / GIB:.2f} GiB in float32, {half}")


def window(seen: SeenModel) -> Iterator[Found]:
    most, asked = seen.weights.window, seen.recipe.data.max_length
    if most is not None and asked > most:
        said = f"{asked:,} is longer than the {most:,} tokens that the model was made for"
        yield Found("data.max_length", said, f"use {most} or less, or a model with a longer window")


def memory(seen: SeenModel) -> dict[str, float]:
    """GiB of the weights by what they are for and their number format; activations come on top."""
    resolved, weights, quantised = seen.plan.resolved, seen.weights, seen.recipe.quantization
    frozen = weights.total - weights.trained
    sizes: dict[str, float] = {}
    if quantised is not None:
        # a scale of 32 bits for 64 weights, or of 8 bits and one of 32 for 256 of those
        bits = 8 if quantised.load_in_8bit else 4 + (0.127 if quantised.bnb_4bit_use_double_quant else 0.5)
        sizes[f"frozen weights ({8 if quantised.load_in_8bit else 4} bits)"] = weights.in_blocks * bits / 8
        frozen -= weights.in_blocks
    trained = weights.trained * BYTES["float32"]
    sizes |= {
        f"frozen weights ({resolved.dtype})": frozen * BYTES[resolved.dtype],
        "trained weights (float32)": trained,
        "gradients (float32)": trained,
    }
    return {name: round(size / GIB, 3) for name, size in sizes.items() if size}
