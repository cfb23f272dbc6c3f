"""NEFTune's noise: on what the embedding gives, by the length of each row, and wherever else a model reads tokens."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_cli.data.batches import padded
from finetune_cli.engine.role import Role
from finetune_cli.types import Branch, Row

LLAMA = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
PER_LAYER = {
    **LLAMA, "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "laurel_rank": 4,
    "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip


def rows():
    return [Row([], (Branch(list(range(3, 3 + n)), [True] * n),)) for n in (4, 25)]


def model_of(family, keys):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys), dtype=torch.float32)


def test_noise_is_as_large_as_the_row_is_short():
    role, batch = Role(model_of("llama", LLAMA), noise_alpha=5.0), padded(rows(), 0)
    embedding = role.stock.get_input_embeddings()
    quiet = embedding(batch.ids_BT)
    with role.noisy(batch, 5.0):
        noise_BTD = (embedding(batch.ids_BT) - quiet).detach()
    for b, length in enumerate((4, 25)):
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.9 * bound < float(noise_BTD[b, :length].abs().max()) <= bound * 1.0001
    assert torch.equal(embedding(batch.ids_BT), quiet)


@pytest.mark.parametrize(("family", "keys"), [("llama", LLAMA), ("gemma3n_text", PER_LAYER)])
def test_no_noise_is_the_model_itself_and_some_is_near_it(family, keys):
    """Gemma-3n reads the tokens a second time, for its layers: with embeddings alone that part would be missing."""
    role, batch = Role(model_of(family, keys)), padded(rows(), 0)
    with torch.no_grad():
        wanted = role.train()(batch).logps_N
        role.noise_alpha = 1e-6
        torch.testing.assert_close(role(batch).logps_N, wanted, atol=1e-4, rtol=0)
        role.noise_alpha = 5.0
        assert float((role(batch).logps_N - wanted).abs().max()) > 1e-3
        role.eval()
        assert torch.equal(role(batch).logps_N, wanted)
