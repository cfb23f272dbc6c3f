"""What a model is made of, from its configuration alone: the sizes that memory depends on. No torch."""

import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

from finetune_cli.spec import Spec

KNOWN = Path(__file__).with_name("known_models.json")
NO_GATE = {"gpt2", "gpt_neox", "gpt_neo", "gptj", "opt", "bloom", "phi", "starcoder2", "falcon", "gpt_bigcode", "xglm"}
"""Families whose feed-forward layers are two products, not three."""
SANDWICH = {"gemma2", "gemma3", "gemma3_text", "glm4", "olmo2", "olmo3"}
"""Families with a norm after attention and feed-forward too (Gemma) or instead (OLMo)."""
QK_NORM = {"qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "olmo3", "hunyuan_v1_dense", "glm4_moe", "apertus"}
"""Families that normalise queries and keys."""
QKV_BIAS = {"qwen2", "qwen2_moe"}
OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "d_ff"),
}
MOE = ("num_local_experts", "num_experts", "n_routed_experts")


class Linear(NamedTuple):
    """A linear layer of a decoder layer: its name, its sizes, and which input it shares with others."""

    name: str
    wide_in: int
    wide_out: int
    input: str
    """attention | heads | feed | inner"""

    @property
    def weights(self) -> int:
        return self.wide_in * self.wide_out


class Shape(Spec):
    """The sizes of a decoder."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    gated: bool
    norms: int
    """Norms of a layer over the hidden size."""
    qk_norm: bool
    scale_is_kept: bool
    """The norm multiplies by its weight in float32, as Gemma's does."""
    softcap: bool
    biases: int
    """Weights of biases in a layer."""
    experts: int
    active: int
    """Experts that compute a token."""
    known: bool
    """Whether the family is one that the estimate was measured on, or like one."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self | None:
        """None where the configuration is of no decoder that is known here."""
        text = config.get("text_config") or config
        kind = str(text.get("model_type") or config.get("model_type"))
        found = {name: _either(text, name, *others) for name, others in OTHER_NAMES.items()}
        needed = [found[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
        if not all(needed) or not text.get("vocab_size"):  # what is left out is the family's default, not known here
            return None
        hidden, heads = found["hidden_size"], found["num_attention_heads"]
        inner = found["intermediate_size"] or 4 * hidden
        experts = next((int(text[name]) for name in MOE if text.get(name)), 0)
        if experts and text.get("moe_intermediate_size"):
            inner = int(text["moe_intermediate_size"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or hidden // heads)
        biased = kind in QKV_BIAS or bool(text.get("attention_bias"))
        return cls(
            hidden=hidden, inner=inner, layers=found["num_hidden_layers"], heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, vocabulary=int(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", kind.startswith("gemma")))),
            gated=kind not in NO_GATE, norms=4 if kind.startswith(("gemma2", "gemma3", "glm4")) else 2,
            qk_norm=kind in QK_NORM, scale_is_kept=kind.startswith("gemma"),
            softcap=bool(text.get("final_logit_softcapping")),
            biases=(heads + 2 * kv_heads) * head_dim if biased else 0, experts=experts,
            active=int(text.get("num_experts_per_tok") or 1) if experts else 1,
            known=not experts and kind not in NO_GATE and not text.get("linear_num_value_heads"),
        )  # fmt: skip

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    def linears(self) -> Iterator[Linear]:
        """Those of one layer; the experts of a mixture are none, adapters pass them by."""
        d, i = self.hidden, self.inner
        yield Linear("q_proj", d, self.queries, "attention")
        yield Linear("k_proj", d, self.keys, "attention")
        yield Linear("v_proj", d, self.keys, "attention")
        yield Linear("o_proj", self.queries, d, "heads")
        if self.experts:
            return
        if self.gated:
            yield Linear("gate_proj", d, i, "feed")
        yield Linear("up_proj", d, i, "feed")
        yield Linear("down_proj", i, d, "inner")

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Weights of the output head that are no others'."""
        return 0 if self.tied else self.embedding

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        own = sum(linear.weights for linear in self.linears()) + self.biases + self.norms * self.hidden
        own += 2 * self.head_dim if self.qk_norm else 0
        return own + self.experts * ((3 if self.gated else 2) * self.hidden * self.inner + self.hidden)

    @property
    def weights(self) -> int:
        return self.embedding + self.head + self.layers * self.layer + self.hidden


def _either(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def config_of(name: str, *, base: str | None = None, revision: str | None = None) -> dict[str, Any] | None:
    """The configuration of a model as far as it lies on this machine: in a folder, under an adapter, in the cache of
    builtin models or of the hub, or in the header of a `.gguf` file; else of the models known here. None where there
    is none."""
    if name.endswith(".gguf"):
        return _of_gguf(Path(name)) if Path(name).is_file() else None
    if name.startswith("builtin:"):
        return _of_builtin(name)
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        return config_of(base) if base is not None and base != name else None
    if folder.is_dir():
        return read_json(folder / "config.json")
    if folder.is_absolute() or name.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    there = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(there, str | os.PathLike):
        return read_json(Path(there))
    return known_models().get(name) if revision is None else None


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Sizes of models that recipes are often written for, as their configurations have them: a plan is made, and its
    memory estimated, before anything is downloaded."""
    found: dict[str, dict[str, Any]] = json.loads(KNOWN.read_text(encoding="utf-8"))
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none to be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what is wrong with it is told where the model is loaded
        return None
    return value if isinstance(value, dict) else None


def _of_builtin(name: str) -> dict[str, Any] | None:
    from finetune_cli.data import builtin

    known = builtin.find(name.removeprefix(builtin.PREFIX))
    return read_json(builtin.place(known) / "config.json") or known_models().get(name)


GGUF = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "vocab_size": "vocab_size",
}  # fmt: skip


def _of_gguf(path: Path) -> dict[str, Any] | None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
    except (OSError, ValueError):
        return None
    kind = reader.fields["general.architecture"].contents() if "general.architecture" in reader.fields else ""
    fields = {key: reader.fields.get(f"{kind}.{name}") for key, name in GGUF.items()}
    found = {key: field.contents() for key, field in fields.items() if field is not None}
    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" in names:
        found.setdefault("vocab_size", int(names["token_embd.weight"].shape[1]))
    return {"model_type": kind, "tie_word_embeddings": "output.weight" not in names, **found}
