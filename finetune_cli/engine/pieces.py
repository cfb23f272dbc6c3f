"""Where the weights of a run lie, by `launch.strategy`: whole in every process, or in pieces over them."""

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from finetune_cli.engine import shard
from finetune_cli.engine.role import Backbone
from finetune_cli.plan.resolve import Plan

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job


class Pieces(Protocol):
    """What a module that lays weights out can do: `shard` (PyTorch's FSDP2; whole weights are one piece), `zero`
    (DeepSpeed's ZeRO-3). Whatever gathers is collective."""

    def spread(self, role: Backbone, plan: Plan, accelerator: Any) -> tuple[Any, Any]:
        """(the role with its weights in pieces, the optimiser of what is trained)"""

    def step(self, job: "Job") -> tuple[float, bool]:
        """Clip the gradients and let the optimiser step: (their norm before, whether the step was made)."""

    def gathered(self, role: Any) -> AbstractContextManager[None]:
        """All weights whole in every process, which may then compute what and as often as it likes."""

    def whole(self, value: Tensor) -> Tensor:
        """A tensor that may be in pieces, in one."""

    def is_piece(self, value: Tensor) -> bool: ...

    def own_piece(self, value: Tensor) -> Tensor:
        """What of a tensor this process holds; the very memory."""

    def piece_of(self, full: Tensor, like: Tensor) -> Tensor:
        """What of a whole tensor this process would hold, were it in the pieces of `like`."""

    def numel(self, value: Tensor) -> int:
        """Of all pieces."""

    def norms(self, values: Sequence[Tensor]) -> list[float]:
        """Of each tensor, in float64."""

    def own_pieces(self, optimizer: Any) -> dict[str, Tensor]:
        """What of the optimiser's state each process writes for itself, by "<number of the weight>.<name>"; empty where
        it is gathered."""

    def optimizer_state(self, role: Any, optimizer: Any, *, keep: bool, skip: Container[str] = ()) -> Any:
        """The state with every tensor whole and on the CPU, for the processes that `keep` it; those to `skip` are
        None."""

    def load_optimizer(
        self, role: Any, optimizer: Any, state: dict[str, Any], pieces: Sequence[Mapping[str, Tensor]] = ()
    ) -> None:
        """Take up a whole state, with what the processes wrote for themselves, in order of rank."""


def of(plan: Plan, world: int) -> Pieces:
    """The module that lays out the weights of a run."""
    if plan.resolved.strategy == "deepspeed-zero3" and world > 1:
        from finetune_cli.engine import zero

        return zero
    return shard


def model_state(pieces: Pieces, model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Whole weights by name on the CPU, one gathered after the other, for the processes that `keep` them; of a model
    with adapters what is trained. Collective."""
    adapted = hasattr(model, "peft_config")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = trained if adapted else model.state_dict(keep_vars=True)
    found: dict[int, Tensor] = {}
    for p in named.values():
        if id(p) not in found:  # tied weights stay one tensor
            one = pieces.whole(p.detach() if not pieces.is_piece(p) else p)
            found[id(p)] = one.cpu() if keep else one.new_empty(0)
    return {name: found[id(p)] for name, p in named.items()} if keep else {}
