"""The registry of methods: ours, and those that other packages register as `finetune_cli.methods` entry points."""

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from finetune_cli.methods.base import Method
from finetune_cli.methods.dpo import Dpo
from finetune_cli.methods.orpo import Orpo
from finetune_cli.methods.ppo import Ppo
from finetune_cli.methods.reward import Reward
from finetune_cli.methods.sft import Sft

OURS: tuple[type[Method], ...] = (Sft, Dpo, Orpo, Reward, Ppo)


def registry() -> dict[str, type[Method]]:
    """Every method by name. Raises ValueError where a plug-in takes a name that is already taken."""
    found = {method.method_name(): method for method in OURS}
    for entry in entry_points(group="finetune_cli.methods"):
        method = entry.load()
        if found.setdefault(method.method_name(), method) is not method:
            raise ValueError(f"method {method.method_name()!r} of {entry.value} is already registered")
    return found


def _union() -> Any:
    methods = tuple(registry().values())
    return methods[0] if len(methods) == 1 else Annotated[Union[methods], Field(discriminator="name")]  # noqa: UP007


if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = _union()

__all__ = ["OURS", "AnyMethod", "Method", "registry"]
