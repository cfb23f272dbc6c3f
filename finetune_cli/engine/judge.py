"""Reward models: a score for each answer, by a sequence classifier with one label.

An adapter that `method: reward` trained on the policy's own base is switched in on the policy's weights; any other is
loaded beside it, frozen. A model with the policy's vocabulary is fed the very tokens; another the text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune_cli.data.chat import Chat
from finetune_cli.data.rows import Given
from finetune_cli.engine import layout, models, reference
from finetune_cli.engine.actor import Actor
from finetune_cli.engine.role import RewardRole
from finetune_cli.errors import ModelError
from finetune_cli.recipe.sections import Model
from finetune_cli.types import Branch, Row

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job

HEADS = {"score", "classifier"}
PLAIN = (True, False, "gaussian")
"""Values of `init_lora_weights` that leave the base as it is."""


@dataclass(frozen=True)
class Answers:
    """Answers side by side with what they answer."""

    rows: list[Row]
    """Tokens: a row for each prompt, a branch for each of its answers."""
    prompts: list[str]
    """As the model reads them, once for each answer."""
    responses: list[str]
    """Without the stop token."""
    data: list[Given]
    """The rows of the data, once for each answer."""


Judge = Callable[[Answers], Sequence[Any]]


def judge_of(source: str, name: str, job: "Job", actor: Actor, chat: Chat) -> Judge:
    """A reward model as a function of answers. Raises ModelError where it cannot be had or has no single score."""
    location = reference.located(source)
    tokenizer = models.load_tokenizer(Model(name_or_path=source), location)
    same = tokenizer.get_vocab() == job.tokenizer.get_vocab()
    if same and shares(location, job, actor):
        add_adapter(actor, str(location.adapter), name)
        score: Callable[[list[Row]], list[float]] = lambda rows: by_adapter(rows, name, job, actor)  # noqa: E731
    else:
        score = beside(location, job)
    if same:
        tail = after_stop(chat)
        return lambda answers: score(closed(answers, tail, set(job.stop_ids)))
    return lambda answers: score(in_other_words(answers, tokenizer))


def shares(location: models.Location, job: "Job", actor: Actor) -> bool:
    """Whether the model is an adapter on the policy's own base, whose weights it was trained on as they are."""
    if location.adapter is None or not actor.adapted or not models.is_classifier(location.adapter):
        return False
    from peft import PeftConfig

    own = models.locate(job.recipe.model, base_of_adapter=job.plan.facts.base)
    plain: Any = PeftConfig.from_pretrained(location.adapter)
    return (
        own.merge is None
        and own.name == location.name
        and plain.peft_type == "LORA"
        and plain.init_lora_weights in PLAIN
        and set(plain.modules_to_save or ()) <= HEADS  # others would take the place of the policy's own
    )


def add_adapter(actor: Actor, folder: str, name: str) -> None:
    """Put a reward model's adapter and its head beside the policy's."""
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    config: Any = PeftConfig.from_pretrained(folder)
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", True
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    heads = [key for key in weights if key.endswith("score.weight")]
    if len(heads) != 1:
        raise ModelError(f"{folder} has no `score` head", "Name a reward model.")
    head_KD = weights.pop(heads[0])
    one_label(head_KD.shape[0], folder)
    model: Any = actor.model
    model.add_adapter(name, config)
    set_peft_model_state_dict(model, weights, adapter_name=name)
    score = nn.Linear(head_KD.shape[1], 1, bias=False, device=model.device, dtype=torch.float32)
    with torch.no_grad():
        score.weight.copy_(head_KD)
    actor.add_judge(name, score)


def one_label(labels: int, source: str) -> None:
    if labels != 1:
        raise ModelError(f"method.reward {source} gives {labels} scores", "Use a model with one label (num_labels: 1).")


def chunks(rows: list[Row], job: "Job") -> list[list[Row]]:
    """As many rows at once as training takes."""
    size = job.schedule.per_device_batch_size
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@torch.no_grad()
def by_adapter(rows: list[Row], name: str, job: "Job", actor: Actor) -> list[float]:
    training = actor.training
    actor.eval()
    found: list[float] = []
    for some in chunks(rows, job):
        found += actor(job.batch(some, measure=False), name).reward_RK[:, 0].tolist()
    actor.train(training)
    return found


def beside(location: models.Location, job: "Job") -> Callable[[list[Row]], list[float]]:
    """A model of its own, frozen."""
    from transformers import AutoModelForSequenceClassification

    dtype = getattr(torch, job.plan.resolved.dtype)
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(location.name, **asked(location, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"method.reward {location.name} cannot be loaded: {error}", models.HUB_HINT) from error
    if location.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, location.adapter)
    one_label(model.config.num_labels, location.adapter or location.name)
    model.requires_grad_(False)
    stock = model.get_base_model() if location.adapter is not None else model
    decoder = hasattr(stock, "score")
    if decoder:
        stock.score.float()  # scores are float32 numbers (`role.RewardRole`)
    role = job.accelerator.prepare_model(RewardRole(model) if decoder else model, evaluation_mode=True).eval()
    as_padded = not decoder or layout.choose(stock, job.recipe.model) is not None

    @torch.no_grad()
    def score(rows: list[Row]) -> list[float]:
        found: list[float] = []
        for some in chunks(rows, job):
            batch = job.batch(some, measure=False, as_padded=as_padded)
            given = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT}
            found += (role(batch).reward_RK if decoder else role(**given).logits.float())[:, 0].tolist()
        return found

    return score


def asked(location: models.Location, dtype: torch.dtype) -> dict[str, Any]:
    """One score, where an adapter brings the head for it; else what the model has."""
    return {**location.kwargs, "dtype": dtype, **({"num_labels": 1} if location.adapter is not None else {})}


def after_stop(chat: Chat) -> list[int]:
    """What the chat template writes after the stop token of an answer: a reward model reads its score behind it."""
    if chat.template is None:
        return []
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (branch,) = next(chat.conversation({"messages": messages}, loss_on="assistant")).branches
    return branch.ids[len(branch.ids) - branch.trained[::-1].index(True) :]


def closed(answers: Answers, tail: list[int], stops: set[int]) -> list[Row]:
    """The rows as a reward model was trained on them: rendered to the end where the template rendered the prompt."""
    rendered = iter(not isinstance(given.row.get("prompt"), str) for given in answers.data)

    def whole(branch: Branch) -> Branch:
        ids = [*branch.ids, *tail] if next(rendered) and branch.ids[-1] in stops else branch.ids
        return Branch(ids, [True] * len(ids))

    return [replace(row, branches=tuple(whole(branch) for branch in row.branches)) for row in answers.rows]


def in_other_words(answers: Answers, tokenizer: Any) -> list[Row]:
    """The same conversations as another tokenizer writes them."""
    rows = [given.row for given in answers.data]
    texts = [text_for(tokenizer, *each) for each in zip(answers.prompts, answers.responses, rows, strict=True)]
    return [Row([], (Branch(ids, [True] * len(ids)),)) for ids in texts]


def text_for(tokenizer: Any, prompt: str, response: str, row: Mapping[str, Any]) -> list[int]:
    said = row.get("messages", row.get("prompt"))
    if tokenizer.chat_template is None or not isinstance(said, list):
        text, special = (said if isinstance(said, str) else prompt) + response, True
    else:
        asked = said[:-1] if said[-1]["role"] == "assistant" else said
        messages, own = [*asked, {"role": "assistant", "content": response}], row.get("chat_template_kwargs") or {}
        text = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False, **own)
        special = False
    ids: list[int] = tokenizer(text, add_special_tokens=special, truncation=True)["input_ids"]
    return ids
