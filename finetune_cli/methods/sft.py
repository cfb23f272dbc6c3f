"""Supervised fine-tuning: the log-likelihood of answers, summed over tokens and divided once.

    L = sum over supervised tokens t of -log p(y_t | y_<t) / N

N counts the supervised tokens of the whole optimiser step, over all its batches and processes, so that batch size,
accumulation and the number of processes leave the gradient as it is.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_cli.errors import DataError
from finetune_cli.methods.base import LearningRates, Method
from finetune_cli.types import Branch, Counts, Layout, Loss, Models, Render, Row

if TYPE_CHECKING:
    from torch import Tensor


def dynamic(logps_N: "Tensor") -> "Tensor":
    """p_t log p_t with p_t held constant: the gradient of sure tokens counts fully, that of unlikely ones little."""
    return logps_N * logps_N.detach().exp()


class Sft(Method):
    """Supervised fine-tuning on conversations, prompts with completions, or text."""

    name: Literal["sft"] = "sft"
    """The method."""
    loss_on: Literal["assistant", "last_assistant", "completion", "all"] | None = None
    """Tokens that are trained: every assistant turn, the last one, the completion, or all. Not given: assistant for
    messages, completion for prompt + completion, all for text; rows of input_ids say it by their labels."""
    packing: bool = False
    """Fill bins of `data.max_length` tokens with whole rows, which never see one another."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Uniform noise on the embeddings while training, of size alpha / sqrt(row length x hidden size) (arXiv
    2310.05914); 5 is usual."""
    dft: bool = False
    """Dynamic fine-tuning (arXiv 2508.05629): each token's loss times its own probability, detached."""

    summary: ClassVar = "supervised fine-tuning: learn to give the answers in the data"
    shapes: ClassVar = ("messages", "completion", "text", "tokens")
    lora_rates: ClassVar = LearningRates(default=2e-4, low=2e-5, high=5e-4)
    full_rates: ClassVar = LearningRates(default=2e-5, low=1e-6, high=5e-5)

    def bin_tokens(self, max_length: int) -> int | None:
        return max_length if self.packing else None

    def embedding_noise(self) -> float | None:
        return self.neftune_noise_alpha

    def encoding(self) -> dict[str, Any]:
        return {"loss_on": self.loss_on}

    def encode(self, row: Mapping[str, Any], shape: str, render: Render) -> Iterator[Row]:
        if shape == "messages":
            return render.conversation(row, loss_on=self.loss_on or "assistant")
        if shape == "completion":
            return render.completion(row, loss_on=self.loss_on or "completion")
        if shape == "text" and self.loss_on not in (None, "all"):
            raise DataError(
                f"method.loss_on: {self.loss_on} needs messages, and this row is text", "Use all, or unset it."
            )
        return self.given(row) if shape == "tokens" else render.text(row)

    def given(self, row: Mapping[str, Any]) -> Iterator[Row]:
        """Tokens of the data as they are. They say themselves what is trained; without labels everything is."""
        if self.loss_on not in (None, "all") or (self.loss_on == "all" and "trained" in row):
            raise DataError(
                f"method.loss_on: {self.loss_on}, and rows of input_ids say so by their labels", "Unset it."
            )
        ids = row["input_ids"]
        yield Row([], (Branch(ids, row.get("trained", [True] * len(ids))),))

    def loss(self, batch: Layout, models: Models, counts: Counts) -> Loss:
        scores = models("policy", batch)
        nll = -(dynamic(scores.logps_N) if self.dft else scores.logps_N).sum()
        metrics: dict[str, Any] = {"loss": (nll.detach(), batch.counts.tokens)}
        if scores.correct_N is not None and scores.entropy_N is not None:
            metrics["mean_token_accuracy"] = (scores.correct_N.sum(), batch.counts.tokens)
            metrics["entropy"] = (scores.entropy_N.sum(), batch.counts.tokens)
        return Loss(nll / counts.tokens, metrics)
