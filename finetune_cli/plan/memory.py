"""How much memory a run needs, from configuration alone: the worst moment of a step, whom it fits, what would save.

Measured against the live bytes of real steps by `scripts/measure_memory.py`; the grid is in `benchmarks/`. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from finetune_cli.methods.online import Online
from finetune_cli.plan.footprint import (
    BYTES,
    GIB,
    WIDE,
    Drawn,
    Estimate,
    Line,
    Rows,
    Setup,
    adapter_weights_of,
    copied_bytes,
    drawing,
    frozen_bytes,
    head_adapter,
    kept_by_layer,
    kept_by_layers,
    passing,
    reference_bytes,
    room_for_copies,
    state_bytes,
    trained_weights,
)  # fmt: skip
from finetune_cli.plan.resolve import Plan
from finetune_cli.plan.shape import Shape, config_of, read_json
from finetune_cli.recipe.sections import Lora, Quantization, Recipe
from finetune_cli.types import Row

BUCKET = 2**26
"""Gradients that DeepSpeed sums at once; it holds room for them all the time, by its own choice for 500 million."""
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Of `engine/score.py`."""


# ── what the head needs ───────────────────────────────────────────────────────────────────────────────────────────────


class HeadRoom(NamedTuple):
    """Bytes while logits are made, and in the head's backward."""

    forward: float
    backward: float


def head_room(s: Setup) -> HeadRoom:
    """Of chunks of logits; nothing where the head is not over the vocabulary."""
    shape, c = s.shape, s.compute
    if s.labels is not None:
        return HeadRoom(0.0, 0.0)
    v = shape.vocabulary
    n = max(1, s.rows.targets)
    rows = min(n, max(16, CHUNK_LOGITS["cpu" if s.device == "cpu" else "cuda"] // v))
    trained = s.full or head_adapter(s) or "lm_head" in ((s.lora.modules_to_save if s.lora else None) or [])
    if s.tokens:  # the head's weight with the trained rows in it, and its gradient, are made for each chunk
        made_of = n * shape.hidden * s.residual + 3 * rows * v * WIDE
        return HeadRoom(made_of + s.frozen * shape.embedding, made_of + 3 * s.frozen * shape.embedding)
    if not trained:
        product = 0 if s.frozen == WIDE else s.frozen
        bent = 3 * WIDE if shape.softcap else 0
        kept = n * shape.hidden * 2 * s.residual
        return HeadRoom(rows * v * (product + 3 * WIDE + bent) + kept, kept)  # the third: entropy is being summed
    states = n * shape.hidden * s.residual
    cast = 0 if c == WIDE else c * shape.embedding
    made = 0 if not (s.full or not head_adapter(s)) else (c if c < WIDE else 0) + WIDE
    many = WIDE if n > rows else 0  # the sum over chunks beside the share of one
    logits = rows * v * WIDE
    return HeadRoom(3 * logits + cast + states, 3 * logits + cast + states + (made + many) * shape.embedding)


# ── the worst moment ──────────────────────────────────────────────────────────────────────────────────────────────────


def estimate(s: Setup) -> Estimate:
    """Of one process. The moments: the head's forward, the head's backward, the last layer's backward (the first to
    run), the first layer's backward, the optimiser's step; of a method that draws answers, that too."""
    shape, t = s.shape, s.rows.tokens
    trained, share = trained_weights(s), s.processes if s.sharded else 1
    gradients = WIDE * trained / share * (1 + (s.processes > 1 and not s.sharded))
    there = gradients if s.accumulates else gradients / 2 if s.drawn is not None else 0.0  # the policy's, then
    layer = kept_by_layer(s)
    between = t * s.residual * shape.hidden
    every = (shape.layers * between if s.checkpointing else kept_by_layers(s)) + t * WIDE * shape.hidden + between
    casts = 0.0
    if s.full and s.compute < WIDE and s.checkpointing:  # kept by autocast until the forward ends
        casts = s.compute * shape.layers * sum(linear.weights for linear in shape.linears())
    again = layer if s.checkpointing else 0.0
    beside = every if s.drawn is not None and s.drawn.scored_once else 0.0  # the critic's graph
    room = head_room(s)
    last = WIDE * (shape.head or shape.embedding) if s.full and not s.labels else 0.0
    embedding = WIDE * shape.embedding * (2 if shape.tied else 1) if s.full else 0.0
    moments = {
        "the head's forward": (every + casts, room.forward, there),
        "the head's backward": (every + beside, room.backward, there),
        "the last layer's backward": (every + beside + again, passing(s), max(there, last)),
        "the first layer's backward": (again or layer, passing(s), gradients),
        "the embedding's backward": (0.0, embedding, gradients - (WIDE * shape.embedding if s.full else 0)),
        "the optimiser's step": (0.0, 0.0, gradients),
        "the drawing of answers": (0.0, drawing(s), 0.0),
    }
    moment, (kept, scratch, grads) = max(moments.items(), key=lambda pair: sum(pair[1]))
    state = state_bytes(s.optim, trained) / share
    lines = [
        ("frozen weights", frozen_bytes(s) / share, _frozen_about(s)),
        ("copies of frozen weights", copied_bytes(s), "as the processor multiplies with them"),
        ("trained weights", WIDE * trained / share, f"{trained:,} in float32"),
        ("gradients", grads, "float32"),
        ("optimiser state", state, s.optim),
        (
            "DeepSpeed",
            WIDE * (trained / share + BUCKET) if s.deepspeed else 0.0,
            "what is trained again, and its bucket",
        ),
        ("reference", reference_bytes(s) / share, "a second model" if s.second == "model" else "copies"),
        ("reward models", s.judges, "frozen"),
        ("activations", kept, f"{t:,} tokens" + (", recomputed by layer" if s.checkpointing else "")),
        ("logits and passing tensors", scratch, f"at {moment}"),
    ]
    told = [Line(what=what, bytes=float(size), about=about) for what, size, about in lines if size]
    return Estimate(lines=told, moment=moment, rows=s.rows, sure=shape.known and not s.rows.padded)


def _frozen_about(s: Setup) -> str:
    names = {4: "float32", 2: "16 bits"}
    if s.quantization is None:
        return names[s.frozen]
    return f"{'4' if s.quantization.load_in_4bit else '8'} bits, the rest in {names[s.frozen]}"


# ── from a plan ───────────────────────────────────────────────────────────────────────────────────────────────────────


def batch_of(plan: Plan) -> int:
    """Units of a forward; one where `auto` is yet to try how many fit."""
    batch = plan.recipe.train.per_device_train_batch_size
    return 1 if batch == "auto" else batch


def longest(plan: Plan) -> Rows:
    """The rows of a forward that fills `data.max_length` everywhere, each token a target: no forward needs more."""
    method, length = plan.recipe.method, plan.recipe.data.max_length
    if method.answers:
        new, prompts = plan.recipe.generation.max_new_tokens, batch_of(plan)
        return Rows(segments=spread(length, [new] * method.answers) * prompts, targets=method.answers * new * prompts)
    branches = 1 if method.bin_tokens(length) is not None else method.branches
    segments = [(length, 0)] * (batch_of(plan) * branches)
    return Rows(segments=segments, targets=sum(own for own, _ in segments))


DRAWN_AT_ONCE = 64
"""Of `engine/rollout.py`."""


def drawn(plan: Plan) -> Drawn | None:
    """The most answers that a process draws together, in a step or in an evaluation."""
    recipe, resolved = plan.recipe, plan.resolved
    if not recipe.method.answers:
        return None
    step = recipe.method.answers * resolved.global_batch_size // resolved.num_processes
    tried = 0 if recipe.eval.eval_strategy == "no" else recipe.eval.metric_rows
    answers, new = min(DRAWN_AT_ONCE, max(step, tried)), recipe.generation.max_new_tokens
    return Drawn(answers, recipe.data.max_length, new, scored_once(plan))


def scored_once(plan: Plan) -> bool:
    """Whether the forwards that score drawn answers are those of the first update as well, their graphs kept until
    then: where it is one forward of all answers, nothing is dropped out, and the recipe neither asks to save memory nor
    for the largest forward that fits."""
    recipe, resolved, lora = plan.recipe, plan.resolved, adapters(plan)
    all_at_once = recipe.method.parts == 1 and resolved.gradient_accumulation_steps == 1
    chosen = recipe.train.per_device_train_batch_size != "auto" and not resolved.gradient_checkpointing
    return all_at_once and chosen and not (lora is not None and lora.lora_dropout)


def extent(rows: Sequence[Row], *, padded: bool) -> Rows:
    """What `rows` are as one forward, in the layout of `data/batches.py`."""
    targets = sum(row.targets for row in rows)
    if padded:
        width = max(row.longest for row in rows)
        return Rows(segments=[(width, 0)] * sum(len(row.branches) for row in rows), targets=targets, padded=True)
    segments: list[tuple[int, int]] = []
    for row in rows:
        segments += spread(len(row.prefix), [len(branch.ids) for branch in row.branches])
    return Rows(segments=segments, targets=targets)


def spread(prefix: int, branches: Sequence[int]) -> list[tuple[int, int]]:
    """The segments of a row."""
    if len(branches) == 1:
        return [(prefix + branches[0], 0)]
    return [(prefix, 0), *((own, prefix) for own in branches)]


def judges(plan: Plan) -> float:
    """Bytes of the reward models that can be read of: an adapter on the policy's base, or a model of its own."""
    method, total = plan.recipe.method, 0.0
    if not isinstance(method, Online):
        return total
    own = plan.facts.base or plan.recipe.model.name_or_path
    for source in (reward.source for reward in method.reward):
        adapter = read_json(Path(source) / "adapter_config.json")
        base = str(adapter.get("base_model_name_or_path")) if adapter is not None else None
        config = config_of(source, base=base)
        shape = Shape.of(config) if config is not None else None
        if shape is None:
            continue
        if adapter is not None:
            total += WIDE * adapter_weights_of(shape, Lora.model_validate(known_keys(adapter)))
        total += 0 if base == own else BYTES[plan.resolved.dtype] * (shape.weights - shape.head)
    return total


def known_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an adapter's configuration that a recipe has, too."""
    told = {key: config[key] for key in Lora.model_fields if config.get(key) is not None}
    return {key: value for key, value in told.items() if key != "trainable_token_indices"}


def adapters(plan: Plan) -> Lora | None:
    """The recipe's, or those of the adapter that the run goes on with."""
    if plan.facts.kind != "adapter":
        return plan.recipe.lora
    config = read_json(Path(plan.recipe.model.name_or_path) / "adapter_config.json") or {}
    return Lora.model_validate(known_keys(config))


def setup(
    plan: Plan, rows: Rows | None = None, *, config: Mapping[str, Any] | None = None, batch: int | None = None
) -> Setup | None:
    """`batch` is the one that was found where the recipe has `auto`, `config` that of the loaded model.
    None where there is none and it is not on this machine either, or where it
    is of no kind that is known here."""
    recipe, resolved = plan.recipe, plan.resolved
    if config is None:
        config = config_of(recipe.model.name_or_path, base=plan.facts.base, revision=recipe.model.revision)
    shape = Shape.of(config) if config is not None else None
    if shape is None:
        return None
    reference = resolved.reference
    second = None if reference is None or reference.precompute or reference.kind == "adapter off" else reference.kind
    return Setup(
        shape=shape, rows=rows or longest(plan), device=plan.machine.device, lora=adapters(plan),
        quantization=recipe.quantization,
        frozen=BYTES[resolved.dtype], compute=BYTES[resolved.precision], optim=recipe.train.optim,
        checkpointing=resolved.gradient_checkpointing, accumulates=resolved.gradient_accumulation_steps > 1,
        processes=resolved.num_processes, sharded=resolved.strategy != "ddp", labels=recipe.method.labels(),
        second=second, attention=resolved.attn_implementation, drawn=drawn(plan),
        judges=judges(plan), tokens=learned_tokens(recipe), batch=batch or batch_of(plan),
        deepspeed=resolved.strategy == "deepspeed-zero3", room=room_of(plan),
    )  # fmt: skip


def room_of(plan: Plan) -> float:
    """Bytes that a process may take for copies of frozen weights; none where weights are cut into pieces, and where
    checkpointing says that memory is dearer than time."""
    resolved, machines = plan.resolved, plan.recipe.launch.num_machines
    if plan.machine.device != "cpu" or resolved.strategy != "ddp" or resolved.gradient_checkpointing:
        return 0.0
    if resolved.dtype != "bfloat16" or not plan.machine.cpu_bf16:
        return 0.0
    return room_for_copies(plan.machine.memory_gib, resolved.num_processes // machines)


def learned_tokens(recipe: Recipe) -> int:
    """Rows of the embedding that are trained beside adapters."""
    if recipe.lora is None or "embed_tokens" in (recipe.lora.modules_to_save or []):
        return 0
    return len({*(recipe.model.new_tokens or []), *(recipe.lora.trainable_token_indices or [])})


GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
"""Sizes of GPUs, GB."""
CONTEXT_GIB, LOST = 0.6, 0.06
"""What a GPU's driver and kernels take, and the share that the allocator cannot use."""


def fits(gib: float) -> list[int]:
    """The GPU sizes, GB, that hold one process."""
    return [size for size in GPUS if gib + CONTEXT_GIB <= size * 1e9 / GIB * (1 - LOST)]


def on_gpu(s: Setup) -> Setup:
    """The same run on a GPU, whose chunks of logits are larger and whose attention keeps no probabilities."""
    return s if s.device == "cuda" else replace(s, device="cuda", attention="varlen")


class Knob(NamedTuple):
    """A setting that would need less, and how much less, GiB."""

    setting: str
    saving: float


def knobs(s: Setup) -> list[Knob]:
    """The settings that save most, best first, of those that save at least 2%."""
    before, rows = estimate(s), s.rows
    changed: dict[str, Setup] = {}
    if not s.checkpointing:
        changed["train.gradient_checkpointing: true"] = replace(s, checkpointing=True)
    if s.batch > 1:
        half = rows.segments[: len(rows.segments) // 2]
        fewer = Rows(segments=half, targets=rows.targets // 2, padded=rows.padded)
        changed[f"train.per_device_train_batch_size: {s.batch // 2}"] = replace(s, rows=fewer)
    halves = [(own // 2, back // 2) for own, back in rows.segments]
    shorter = Rows(segments=halves, targets=rows.targets // 2, padded=rows.padded)
    changed["half of data.max_length"] = replace(s, rows=shorter)
    if s.full:
        changed["lora: {}"] = replace(s, lora=Lora(), frozen=s.compute)
        changed["train.optim: adamw_8bit"] = replace(s, optim="adamw_8bit")
    elif s.quantization is None:
        changed["quantization: {load_in_4bit: true}"] = replace(s, quantization=Quantization(load_in_4bit=True))
    if s.compute == WIDE:
        changed["train.precision: bf16"] = replace(s, compute=2, frozen=2)
    found = [Knob(name, before.gib - estimate(one).gib) for name, one in changed.items()]
    return sorted((k for k in found if k.saving > 0.02 * before.gib), key=lambda k: -k.saving)


def remembered(plan: Plan) -> Plan:
    """The plan with its estimate."""
    found = setup(plan)
    return plan if found is None else plan.model_copy(update={"memory": estimate(found)})
