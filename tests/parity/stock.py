"""What stock transformers says of pairs: padded on the right, nothing shared, the plain attention; and gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_cli.engine.loop import Sums, optimiser_step
from finetune_cli.types import Row

EDGES: list[tuple[list[int], list[int], list[int]]] = [
    ([], [40, 41, 42], [50, 51]),
    ([33], [60, 61, 62, 63], [60, 71, 72]),
    (list(range(100, 160)), [80, 81, 82], [90, 91, 92, 93, 94, 95]),
    ([20, 21, 22, 23], [30], [31, 32, 33]),
    ([200, 201, 202], [45, 46, 47], [45, 46, 47]),
    ([210, 211], [55, 56, 57, 58, 59], [59]),
]
"""(prompt, chosen, rejected) ids: prompts of length 0, 1 and long, branches of one token, the same answer twice."""


def token_rows(pairs: Sequence[tuple[list[int], list[int], list[int]]]) -> list[dict[str, Any]]:
    """Rows of tokenised pairs whose labels say where the prompt ends."""
    return [
        {
            f"{kind}_{side}": (asked if kind == "input_ids" else [-100] * len(asked)) + said
            for side, said in (("chosen", chosen), ("rejected", rejected))
            for kind in ("input_ids", "labels")
        }
        for asked, chosen, rejected in pairs
    ]


def sequences(rows: Sequence[Row]) -> list[tuple[list[int], list[bool]]]:
    """(ids, trained) of every branch with its prefix before it."""
    return [
        ([*row.prefix, *branch.ids], [False] * len(row.prefix) + branch.trained)
        for row in rows
        for branch in row.branches
    ]


def token_logps(model: Any, found: Sequence[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor, Tensor]:
    """(log p [S, T-1], trained [S, T-1], is a token [S, T-1]) of right-padded sequences, from all logits."""
    width = max(len(ids) for ids, _ in found)
    ids_ST, mask_ST = torch.zeros(len(found), width, dtype=torch.long), torch.zeros(len(found), width, dtype=torch.long)
    trained_ST = torch.zeros(len(found), width, dtype=torch.bool)
    for s, (ids, trained) in enumerate(found):
        ids_ST[s, : len(ids)], mask_ST[s, : len(ids)] = torch.tensor(ids), 1
        trained_ST[s, : len(ids)] = torch.tensor(trained)
    logits_STV = model(input_ids=ids_ST, attention_mask=mask_ST).logits
    logps = logits_STV[:, :-1].log_softmax(-1).gather(2, ids_ST[:, 1:, None])[..., 0]
    return logps, trained_ST[:, 1:], mask_ST[:, 1:].bool()


def first_step(job: Any) -> tuple[dict[str, float], float, dict[str, Tensor]]:
    """(numbers, gradient norm, gradients by stock name) of our first step."""
    grads: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        role = job.accelerator.unwrap_model(job.policy)
        grads.update({n: p.grad.clone() for n, p in role.model.named_parameters() if p.grad is not None})

    job.optimizer.optimizer.register_step_pre_hook(keep)
    job.policy.train()
    sums = Sums()
    norm, _, _ = optimiser_step(job, 0, measure=False, sums=sums)
    return sums.means(job), norm, grads


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def norm_of(grads: dict[str, Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in grads.values()]).norm())


def assert_equal_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor], relative: float) -> None:
    assert mine.keys() == theirs.keys()
    off = {name: float((mine[name] - wanted).norm() / wanted.norm()) for name, wanted in theirs.items()}
    worst = max(off, key=lambda name: off[name])  # a gradient of norm 0 gives nan, which is no number below
    assert all(value < relative for value in off.values()), (worst, off[worst])


def causal_model(folder: Path, adapter: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def adapter_folder(model_folder: Path, folder: Path, *, seed: int = 3) -> Path:
    """A saved adapter whose B is not zero: with B = 0 every margin is 0, which proves nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(causal_model(model_folder), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder
