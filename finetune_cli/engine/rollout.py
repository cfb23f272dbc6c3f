"""Rollouts: an answer drawn for every prompt, as tokens. `Generator` is where another engine may take over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from finetune_cli.engine.generate import continued, half_copies, ready, whole_states
from finetune_cli.engine.lora import drawing

AT_ONCE = 64
"""Answers drawn together, of prompts of alike length; memory is bound by the cache of their keys and values."""


class Generator(Protocol):
    """What draws answers. It must draw from the policy's own distribution at `temperature`, nothing cut off."""

    def __call__(self, prompts: Sequence[list[int]], *, temperature: float, seed: int) -> list[list[int]]:
        """An answer to each prompt, in their order, its stop token included; temperature 0 is greedy."""


@dataclass(frozen=True)
class Local:
    """transformers' own generate with its cache of keys and values, on the bare model of this process."""

    model: Any
    stop_ids: Sequence[int]
    pad_id: int
    max_new_tokens: int
    stop: Callable[[], bool] = lambda: False
    """Whether to end early: what is drawn so far comes back, the rest is empty."""

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[int]], *, temperature: float, seed: int) -> list[list[int]]:
        """The draw depends on weights, prompts and `seed` alone, and leaves the run's own random state as it was."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[list[int]] = [[] for _ in prompts]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        config = self.config(temperature)
        with (
            torch.random.fork_rng(devices=devices),
            ready(self.model),
            half_copies(self.model),
            drawing(self.model),
            whole_states(self.model),
        ):
            torch.manual_seed(seed)
            for start in range(0, len(order), AT_ONCE):
                some = order[start : start + AT_ONCE]
                if self.stop():
                    break
                drawn = continued(self.model, [prompts[i] for i in some], config, self.stop)
                for i, ids in zip(some, drawn, strict=True):
                    found[i] = through_stop(ids, self.stop_ids)
        return found

    def config(self, temperature: float) -> Any:
        from transformers import GenerationConfig

        # top_k has a default of 50: what is drawn would not be what the log-probabilities are of
        whole = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.pad_id,
            eos_token_id=list(self.stop_ids) or None,
            **(whole if temperature > 0 else {"do_sample": False}),
        )


def through_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """What comes first of the ids up to and with a stop token; what follows it is padding."""
    end = next((n + 1 for n, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def without_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stop_ids else ids
