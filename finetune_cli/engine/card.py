"""The model card: what was trained on what, and the numbers before and after. No place of this machine, no secret."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.secrets import mask

BUILTIN = "builtin:"


def card(plan: Plan, report: Mapping[str, Any], *, adapted: bool) -> str:
    """Markdown with the front matter that the hub reads."""
    method, name = plan.recipe.method, base_name(plan)
    table = numbers(report)
    kind = "An adapter for" if adapted else "A fine-tuned copy of"
    return mask(
        f"---\n{front_matter(plan, adapted=adapted)}---\n\n# {plan.run.name}\n\n"
        f"{kind} `{name}`, trained with {method.name} on {trained_rows(report)} rows "
        f"({report['tokens']['trained']} trained tokens, {report['steps']} steps of "
        f"{plan.resolved.global_batch_size} rows). The weights are those of step {report['result']['step']} "
        f"({report['result']['is']}).\n\n{beside(plan, adapted=adapted)}{table}{settings(plan)}"
    )


def front_matter(plan: Plan, *, adapted: bool) -> str:
    """YAML. `base_model` and `datasets` only where they are on the hub: a path means nothing to others."""
    method = plan.recipe.method
    told: dict[str, Any] = {
        "library_name": "peft" if adapted else "transformers",
        "pipeline_tag": "text-generation" if method.generates else "text-classification",
        "tags": ["finetune", method.name, *(["lora"] if adapted else [])],
        "model_name": plan.run.name,
    }
    base = plan.facts.base or plan.recipe.model.name_or_path
    if on_hub(base) and plan.facts.kind != "merged":
        told |= {"base_model": base, "base_model_relation": "adapter" if adapted else "finetune"}
    rows = [source.path for source in plan.recipe.data.train if on_hub(source.path)]
    told |= {"datasets": rows} if rows else {}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True)


def on_hub(name: str) -> bool:
    """Named as `owner/name`; what is on this machine has become an absolute path, or ends in .gguf."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~", BUILTIN)) and not name.endswith(".gguf")


def base_name(plan: Plan) -> str:
    base = plan.facts.base or plan.recipe.model.name_or_path
    return base if on_hub(base) else Path(base.removeprefix(BUILTIN)).name


def beside(plan: Plan, *, adapted: bool) -> str:
    """What else is needed, where the base is no model that others have."""
    if plan.facts.kind != "merged":
        return ""
    start = Path(plan.recipe.model.name_or_path).name
    place = " That base is in the folder `base`: load it first, and the adapter on it." if adapted else ""
    return f"Before training, the adapter `{start}` was merged into `{base_name(plan)}`.{place}\n\n"


def numbers(report: Mapping[str, Any]) -> str:
    """Before training, and of the weights that this is the card of."""
    after = report["result_metrics"]
    found = [name for name in report["first"] if name in after]
    if not found:
        return ""
    rows = "".join(f"| {name} | {report['first'][name]:.4g} | {after[name]:.4g} |\n" for name in found)
    return f"| | before | after |\n|---|---|---|\n{rows}\n"


def trained_rows(report: Mapping[str, Any]) -> int:
    kept, held_out = report["rows"]["kept"], report["rows"].get("held_out", 0)
    return int(kept - held_out)


def settings(plan: Plan) -> str:
    """The few that a reader asks for."""
    recipe, resolved = plan.recipe, plan.resolved
    told = {
        "learning rate": f"{resolved.learning_rate:g}, {recipe.train.lr_scheduler_type}",
        "optimiser": recipe.train.optim,
        "precision": resolved.precision,
        "longest row": f"{recipe.data.max_length} tokens",
        "seed": str(recipe.seed),
    }
    if recipe.lora is not None:
        told["LoRA"] = f"r {recipe.lora.r}, alpha {recipe.lora.lora_alpha:g}"
    if recipe.quantization is not None:
        told["frozen weights"] = "4 bits" if recipe.quantization.load_in_4bit else "8 bits"
    rows = "".join(f"| {name} | {value} |\n" for name, value in told.items())
    return f"| setting | value |\n|---|---|\n{rows}"
