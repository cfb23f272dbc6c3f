"""Rows end to end are equal to stock transformers' padded, unshared rows: log-probs and every gradient, fp32."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_cli.data.batches import padded, tree
from finetune_cli.engine.attention import NAME
from finetune_cli.engine.layout import use_tree
from finetune_cli.engine.role import Role
from finetune_cli.types import Branch, Row

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0, "initializer_range": 0.15,
}  # fmt: skip
WINDOW = {"sliding_window": 5}
HALVES = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **HALVES},
    "qwen3": {},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, **HALVES},
    "gemma3_text": {"query_pre_attn_scalar": 8, **HALVES},
    "mistral": WINDOW,
    "phi3": {**WINDOW, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48,
             "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def model_of(family: str) -> torch.nn.Module:
    keys = {**TINY, **FAMILIES[family]}
    if family == "gpt2":
        keys = {k: v for k, v in keys.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = AutoConfig.for_model(family, **keys)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():  # norms initialise to one; make them matter
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def rows() -> list[Row]:
    """Prefixes of no, one and many tokens; branches of one token and more, alike and not; every token trained."""
    rng = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=rng).tolist()

    def branch(n: int) -> Branch:
        return Branch(ids(n), [True] * n)

    same = branch(6)
    return [
        Row([], (branch(9),)),
        Row(ids(1), (branch(4), branch(1))),
        Row(ids(11), (branch(7), branch(3))),
        Row(ids(5), (same, same)),
        Row([], (Branch(ids(8), [False, True, False, False, True, True, False, True]), branch(5))),
    ]


def stock(model: torch.nn.Module, some: list[Row]) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor]]]:
    """Log-probs by the model's own padded forward and logits, and the gradients of a weighted sum of them."""
    batch = padded(some, 0)
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits.float().flatten(0, 1)
    logps = torch.log_softmax(logits[batch.read_N], -1).gather(1, batch.label_N[:, None])[:, 0]
    return logps.detach(), gradients(model, logps)


def gradients(model: torch.nn.Module, logps: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logps))  # so that no two tokens count alike
    (logps * weights).sum().backward()
    return [(n, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None]


def assert_close(found, wanted, *, names: bool = True) -> None:
    logps, grads = found
    torch.testing.assert_close(logps, wanted[0], rtol=1e-5, atol=1e-5)
    assert [n for n, _ in grads] == [n for n, _ in wanted[1]]
    largest = max(float(g.abs().max()) for _, g in wanted[1])
    for (name, mine), (_, theirs) in zip(grads, wanted[1], strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5, atol=1e-5 * max(1.0, largest), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen_head", [True, False], ids=["frozen head", "trained head"])
def test_tree_equals_stock(family, frozen_head):
    model = model_of(family)
    if frozen_head:
        model.get_output_embeddings().weight.requires_grad_(False)
    wanted = stock(model, rows())
    role = Role(model)
    assert use_tree(model) is None
    assert model.config._attn_implementation == NAME
    scores = role(tree(rows()))
    assert scores.owner_N.tolist() == sorted(scores.owner_N.tolist())
    assert_close((scores.logps_N.detach(), gradients(model, scores.logps_N)), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_checkpointing_changes_nothing(family):
    model = model_of(family).train()
    role = Role(model)
    use_tree(model)
    without = role(tree(rows())).logps_N
    wanted = without.detach(), gradients(model, without)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = role(tree(rows())).logps_N
    assert_close((again.detach(), gradients(model, again)), wanted)


def test_two_rows_together_are_two_rows_alone():
    model = model_of("llama")
    role = Role(model)
    use_tree(model)
    together = role(tree(rows())).logps_N
    alone = torch.cat([role(tree([row])).logps_N for row in rows()])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_ordinary_calls_go_on_as_before():
    """Generation and padded calls need no switch back."""
    model = model_of("gemma3_text")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    before = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    use_tree(model)
    after = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    assert before.tolist() == after.tolist()


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
        ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2}),
        ("bloom", {"n_head": 4, "n_layer": 2}),
    ],
)
def test_others_fall_back_and_say_why(family, keys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **keys}), dtype=torch.float32)
    before = model.config._attn_implementation
    reason = use_tree(model)
    assert reason
    assert model.config._attn_implementation == before
