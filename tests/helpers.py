"""What several tests need: a small real tokenizer, chat templates of the kinds there are, and short forms."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (  # as Qwen3: thinking is kept after the last user message only, and that turn always has a think block
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% else %}{% set thought = '' %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
MISTRAL = (  # ignores add_generation_prompt and wants user and assistant in turn
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
SPECIALS = [
    "<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "[INST]", "[/INST]",
]  # fmt: skip
WORDS = [
    "What is two plus two? It is four. And three? Thank you, the answer is five, as I said before.",
    "Here is a longer text with words that come again and again, so that they become tokens of their own.",
    "<think>\nLet me think about the question.\n</think>\n\nuser assistant system model tool",
    '{"name": "add", "arguments": {"a": 1, "b": 2}} 0123456789 äöü 日本 🙂',
]


@cache
def backend(specials: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(
    template: str | None = CHATML, *, bos: str | None = None, eos: str = "<|im_end|>", more: tuple[str, ...] = ()
) -> Any:
    """A byte-level BPE tokenizer of about 700 tokens, trained here; `more` are further special tokens."""
    from transformers import PreTrainedTokenizerFast

    specials = tuple(dict.fromkeys((*SPECIALS, *more)))
    own = Tokenizer.from_str(backend(specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token=bos, eos_token=eos, pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def said(*turns: str, first: str = "user") -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def trained_texts(tokenizer: Any, row: Any) -> list[str]:
    """The text of every run of trained tokens of a row's first branch."""
    branch, runs, before = row.branches[0], [], False
    for token, trained in zip(branch.ids, branch.trained, strict=True):
        if trained:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run) for run in runs]


def model_folder(folder: Path, *, template: str | None = CHATML, **config: Any) -> Path:
    """Save a random Llama of two layers, wide enough that its predictions differ, with `tiny_tokenizer`."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(template)
    own = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    own |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2}
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **own | config))
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id = eos, None, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def questions(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Rows of messages of unequal lengths, no two alike."""
    words = ["two", "three", "four", "five", "six", "seven", "eight"]
    return [
        {
            "messages": said(
                f"What is {words[i % 7]} plus {i}?", f"It is {words[i % 7]} and {i}, " + "as I said before. " * (i % 3)
            )
        }
        for i in range(first, first + count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(path: Path, **sections: Any) -> Path:
    """A recipe that runs in seconds on a CPU: fp32, LoRA r=4, three steps of four rows.

    `sections` are merged into it; it needs `model` and `data` at least. A section given as None is left out.
    """
    recipe: dict[str, Any] = {
        "method": "sft",
        "output_dir": str(path.parent / "run"),
        "data": {"max_length": 128},
        "lora": {"r": 4, "lora_alpha": 8},
        "train": {
            "max_steps": 3, "per_device_train_batch_size": 2, "global_batch_size": 4, "learning_rate": 5e-4,
            "precision": "fp32", "warmup_steps": 0,
        },
        "eval": {"sample_prompts": 1},
        "generation": {"max_new_tokens": 4},
        "logging": {"logging_steps": 1, "report_to": "none"},
        "ignore": ["FT033"],
    }  # fmt: skip
    for key, value in sections.items():
        mine = recipe.get(key)
        recipe[key] = {**mine, **value} if isinstance(mine, dict) and isinstance(value, dict) else value
    given = {key: value for key, value in recipe.items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return path


def journal(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]


def finetune(*arguments: str, launcher: tuple[str, ...] = (), cwd: Path, **environment: str) -> Any:
    """`python [launcher] -m finetune_cli arguments` in its own process, on one thread of the CPU."""
    command = [sys.executable, *launcher, "-m", "finetune_cli", *arguments]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
