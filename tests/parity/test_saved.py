"""Everything that is saved is loaded by plain transformers and peft, in a process that does not import ours, and says
what it said here: results and checkpoints of every method, and what `finetune merge` makes of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_cli.engine.finish import finish
from finetune_cli.engine.loop import train
from finetune_cli.use.merge import merge

IDS = [[20, 30, 40, 50, 60, 70]]
PAIRS = [{"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": f"no, not {n}"} for n in range(12)]
WORTH = "def worth(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n"
PPO = {"name": "ppo", "reward": "worth.py:worth", "num_ppo_epochs": 1}
KINDS: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft-full": {"lora": None},
    "sft-qlora": {"quantization": {"load_in_4bit": True}},
    "dpo": {"method": "dpo", "rows": PAIRS},
    "orpo-full": {"method": "orpo", "rows": PAIRS, "lora": None},
    "reward": {"method": "reward", "rows": PAIRS},
    "reward-full": {"method": "reward", "rows": PAIRS, "lora": None},
    "ppo": {"method": PPO, "rows": [{"prompt": row["prompt"]} for row in PAIRS]},
    "ppo-full": {"method": PPO, "rows": [{"prompt": row["prompt"]} for row in PAIRS], "lora": None},
}
PLAIN = """
import json, sys
from pathlib import Path
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
ids, folders, out = torch.tensor(json.loads(sys.argv[1])), json.loads(sys.argv[2]), {}
for folder, scores in folders:
    adapter, more = (Path(folder) / "adapter_config.json").exists(), {"num_labels": 1} if scores else {}
    kinds = {(True, True): AutoPeftModelForSequenceClassification, (True, False): AutoPeftModelForCausalLM,
             (False, True): AutoModelForSequenceClassification, (False, False): AutoModelForCausalLM}
    model = kinds[adapter, scores].from_pretrained(folder, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        out[folder] = model(input_ids=ids).logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and tokenizer.convert_tokens_to_ids("<|im_end|>") is not None
    if not scores:
        assert GenerationConfig.from_pretrained(folder).eos_token_id is not None
assert not any(name.startswith("finetune_cli") for name in sys.modules)
torch.save(out, sys.argv[3])
"""


@pytest.mark.parametrize("kind", KINDS)
def test_plain_libraries_load_it(kind, recipe_of, job_of, tmp_path):
    if "qlora" in kind:
        pytest.importorskip("bitsandbytes")
    (tmp_path / "worth.py").write_text(WORTH)
    scores = kind.startswith("reward")
    path = recipe_of(
        train={"max_steps": 1, "learning_rate": "auto", "precision": "fp32"},
        eval={"eval_strategy": "no", "sample_prompts": 0},
        generation={"max_new_tokens": 4, "temperature": 1.0},
        **KINDS[kind],
    )
    job, progress = job_of(path)
    finish(job, train(job, progress), [])
    run = job.plan.run
    (run / "plan.json").write_text(job.plan.model_dump_json())
    model = job.generator.eval()
    with torch.no_grad():
        mine = model(input_ids=torch.tensor(IDS), use_cache=False).logits
    folders = [run, run / "checkpoint-1"]
    if (run / "adapter_config.json").exists():
        folders.append(merge(run)[0])
    found = loaded([(folder, scores) for folder in folders], tmp_path / "logits.pt")
    for folder in folders:
        off = float((found[str(folder)] - mine).abs().max() / mine.abs().max())
        assert "qlora" in kind or off < 1e-4, (folder.name, off)  # 4 bits are read at full width there
    if "qlora" in kind:
        assert torch.allclose(found[str(folders[0])], found[str(folders[2])], atol=1e-3)


def loaded(folders: list[tuple[Path, bool]], file: Path) -> dict[str, torch.Tensor]:
    told = json.dumps([(str(folder), scores) for folder, scores in folders])
    command = [sys.executable, "-c", PLAIN, json.dumps(IDS), told, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, torch.Tensor] = torch.load(file)
    return found
