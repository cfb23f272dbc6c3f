"""Logs go to stderr, results to stdout; rank 0 speaks."""

import json
import logging
import math
import os
import sys
import warnings
from typing import Any

LOGGER = logging.getLogger("finetune_cli")
NOISY = ("bitsandbytes", "transformers", "datasets", "accelerate", "filelock", "huggingface_hub", "torch.distributed")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def setup() -> None:
    """One plain handler on stderr; other libraries speak only of errors, and only rank 0 speaks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # bitsandbytes reports a missing optional kernel as an error at import; its real errors are exceptions
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)


def quiet_libraries() -> None:
    """Our screens alone: no bars and no banners of the libraries underneath."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as theirs

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch|accelerate")
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON, which has no nan and no infinity: a number that is not finite becomes null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
