"""A recipe on rows of a test's own, and the chat that its rows are rendered with."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from finetune_cli.data.chat import Chat
from finetune_cli.recipe.load import load
from finetune_cli.recipe.sections import Recipe
from tests.helpers import CHATML, tiny_tokenizer


@pytest.fixture
def rows_and_chat(recipe_of, tmp_path) -> Callable[..., tuple[Recipe, Chat]]:
    """(recipe, chat) on rows, of which text is a line of the file as it is; `bos` and `eos` are the tokenizer's."""

    def make(rows: list[Any], *changes: str, template: str = CHATML, **sections: Any) -> tuple[Recipe, Chat]:
        names = {key: sections.pop(key) for key in ("bos", "eos") if key in sections}
        path = recipe_of(**sections)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        recipe = load(path, changes).recipe
        mismatch = recipe.data.template_mismatch
        return recipe, Chat.bind(tiny_tokenizer(template, **names), template_mismatch=mismatch)

    return make
