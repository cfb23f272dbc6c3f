"""Masks on the templates that TRL ships, held against transformers' own renders and against TRL's `_training` twins.

A twin is TRL's edit of a template that marks what the assistant says. Twins over-mark: what the generation prompt holds
already, and what follows the stop. Where a twin starts at the end of the generation prompt, so do we; what we train is
never more than what it trains; and the whole answer and its stop are in it.
"""

import json
import re
from collections import Counter
from importlib.resources import files
from typing import Any

from jinja2 import TemplateError

from finetune_cli.data.chat import Chat, wanted
from finetune_cli.data.forms import forms, lost, plain
from finetune_cli.data.render import Renderer
from finetune_cli.data.spans import THINKING
from finetune_cli.errors import DataError
from tests.helpers import said, tiny_tokenizer

FOLDER = files("trl") / "chat_templates"
NAMES = sorted(path.name.removesuffix(".jinja") for path in FOLDER.iterdir() if path.name.endswith(".jinja"))
TEMPLATES = [name for name in NAMES if not name.endswith("_training")]
STOPS = [
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|call|>",
    "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "<|user|>", "<|observation|>",
]  # fmt: skip
SPECIAL = re.compile(
    r"<[|｜][^<>{}'\"\s]+?[|｜]>|<\|?[a-z_]+_of_[a-z_]+\|?>|<\|?[a-z_]*turn\|?>|\[/?INST\]|<end_of_utterance>"
)

CALL = [{"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 17, "b": "xyz"}}}]
TEXT_CALL = [{**CALL[0], "function": {"name": "add", "arguments": json.dumps({"a": 17, "b": "xyz"})}}]
RESULT = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "17xyz"}
ARGUMENTS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ARGUMENTS}}
THOUGHTFUL = {"role": "assistant", "content": "four", "reasoning_content": "two and two"}
CALLS = {"role": "assistant", "content": "", "tool_calls": CALL}
SHAPES: dict[str, dict[str, Any]] = {
    "single": {"messages": said("What is it?", "It is four.")},
    "multi": {"messages": said("one", "two", "three", "four", "five", "six")},
    "system": {"messages": [{"role": "system", "content": "Be short."}, *said("one", "two", "three", "four")]},
    "no answer": {"messages": said("one")},
    "empty answer": {"messages": said("one", "two", "three", "")},
    "spaces": {"messages": said("one", "  two\n\nthree \n", "four", "five ")},
    "unicode": {"messages": said("äöü 日本", "🙂🙂 日本", "ß", "é")},
    "special text": {"messages": said("one", "say </s> and <|im_end|> now", "two", "three")},
    "reasoning": {"messages": [*said("one"), THOUGHTFUL, *said("three"), THOUGHTFUL]},
    "think tags": {
        "messages": said("What?", "<think>\nhm\n</think>\n\nfour", "And?", "<think>\nso\n</think>\n\nfive")
    },
    "call": {"messages": [*said("add"), CALLS], "tools": [TOOL]},
    "call, none said": {
        "messages": [*said("add"), {"role": "assistant", "content": None, "tool_calls": TEXT_CALL}],
        "tools": json.dumps([TOOL]),
    },
    "call, result": {
        "messages": [*said("add"), CALLS, RESULT, {"role": "assistant", "content": "Done."}], "tools": [TOOL],
    },
    "last is user": {"messages": said("one", "two", "three")},
    "leading assistant": {"messages": said("Hello.", "one", "two", first="assistant")},
    "consecutive assistants": {"messages": [*said("one", "two"), {"role": "assistant", "content": "three"}]},
    "parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in said("one", "two")]},
}  # fmt: skip
REASONS = (
    "the generation prompt is not in the rendered message",
    "the chat template loses the",
    "answering in message",
    "the chat template refuses the row: TemplateError",
    "the chat template refuses the row: UndefinedError",
    "ends unlike other turns",
)


def read(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def family(template: str) -> Chat:
    """The template with the special tokens that it writes, and those of them declared as stops that are."""
    specials = tuple(sorted(set(SPECIAL.findall(template))))
    tokenizer = tiny_tokenizer(template, bos="<s>", eos="</s>")
    tokenizer.add_tokens(list(specials), special_tokens=True)
    stops = [stop for stop in STOPS if stop in template]
    return Chat.bind(tokenizer, stop_ids=tokenizer.convert_tokens_to_ids(stops))


class Renders:
    """What transformers renders of a conversation: texts by their length in messages, and generation prompts."""

    def __init__(self, chat: Chat, row: dict[str, Any]) -> None:
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        self.texts: set[str] = set()
        self.prompts: dict[str, set[int]] = {}
        messages = row["messages"]
        for _, form in forms([plain(message) for message in messages]):
            for kwargs in THINKING:
                for count in range(1, len(messages) + 1):
                    for prompt in (False, True):
                        try:
                            text = chat.tokenizer.apply_chat_template(
                                form[:count], tools=tools, tokenize=False, add_generation_prompt=prompt, **kwargs
                            )
                        except Exception:  # noqa: BLE001  templates raise what they like
                            continue
                        if prompt:
                            self.prompts.setdefault(text, set()).add(count)
                        else:
                            self.texts.add(text)


def check(chat: Chat, row: dict[str, Any], where: str) -> list[tuple[str, Any, Any, list[int]]]:
    """(text, spans, tokens, turns) of each row of tokens, with what has to hold for all of them asserted."""
    messages, renders = row["messages"], Renders(chat, row)
    turns = [i for i in wanted(messages, "assistant", 0) if i]
    notes: dict[str, str] = {}
    rows = list(chat.noting(notes.__setitem__).conversation(row, loss_on="assistant"))
    (reply,) = chat.sandbox.answers([chat.request(row, messages, "turns", turns)])
    found, seen = [], []
    for made, (text, spans) in zip(rows, reply["result"], strict=True):
        spans = [(a, b) for a, b in spans]
        tokens = chat.encoder.spans(text, spans)
        assert text in renders.texts, where
        assert made.branches[0].ids == chat.tokenizer(text, add_special_tokens=False)["input_ids"], where
        assert (made.branches[0].ids, made.branches[0].trained) == (tokens.ids, tokens.trained), where
        left = [*turns]
        mine = []
        for start, end in spans:
            (turn,) = [i for i in left if i in renders.prompts.get(text[:start], ())] or [None]
            assert turn is not None, f"{where}: {text[:start]!r} is no generation prompt"
            left.remove(turn)
            mine.append(turn)
            assert not lost(messages[turn], text[start:end]) - {"reasoning"}, where
            ends = text.endswith(chat.stops, start, end) or "no_stop" in notes
            assert ends or any(text.endswith(name, start, end) for name in chat.encoder.specials), where
            if not tokens.retokenised:
                prompt = chat.encoder.one(text[:start])
                assert tokens.ids[: len(prompt)] == prompt, where
        if not tokens.straddling:
            trained = [i for i, t in zip(tokens.ids, tokens.trained, strict=True) if t]
            assert chat.tokenizer.decode(trained) == "".join(text[a:b] for a, b in sorted(spans)), where
        seen += mine
        found.append((text, spans, tokens, mine))
    assert sorted(seen) == turns, where
    return found


def test_every_template_and_shape():
    counts: Counter[str] = Counter()
    refused: dict[str, set[str]] = {}
    for name in TEMPLATES:
        chat = family(read(name))
        for shape, row in SHAPES.items():
            where = f"{name}, {shape}"
            found, error = attempt(chat, row, where)
            if error is None:
                counts["split" if len(found) > 1 else "one row"] += 1
                counts["straddling"] += sum(bool(tokens.straddling) for _, _, tokens, _ in found)
                continue
            refused.setdefault(name, set()).add(shape)
            assert error.message.startswith(REASONS), f"{where}: {error}"
            mismatch = error.message.startswith(REASONS[0])
            assert ("data.template_mismatch" in error.hint) == mismatch, f"{where}: {error}"
        chat.sandbox.close()
    calls, twice = {"call", "call, none said", "call, result"}, {"consecutive assistants"}
    no_tools = ("idefics3", "lfm2", "llama3", "llava_next", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm")
    expected = dict.fromkeys(no_tools, calls)
    expected |= {name: calls | twice | {"leading assistant"} for name in ("cohere", "cohere2", "gemma3")}
    expected |= {"gemma": expected["gemma3"] | {"system"}}
    merging = ("diffusion_gemma", "gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "qwen3")
    expected |= dict.fromkeys(merging, twice)
    expected |= dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), set(SHAPES) - {"no answer"})
    assert refused == expected
    assert dict(counts) == {"one row": 549, "split": 65, "straddling": 0}


def attempt(chat: Chat, row: dict[str, Any], where: str) -> tuple[list[Any], DataError | None]:
    try:
        return check(chat, row, where), None
    except DataError as error:
        return [], error


def runs(mask: list[int]) -> list[tuple[int, int]]:
    edges = [k for k, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def twin_of(chat: Chat, name: str, row: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """Ids and mask of the `_training` twin; None where it does not render the row."""
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    asked = {"tools": tools, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        found = chat.tokenizer.apply_chat_template(row["messages"], chat_template=read(f"{name}_training"), **asked)
    except (TemplateError, TypeError):
        return None
    return found["input_ids"], found["assistant_masks"]


MORE = {("diffusion_gemma", "call"): "<|tool_response>", ("diffusion_gemma", "call, result"): "<|turn>model\n"}
"""What we train and the twin does not: the last token of a call's turn, and a header that no generation prompt has."""


def test_against_the_training_twins():
    counts: Counter[str] = Counter()
    for name in (name for name in TEMPLATES if f"{name}_training" in NAMES):
        chat = family(read(name))
        for shape, row in SHAPES.items():
            twin, (found, error) = twin_of(chat, name, row), attempt(chat, row, f"{name}, {shape}")
            for _text, _spans, tokens, _turns in found if twin and not error else ():
                counts["same render"] += tokens.ids == twin[0]
                if tokens.ids == twin[0]:
                    counts += compare(chat, tokens, twin[1], f"{name}, {shape}", MORE.get((name, shape), ""))
        chat.sandbox.close()
    assert dict(counts) == {"same render": 292, "starts at the prompt's end": 172, "equal": 58}


def compare(chat: Chat, tokens: Any, theirs: list[int], where: str, more: str) -> Counter[str]:
    mine = [int(t) for t in tokens.trained]
    only_mine = chat.tokenizer.decode([i for i, m, t in zip(tokens.ids, mine, theirs, strict=True) if m > t])
    assert only_mine in (more, "\ufffd"), where  # a character of several tokens is cut by theirs
    ours, twins = runs(mine), runs(theirs)
    same = {start for start, _ in ours} == {start for start, _ in twins}
    for (_, end), (_, their_end) in zip(ours, twins, strict=True) if same else ():
        after = chat.tokenizer.decode(tokens.ids[end:their_end])
        assert after.strip() in ("", "</s>"), f"{where}: {after!r}"  # what the twin trains beyond the stop
    return Counter({"starts at the prompt's end": int(same), "equal": int(mine == theirs)})


def outcome(render: Any, *arguments: Any, **named: Any) -> tuple[str, str]:
    try:
        return "renders", render(*arguments, **named)
    except Exception as error:  # noqa: BLE001  templates raise what they like
        return type(error).__name__, str(error)


def test_renders_are_those_of_transformers():
    """The process that renders has an environment of its own: the same text, or the same error, for every template."""
    for name in NAMES:
        tokenizer = tiny_tokenizer(read(name), bos="<s>", eos="</s>")
        renderer = Renderer(read(name), tokenizer.special_tokens_map)
        for shape, row in SHAPES.items():
            tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
            messages = [plain(message) for message in row["messages"]]
            for prompt in (False, True):
                ours = outcome(renderer, messages, tools, {"enable_thinking": False}, prompt=prompt)
                asked = {"tools": tools, "add_generation_prompt": prompt, "enable_thinking": False, "tokenize": False}
                assert ours == outcome(tokenizer.apply_chat_template, row["messages"], **asked), f"{name}, {shape}"


def test_blocks_of_generation_are_found():
    for name in (name for name in NAMES if name.endswith("_training")):
        tokenizer = tiny_tokenizer(read(name), bos="<s>", eos="</s>")
        renderer = Renderer(read(name), tokenizer.special_tokens_map)
        parts = name.startswith(("idefics3", "llava", "smolvlm"))
        messages = SHAPES["parts" if parts else "multi"]["messages"]
        text, blocks = renderer.marked(messages, None, {})
        assert text == tokenizer.apply_chat_template(messages, tokenize=False), name
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        trained = [i for i, t in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if t]
        assert tokenizer.decode(trained) == "".join(text[a:b] for a, b in blocks), name
