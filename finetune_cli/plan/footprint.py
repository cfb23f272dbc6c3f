"""Bytes of the parts of a run: weights, states, what a layer keeps for its backward. From sizes alone, no torch.

What is kept is that of our own layout: rows end to end, an adapter's layer keeps its input and one narrow product
(`engine/lora.py`), attention keeps probabilities up to 1024 keys on a CPU (`engine/written.py`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from finetune_cli.plan.arrangement import kept_scores
from finetune_cli.plan.shape import Linear, Shape
from finetune_cli.recipe.sections import Lora, Quantization
from finetune_cli.spec import Spec

GIB = 2**30
WIDE = 4
"""Bytes of float32."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "bf16": 2, "fp16": 2, "fp32": 4}
STATE = (
    (r"sgd", 0.0), (r"adafactor", 0.02), (r"adagrad|rmsprop$|rmsprop_bnb(_32bit)?$", 4.0), (r"rmsprop_bnb_8bit", 1.03),
    (r"(paged_)?lion_8bit", 1.03), (r"(paged_)?lion", 4.0), (r"(paged_)?ademamix_8bit", 3.1),
    (r"(paged_)?ademamix", 12.0), (r"adamw_torch_4bit", 1.1), (r"adamw_torch_8bit", 2.1),
    (r"(paged_)?adamw(_bnb)?_8bit", 2.07), (r"", 8.0),
)  # fmt: skip
"""Bytes of optimiser state a trained weight, by the first pattern that fits the name; AdamW keeps two moments."""


class Rows(Spec):
    """The rows of one forward of one process, as far as memory knows them."""

    segments: list[tuple[int, int]]
    """(tokens of its own, earlier tokens it looks back on) of each segment."""
    targets: int
    """Supervised positions."""
    padded: bool = False

    @property
    def tokens(self) -> int:
        return sum(own for own, _ in self.segments)


class Line(Spec):
    """One line of the table: what it is, and bytes of one process at the worst moment."""

    what: str
    bytes: float
    about: str = ""


class Estimate(Spec):
    """Memory of one process, bytes; `lines` add up to the peak."""

    lines: list[Line]
    moment: str
    """When the peak is."""
    rows: Rows
    sure: bool
    """False for families that it was not measured on."""

    @property
    def peak(self) -> float:
        return sum(line.bytes for line in self.lines)

    @property
    def gib(self) -> float:
        return self.peak / GIB


class Drawn(NamedTuple):
    """Answers drawn together."""

    answers: int
    prompt: int
    """Tokens, at most."""
    new: int
    """Tokens of an answer, at most."""
    scored_once: bool = False
    """See `scored_once` in `plan/memory.py`: the graphs of policy and critic are there at once."""


@dataclass(frozen=True)
class Setup:
    """Everything of a plan that memory depends on."""

    shape: Shape
    rows: Rows
    device: str
    lora: Lora | None
    quantization: Quantization | None
    frozen: int
    """Bytes of a frozen weight that is not quantised."""
    compute: int
    """Bytes of a number in products."""
    optim: str
    checkpointing: bool
    accumulates: bool
    processes: int
    sharded: bool
    labels: int | None
    """Scores of a head that is not over the vocabulary."""
    second: str | None
    """start | model: a reference of its own is held."""
    attention: str = "sdpa"
    drawn: Drawn | None = None
    """Answers that a method draws itself; it then has a critic beside its policy."""
    judges: float = 0.0
    """Bytes of reward models."""
    batch: int = 1
    """Rows, pairs or bins in a forward."""
    tokens: int = 0
    """Whose rows of embedding and head are trained beside adapters."""
    deepspeed: bool = False
    room: float = 0.0
    """Bytes that copies of frozen weights may take (`room_for_copies`)."""

    @property
    def full(self) -> bool:
        return self.lora is None

    @property
    def residual(self) -> int:
        """Bytes of a number between layers: that of the embedding."""
        return WIDE if self.full else self.frozen

    def adapts(self, linear: Linear) -> bool:
        return self.lora is not None and adapted(self.lora, linear)

    def trains(self, linear: Linear) -> bool:
        """In full, alone or beside the adapters."""
        return self.lora is None or linear.name in (self.lora.modules_to_save or [])

    def plain(self, linear: Linear) -> bool:
        """Whether the adapter's layer is computed as one (`engine/lora.py`)."""
        lora, asked = self.lora, self.quantization
        quiet = lora is not None and not lora.lora_dropout and not lora.use_dora
        return self.adapts(linear) and quiet and not (asked is not None and asked.load_in_8bit)


def named(targets: str | Sequence[str], name: str) -> bool:
    if isinstance(targets, str):
        if targets == "all-linear":
            return name != "lm_head"
        return re.fullmatch(targets, name) is not None or re.search(targets, f"model.layers.0.x.{name}") is not None
    return any(name == target or target.endswith(f".{name}") for target in targets)


# ── what lies there all the time ──────────────────────────────────────────────────────────────────────────────────────


def quantised_bytes(linear: Linear, asked: Quantization) -> float:
    """A weight in 8 bits with a float32 a row; or in 4 with a constant for each 64, itself in 8 bits where the
    quantisation is double, and small tables."""
    n = linear.weights
    if asked.load_in_8bit:
        return n + WIDE * linear.wide_out
    constants = n / 64
    if not asked.bnb_4bit_use_double_quant:
        return n / 2 + WIDE * constants + 64
    return n / 2 + constants + WIDE * constants / 256 + 64 + 1024


def adapter_weights(s: Setup) -> int:
    """Of all layers; a head with an adapter too."""
    if s.lora is None:
        return 0
    return adapter_weights_of(s.shape, s.lora)


def adapter_weights_of(shape: Shape, lora: Lora) -> int:
    """Of all layers that get adapters; a head with one too."""
    each = sum(
        rank(lora, one) * (one.wide_in + one.wide_out) + one.wide_out * lora.use_dora
        for one in shape.linears()
        if adapted(lora, one)
    )
    head = lora.r * (shape.hidden + shape.vocabulary) if named(lora.target_modules, "lm_head") else 0
    return blocks(shape, lora) * each + head


def blocks(shape: Shape, lora: Lora) -> int:
    """How many of the blocks get adapters."""
    chosen = lora.layers_to_transform
    return shape.layers if chosen is None else len([n for n in set(chosen) if n < shape.layers])


def adapted(lora: Lora, linear: Linear) -> bool:
    excluded = lora.exclude_modules is not None and named(lora.exclude_modules, linear.name)
    return named(lora.target_modules, linear.name) and not excluded


def rank(lora: Lora, linear: Linear) -> int:
    """That of the layer's own pattern, as peft finds it: a whole name or its end."""
    name = f"model.layers.0.x.{linear.name}"
    return next((r for key, r in lora.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", name)), lora.r)


def head_adapter(s: Setup) -> int:
    wanted = s.lora is not None and named(s.lora.target_modules, "lm_head")
    return s.lora.r * (s.shape.hidden + s.shape.vocabulary) if wanted and s.lora else 0


def trained_weights(s: Setup) -> int:
    """In float32, with a gradient and a state. A critic is as large as the policy, with a head of its own."""
    return policy_weights(s) + (policy_weights(s) + s.shape.hidden + 1 if s.drawn is not None else 0)


def policy_weights(s: Setup) -> int:
    if s.lora is None:
        return s.shape.weights - (s.shape.head if s.labels else 0) + s.shape.hidden * (s.labels or 0)
    saved = s.lora.modules_to_save or []
    whole = sum(one.weights for one in s.shape.linears() if one.name in saved) * s.shape.layers
    whole += s.shape.embedding * sum(name in ("lm_head", "embed_tokens") for name in saved)
    rows = s.shape.hidden * s.tokens * (1 if s.shape.tied else 2)
    return adapter_weights(s) + whole + rows + s.shape.hidden * (s.labels or 0)


def frozen_bytes(s: Setup) -> float:
    """The base under adapters."""
    if s.lora is None:
        return 0.0
    shape = s.shape
    weights = shape.weights - (shape.head if s.labels else 0)
    if s.quantization is None:
        return float(s.frozen * weights)
    linears = list(shape.linears())
    rest = weights - shape.layers * sum(one.weights for one in linears)
    return s.frozen * rest + shape.layers * sum(quantised_bytes(one, s.quantization) for one in linears)


ROOM, SHARE = 2 * GIB, 1 / 8
"""What copies of frozen weights for a CPU's products may take at most, and of the machine's memory."""


def room_for_copies(memory_gib: float | None, processes: int) -> float:
    """Bytes, of one of `processes` on a machine."""
    return min(ROOM, SHARE * GIB * (memory_gib or 0.0)) / processes


def copied_bytes(s: Setup) -> float:
    """Frozen weights laid out again as a CPU multiplies with them, one way or both (`engine/packed.py`)."""
    if s.lora is None or s.lora.use_dora or s.quantization is not None or s.frozen == WIDE:
        return 0.0
    if s.device != "cpu" or s.checkpointing:
        return 0.0
    size = s.frozen * blocks(s.shape, s.lora) * sum(one.weights for one in s.shape.linears() if s.adapts(one))
    layers = copies_in(s.room, size)
    return layers + (copies_in(s.room - layers, copied_head(s)) if layers else 0.0)


def copies_in(room: float, size: float) -> float:
    """Bytes of a copy for each direction, or for the first alone."""
    return size * min(2, room // size) if size else 0.0


def copied_head(s: Setup) -> float:
    """Of one copy of the head, where it is plain and frozen."""
    learns = s.tokens or head_adapter(s) or "lm_head" in ((s.lora.modules_to_save if s.lora else None) or [])
    return 0.0 if s.labels is not None or learns else float(s.frozen * s.shape.embedding)


def reference_bytes(s: Setup) -> float:
    """A second model, or a second copy of what is trained."""
    if s.second == "model":
        return float(s.frozen * s.shape.weights)
    return float(WIDE * policy_weights(s)) if s.second == "start" else 0.0


def state_bytes(optim: str, weights: float) -> float:
    return weights * next(size for pattern, size in STATE if re.match(pattern, optim))


# ── what a layer keeps for its backward ───────────────────────────────────────────────────────────────────────────────


def kept_by_layer(s: Setup) -> float:
    """Bytes that one layer keeps, all its tokens together, weights that autocast casts included."""
    shape, t, c = s.shape, s.rows.tokens, s.compute
    d, i, q, k = shape.hidden, shape.inner, shape.queries, shape.keys
    kept = (WIDE, WIDE) if s.full else (s.residual, c)  # a frozen norm keeps its input as it came (`engine/norms.py`)
    norms = shape.norms * t * kept[0] * d
    norms += t * kept[1] * (q + k) if shape.qk_norm else 0
    if s.full:  # the norms' own weights learn
        wide = WIDE if shape.scale_is_kept else c
        norms += shape.norms * t * WIDE * d + (t * wide * (q + k) if shape.qk_norm else 0)
    inner = shape.active * (2 + shape.gated) * t * c * i - (0 if shape.gated else t * c * i)
    inner += shape.active * t * c * (2 * d + i) if shape.experts else 0
    return norms + kept_by_linears(s) + t * c * (q + 2 * k) + kept_by_attention(s) + inner


def kept_by_layers(s: Setup) -> float:
    """That of all layers: those below the first adapter keep nothing, others without one less."""
    chosen = s.lora.layers_to_transform if s.lora is not None else None
    if s.lora is None or chosen is None:
        return s.shape.layers * kept_by_layer(s)
    bare = replace(s, lora=s.lora.model_copy(update={"target_modules": []}))
    adapted, first = blocks(s.shape, s.lora), 0 if s.tokens else min(chosen)
    return adapted * kept_by_layer(s) + max(0, s.shape.layers - first - adapted) * kept_by_layer(bare)


def kept_by_linears(s: Setup) -> float:
    """Inputs, which layers of one input share where nothing is cast; the narrow product of an adapter; and the copies
    of float32 weights in the format of products."""
    t, c, total = s.rows.tokens, s.compute, 0.0
    inputs: dict[str, int] = {}
    for linear in s.shape.linears():
        if s.lora is not None and s.adapts(linear):
            r = rank(s.lora, linear)
            cast = 0 if c == WIDE else c * r * (linear.wide_in + linear.wide_out)
            total += t * c * r + cast
            if s.plain(linear):
                inputs[linear.input] = linear.wide_in
            else:  # peft's chain: a copy of the input for each layer, and what dropout keeps of it
                total += t * c * linear.wide_in * (1 + 2 * bool(s.lora.lora_dropout))
            if s.lora.use_dora:  # what the base gives and what the adapter gives, each times the magnitudes
                total += 2 * t * c * linear.wide_out
        elif s.trains(linear):
            total += 0 if c == WIDE else c * linear.weights
            if c == s.residual or linear.input in ("heads", "inner"):
                inputs[linear.input] = linear.wide_in
            else:
                total += t * c * linear.wide_in
    return total + t * c * sum(inputs.values())


def kept_by_attention(s: Setup) -> float:
    """Probabilities of blocks that see few keys, on a CPU; elsewhere a sum for each query, and padded rows' outputs."""
    c, shape = s.compute, s.shape
    if s.attention == "eager":
        return sum((c + WIDE) * shape.heads * own * (own + back) for own, back in s.rows.segments)
    if s.device != "cpu" or s.rows.padded:
        return s.rows.tokens * (WIDE * shape.heads + (c * shape.queries if s.rows.padded else 0))
    return c * shape.heads * kept_scores(s.rows.segments)


def passing(s: Setup) -> float:
    """What a layer's backward has beside what was kept: gradients of the inner layer and of the float32 norms, and the
    weight that is written out for a product."""
    shape, t = s.shape, s.rows.tokens
    written = 0
    if s.quantization is not None:
        written = max(linear.weights for linear in shape.linears()) * s.compute
    inner = 2 * t * s.compute * shape.inner * shape.active
    return inner + t * shape.hidden * (s.residual + s.compute) + written


def drawing(s: Setup) -> float:
    """Bytes while answers are drawn: keys and values of all layers, the prompts in one layer, the last logits, and the
    adapters in the format of products."""
    if s.drawn is None:
        return 0.0
    shape, n = s.shape, s.drawn.answers
    c = WIDE if s.full else s.frozen
    cache = 2 * c * shape.layers * shape.keys * n * (s.drawn.prompt + s.drawn.new)
    prompts = c * n * s.drawn.prompt * (2 * shape.hidden + 3 * shape.inner * shape.active)
    copies = 0 if s.full else c * policy_weights(s)
    return cache + max(prompts, n * shape.vocabulary * (c + 3 * WIDE)) + copies
