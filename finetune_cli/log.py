"""Logs go to stderr, results to stdout; rank 0 speaks."""

import logging
import os
import sys

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
