"""Answers: batched generation with transformers' own generate."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from finetune_cli.engine.lora import bare, drawing
from finetune_cli.errors import TrainError
from finetune_cli.types import Prompt

BATCH = 50
"""Prompts answered together. Of alike lengths, so padding is small; memory is bound by the cache of keys and values."""


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """The text that follows each prompt, stop token left out, in the order of `prompts`. Temperature 0 is greedy.

    The draw depends on `seed` alone and leaves the run's own random state as it was. Where `stop` says so, what is
    answered so far comes back, the rest empty.
    """
    from transformers import GenerationConfig

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    texts = [""] * len(prompts)
    some = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    drawn = some if temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0] if stop_ids else 0
    ends = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": list(stop_ids) or None}
    config = GenerationConfig(**ends, **drawn)
    with torch.random.fork_rng(devices=_cuda()), half_copies(model), ready(model), drawing(model), whole_states(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), BATCH):
            if stop():
                break
            few = order[start : start + BATCH]
            found = continued(model, [prompts[i].ids for i in few], config, stop)
            for i, ids in zip(few, found, strict=True):
                texts[i] = tokenizer.decode(_until_stop(ids, stop_ids), skip_special_tokens=False)
    return texts


@contextmanager
def half_copies(model: Any) -> Iterator[None]:
    """Trained float32 weights as copies in the format of the frozen ones, for the time of generation: what autocast
    makes of them at every call, made once."""
    dtypes = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
    half = next((d for d in dtypes if d in (torch.bfloat16, torch.float16)), None)
    masters = [(p, p.data) for p in model.parameters() if p.requires_grad] if half is not None else []
    try:
        for p, _ in masters:
            p.data = p.data.to(half)
        yield
    finally:
        for p, master in masters:
            p.data = master


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """Without what the model's own generation_config would change of the distribution (repetition_penalty, top_k, ...):
    `generate` takes from it whatever it is not told."""
    from transformers import GenerationConfig

    stock = model.get_base_model() if hasattr(model, "peft_config") else model
    before = stock.generation_config
    stock.generation_config = GenerationConfig()
    try:
        yield
    finally:
        stock.generation_config = before


@contextmanager
def ready(model: Any) -> Iterator[None]:
    """The model as generation wants it."""
    before = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with plain(model):
            yield
    finally:
        model.train(before[0])
        model.config.use_cache = before[1]


@contextmanager
def whole_states(model: Any) -> Iterator[None]:
    """The head is given states that lie together. Of a prompt it gets the last position, a strided piece, for which
    PyTorch's CPU product repeats the head's weight once a row: 50 prompts took 2.7 GiB for SmolLM2-135M. Where it has a
    copy of its weight for the processor's products (`engine/packed.py`), they are made with it."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    packed = "packed" in head.__dict__ and "forward" not in head.__dict__
    if packed:
        head.forward = partial(bare, base=head)
    try:
        yield
    finally:
        hook.remove()
        if packed:
            del head.forward


def _cuda() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def continued(model: Any, prompts: Sequence[list[int]], config: Any, stop: Callable[[], bool]) -> list[list[int]]:
    """What `generate` writes behind each prompt under a GenerationConfig, pads included. Left-padded, so that every
    answer starts at the same place; pads are masked by length."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    width, pad = max(map(len, prompts)), config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    asked = StoppingCriteriaList([lambda ids, *_, **__: torch.full((len(ids),), stop(), device=ids.device)])
    drawn = LogitsProcessorList()
    if config.do_sample and config.top_p == 1.0:
        drawn.append(Drawn(config.temperature))
        config = copy.deepcopy(config)
        config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    given = {"input_ids": ids, "attention_mask": mask, "generation_config": config, "stopping_criteria": asked}
    given["logits_processor"] = drawn
    found: list[list[int]] = model.generate(**given)[:, width:].tolist()
    return found


class Drawn:
    """A token of each row drawn from all there are: it alone keeps a finite score, so that the greedy choice is it.

    By the inverse of the distribution function, which takes one random number a row. `torch.multinomial` takes one for
    every token of the vocabulary: 8 ms a token for eight rows of 49,152.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, _: torch.Tensor, scores_RV: torch.Tensor) -> torch.Tensor:
        p_RV = torch.softmax(scores_RV.float() / self.temperature, -1)
        upto_RV = p_RV.cumsum(-1, dtype=torch.float64)
        if not torch.isfinite(upto_RV[:, -1]).all():
            raise TrainError("the model's logits are not finite", "Lower train.learning_rate.")
        at_R1 = torch.rand(len(p_RV), 1, dtype=torch.float64, device=p_RV.device) * upto_RV[:, -1:]
        token_R1 = torch.searchsorted(upto_RV, at_R1, right=True)  # the first that reaches beyond it
        return torch.full_like(scores_RV, -torch.inf).scatter_(1, token_R1.clamp_max_(p_RV.shape[1] - 1), 0.0)


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((n for n, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
