"""Talking to what was trained: the run's own template, stop tokens and generation settings, token by token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from finetune_cli.data.chat import Chat
from finetune_cli.engine import models
from finetune_cli.engine.generate import half_copies
from finetune_cli.engine.manifest import BASE
from finetune_cli.engine.models import Location
from finetune_cli.errors import DataError, ModelError
from finetune_cli.plan import facts
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.sections import Generation, Model

Say = Callable[[str], None]
WEIGHTS = ("adapter_config.json", "config.json")
START = "start"
"""The name of the adapter that a run started from, beside its own."""


@dataclass(frozen=True)
class Target:
    """What is talked to: where its weights are, and what it was before, where it is of a run."""

    after: Location
    before: Location | None
    plan: Plan | None

    @property
    def generation(self) -> Generation:
        return self.plan.recipe.generation if self.plan is not None else Generation()

    @property
    def dtype(self) -> torch.dtype:
        """The format of the run's weights as they were multiplied; bfloat16 for a model without a run."""
        return getattr(torch, self.plan.resolved.dtype) if self.plan is not None else torch.bfloat16


def find(name: str) -> Target:
    """A run, one of its checkpoints, its merged model; or any model. Raises DataError and ModelError."""
    folder = Path(name)
    home = next((place for place in (folder, folder.parent) if (place / "plan.json").exists()), None)
    if home is None:
        asked = Model(name_or_path=name)
        return Target(models.locate(asked, base_of_adapter=facts.look(name).base), None, None)
    plan = plan_of(home)
    if not plan.recipe.method.generates:
        raise ModelError(f"{home} was trained with {plan.recipe.method.name}: it scores, it does not answer")
    if not any((folder / file).exists() for file in WEIGHTS):
        found = sorted(home.glob("checkpoint-*"))
        hint = f"Name a checkpoint: {found[-1]}." if found else "It has no checkpoint yet."
        raise DataError(f"{folder} has no result: the run has not come to its end", hint)
    before = models.locate(plan.recipe.model, base_of_adapter=plan.facts.base)
    if before.merge is not None:
        before = Location(str(home / BASE), {})
    if (folder / WEIGHTS[0]).exists():
        return Target(Location(before.name, before.kwargs, adapter=str(folder)), before, plan)
    return Target(Location(str(folder), {"trust_remote_code": plan.recipe.model.trust_remote_code}), before, plan)


def plan_of(run: Path) -> Plan:
    try:
        return Plan.model_validate_json((run / "plan.json").read_text(encoding="utf-8"))
    except ValidationError as error:
        raise DataError(
            f"{run / 'plan.json'} is of another version of finetune",
            f"Load {run} in Python, or train again with this version.",
        ) from error


class Speaker:
    """A loaded model that answers; `before` as the run found it."""

    def __init__(self, target: Target, generation: Generation, *, with_before: bool) -> None:
        if with_before and target.before is None:
            raise DataError("--before needs a run: this is a model, and it has no before")
        self.generation, self.target = generation, target
        asked = target.plan.recipe.model if target.plan is not None else Model(name_or_path=target.after.name)
        self.tokenizer = models.load_tokenizer(asked, target.after)
        self.stops = models.declared_stops(target.after, self.tokenizer)
        self.chat = Chat.bind(self.tokenizer, stop_ids=self.stops, template_mismatch="render")
        self.model = self._load(target.after)
        self.other = self._before(target) if with_before else None

    def _before(self, target: Target) -> Any:
        """The model as it was: the same one with its adapter off or exchanged; another one in full fine-tuning."""
        assert target.before is not None
        if target.after.adapter is None:
            return self._load(target.before)
        if target.before.adapter is not None:
            self.model.load_adapter(target.before.adapter, START)
        return self.model

    def _load(self, location: Location) -> Any:
        from transformers import AutoModelForCausalLM

        more = models.quantised(self.target.plan) if self.target.plan is not None else {}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                location.name, dtype=self.target.dtype, **location.kwargs, **more
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{location.name} cannot be loaded: {error}", models.HUB_HINT) from error
        if "gguf_file" in location.kwargs:
            models.forget_quantisation(model)
        if location.adapter is not None:
            from peft import PeftModel

            if models.brings_tokens(location.adapter):
                models.make_room(model, self.tokenizer)
            model = PeftModel.from_pretrained(model, location.adapter)
        if not more:
            model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        return model.eval()

    @contextmanager
    def _as_before(self) -> Iterator[Any]:
        assert self.other is not None
        if self.other is not self.model:
            yield self.other
        elif START in self.model.peft_config:
            own = self.model.active_adapter
            self.model.set_adapter(START)
            try:
                yield self.model
            finally:
                self.model.set_adapter(own)
        else:
            with self.model.disable_adapter():
                yield self.model

    def ids(self, messages: Sequence[dict[str, Any]], *, raw: bool = False) -> list[int]:
        """What the model is fed: the conversation in the template that was trained with; or the text as it is."""
        if raw or self.chat.template is None:
            return [*self.chat.encoder.lead, *self.chat.encoder.one(str(messages[-1]["content"]))]
        return self.chat.encoder.one(self.chat.feeds({}, list(messages)))

    @torch.no_grad()
    def answer(self, ids: Sequence[int], say: Say, *, before: bool = False) -> str:
        """Generate, telling `say` each piece as it comes; the whole answer, stop token left out."""
        from transformers import GenerationConfig

        asked = self.generation
        drawn = {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p}
        config = GenerationConfig(
            max_new_tokens=asked.max_new_tokens,
            eos_token_id=self.stops or None,
            pad_token_id=self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else (self.stops or [0])[0],
            **(drawn if asked.temperature > 0 else {"do_sample": False}),
        )
        pieces: list[str] = []

        def hear(text: str) -> None:
            pieces.append(text)
            say(text)

        with self._as_before() if before else nullcontext(self.model) as model, half_copies(model):
            given = torch.tensor([list(ids)], device=model.device)
            streamer = Streamer(self.tokenizer, self.stops, hear)
            model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), generation_config=config, streamer=streamer
            )
        return "".join(pieces)


class Streamer:
    """What transformers' `generate` gives its tokens to: text as soon as it is whole characters."""

    def __init__(self, tokenizer: Any, stops: Sequence[int], say: Say) -> None:
        self.tokenizer, self.stops, self.say = tokenizer, set(stops), say
        self.ids: list[int] = []
        self.told = 0
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += [token for token in value.reshape(-1).tolist() if token not in self.stops]
        text = self.tokenizer.decode(self.ids, skip_special_tokens=False)
        if not text.endswith("�"):  # half of a character: its other tokens are still to come
            self._tell(text)

    def end(self) -> None:
        self._tell(self.tokenizer.decode(self.ids, skip_special_tokens=False))

    def _tell(self, text: str) -> None:
        if len(text) > self.told:
            self.say(text[self.told :])
            self.told = len(text)
