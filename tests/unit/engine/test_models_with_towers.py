"""Models that see as well as read: text does not go through their towers, and nothing is trained there."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from finetune_cli.engine import lora
from finetune_cli.recipe.sections import Lora

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "sliding_window": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture
def seeing():
    config = AutoConfig.for_model("gemma3", text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("excluded", [None, ["layers.0.self_attn.q_proj"], r".*layers\.0\.self_attn\.q_proj"])
def test_adapters_are_on_the_text_model_alone(targets, excluded, seeing):
    assert lora.towers(seeing) == ["model.vision_tower", "model.multi_modal_projector"]
    before = {name for name, m in seeing.named_modules() if isinstance(m, torch.nn.Linear)}
    assert any("vision_tower" in name and name.endswith("q_proj") for name in before)
    setting = Lora.model_validate({"target_modules": targets, "exclude_modules": excluded})
    model = lora.attach(seeing, setting)
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted
    assert all("language_model" in name for name in adapted)
    first = [name for name in adapted if re.search(r"layers\.0\.self_attn\.q_proj", name)]
    assert bool(first) == (excluded is None)
    assert any(re.search(r"layers\.1\.self_attn\.q_proj", name) for name in adapted)
    ids = torch.tensor([[3, 5, 7, 11]])
    model(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_head_of_a_classifier_is_no_tower():
    config = AutoConfig.for_model("gemma3", text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    assert lora.towers(model) == ["model.vision_tower", "model.multi_modal_projector"]
    adapted = lora.attach(model, Lora(), classifies=True)
    assert any("score" in name and p.requires_grad for name, p in adapted.named_parameters())


def test_a_model_that_only_reads_has_no_towers():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **TEXT))
    assert lora.towers(model) == []
    assert lora.text_only(["a"], []) == ["a"]
    assert lora.text_only(None, []) is None
