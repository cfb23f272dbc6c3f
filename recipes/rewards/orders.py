"""What an answer of the orders recipes is worth: a JSON object, with the right keys, with the right values."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

KEYS = ("name", "city", "date", "items")


def orders(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """0 to 1 for each response: 0.2 for JSON, 0.2 for its keys, 0.6 for the share of values that are right."""
    return [worth(response, wanted(row)) for response, row in zip(responses, rows, strict=True)]


def wanted(row: Mapping[str, Any]) -> dict[str, Any]:
    """The right answer of a row: in its own column, or the last message of a conversation."""
    text = row["answer"] if "answer" in row else row["messages"][-1]["content"]
    answer: dict[str, Any] = json.loads(text)
    return answer


def worth(response: str, right: Mapping[str, Any]) -> float:
    try:
        found = json.loads(response)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(found, dict) or sorted(found) != sorted(KEYS):
        return 0.2
    ordered = found["items"] if isinstance(found["items"], list) else []
    items = sum(item in ordered for item in right["items"]) / max(len(right["items"]), len(ordered), 1)
    values = sum(found[key] == right[key] for key in KEYS if key != "items")
    return 0.4 + 0.6 * (values + items) / len(KEYS)
