"""The auxiliary loss of mixtures of experts, where their configuration asks for it: equal to stock transformers'."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from finetune_cli.engine import routers
from finetune_cli.errors import ModelError
from tests.helpers import questions, tiny_tokenizer
from tests.parity.stock import assert_equal_gradients, first_step, gradients, norm_of, sequences

COEFFICIENT = 0.5


@pytest.fixture
def mixture(tmp_path):
    """A folder with a random Mixtral whose experts are used unevenly."""
    tokenizer = tiny_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, num_local_experts=4,
        num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=COEFFICIENT,
    )  # fmt: skip
    torch.manual_seed(3)
    model = MixtralForCausalLM(config)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id = eos, None, tokenizer.pad_token_id
    model.generation_config.eos_token_id = eos
    model.save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def stock_loss(model, rows):
    """(its own loss, the auxiliary one) of one right-padded batch."""
    found = sequences(rows)
    width = max(len(ids) for ids, _ in found)
    ids_BT, label_BT, mask_BT = (torch.full((len(found), width), value) for value in (0, -100, 0))
    for b, (ids, trained) in enumerate(found):
        ids_BT[b, : len(ids)], mask_BT[b, : len(ids)] = torch.tensor(ids), 1
        label_BT[b, : len(ids)] = torch.tensor([i if t else -100 for i, t in zip(ids, trained, strict=True)])
    out = model(input_ids=ids_BT, attention_mask=mask_BT, labels=label_BT)
    return out.loss, out.aux_loss


def full(batch, **sections):
    return {
        "lora": None,
        "train": {
            "per_device_train_batch_size": batch, "learning_rate": "auto", "max_grad_norm": 0, "max_steps": 1,
            **sections.pop("train", {}),
        },
        **sections,
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_first_step_equals_stock_transformers(layout, checkpointing, mixture, recipe_of, job_of):
    sections = full(4, train={"gradient_checkpointing": checkpointing})
    job, _ = job_of(recipe_of(rows=questions(4), model={"name_or_path": str(mixture), "layout": layout}, **sections))
    assert (job.padded_because is None) == (layout == "auto")
    numbers, norm, grads = first_step(job)

    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32, attn_implementation="eager").train()
    wanted, aux = stock_loss(model, job.data.rows)
    wanted.backward()
    theirs = gradients(model)
    assert aux.item() > 1.01  # 1 is even use, whose gradient would prove nothing
    assert numbers["aux_loss"] == pytest.approx(aux.item(), rel=1e-5)
    assert numbers["loss"] + COEFFICIENT * numbers["aux_loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert norm == pytest.approx(norm_of(theirs), rel=1e-5)
    assert_equal_gradients(grads, theirs, 1e-5)
    assert any("gate" in name for name in grads)


def test_over_several_forwards_it_is_their_mean_by_tokens(mixture, recipe_of, job_of):
    job, _ = job_of(recipe_of(rows=questions(4), model={"name_or_path": str(mixture)}, **full(2)))
    numbers, _, grads = first_step(job)
    rows = [job.data.rows[i] for i in job.schedule.step(0)]
    halves = [job.rows_of(own) for own in job.schedule.window(0, rank=0, world=1)]
    assert [len(half) for half in halves] == [2, 2]
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32, attn_implementation="eager").train()
    supervised, computed = (sum(getattr(row, name) for row in rows) for name in ("targets", "length"))
    for half in halves:
        loss, aux = stock_loss(model, half)
        nll = loss - COEFFICIENT * aux
        share = sum(row.length for row in half) / computed
        (nll * sum(row.targets for row in half) / supervised + COEFFICIENT * aux * share).backward()
    assert_equal_gradients(grads, gradients(model), 1e-5)
    assert numbers["aux_loss"] > 1


def test_a_model_that_does_not_ask_for_it_gets_none(mixture):
    model = AutoModelForCausalLM.from_pretrained(mixture)
    assert routers.find(model).coefficient == COEFFICIENT
    model.config.output_router_logits = False
    assert routers.find(model) is None
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.0
    assert routers.find(model) is None


def test_a_mixture_without_a_layer_of_experts_has_nothing_to_balance(mixture):
    found = routers.find(AutoModelForCausalLM.from_pretrained(mixture))
    assert found.balance((), batch=None) is None


def test_a_way_that_is_not_known_is_told(mixture):
    model = AutoModelForCausalLM.from_pretrained(mixture)
    del model.num_experts
    with pytest.raises(ModelError, match="output_router_logits"):
        routers.find(model)
