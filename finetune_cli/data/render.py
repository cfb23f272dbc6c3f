"""Chat templates rendered as transformers renders them, in a process of its own that imports neither it nor torch.

A template is a program from whoever made the model: it runs in Jinja's sandbox, which has no bound on time, memory or
output. So the process has them: the kernel ends it when a conversation has taken its time of CPU, and memory is capped.
The parent, and what it says when that happens, is `data/sandbox.py`. A line in is a list of requests in JSON, a line
out their replies.
"""

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from finetune_cli.data.answers import answer
from finetune_cli.data.sandbox import TOO_LARGE
from finetune_cli.data.spans import Style

CHARACTERS = 10_000_000
"""The longest render."""
REPLY = 64 * 2**20
"""Characters of the longest reply: all rows of one conversation."""
OPENS, CLOSES = "\U000f0002", "\U000f0003"
"""Stand around what `{% generation %}` encloses, where that is asked for."""


class TooLong(Exception):
    """A render or a reply beyond its bound."""


class Generation(Extension):
    """`{% generation %}`, with which some templates mark what the assistant says. Renders what it encloses."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Any) -> str:
        said = str(caller())
        return f"{OPENS}{said}{CLOSES}" if self.environment.globals["marking"] else said


class PlainNamespace(Namespace):
    """Jinja's namespace without the attributes that lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, attrs = args[0], dict(*args[1:], **kwargs)
        for name in attrs:
            PlainNamespace.check(name)
        Namespace.__init__(self, attrs)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace.check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have {name!r}: attributes with an underscore are closed")


class PlainDict:
    """`dict(...)` without the type's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a template (`utils/chat_template_utils.py`); a test holds the two together."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception, "strftime_now": strftime_now, "dict": PlainDict(),
        "namespace": PlainNamespace, "marking": False,
    }  # fmt: skip
    return made


class Renderer:
    """One template; `names` are the tokenizer's special tokens by name (bos_token, ...)."""

    def __init__(self, template: str, names: Mapping[str, Any]) -> None:
        self.source, self.names = template, names
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    @cached_property
    def template(self) -> Any:
        return environment().from_string(self.source)

    def __call__(
        self, messages: list[Any], tools: list[Any] | None, kwargs: Mapping[str, Any], *, prompt: bool = False
    ) -> str:
        """Raises whatever the template raises, and TooLong. None-valued keys are the caller's to leave out."""
        variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        text: str = self.template.render({**variables, **self.names, **kwargs})
        if len(text) > CHARACTERS:
            raise TooLong(f"it renders {len(text)} characters, and the bound is {CHARACTERS}")
        return text

    def marked(self, *conversation: Any) -> tuple[str, list[tuple[int, int]]]:
        """The render, and the characters of it that `{% generation %}` encloses."""
        shared = self.template.environment.globals
        shared["marking"] = True
        try:
            pieces = re.split(f"([{OPENS}{CLOSES}])", self(*conversation))
        finally:
            shared["marking"] = False
        at, starts, found = 0, [0], []
        for piece in pieces:
            if piece == OPENS:
                starts.append(at)
            elif piece == CLOSES:
                found.append((starts.pop(), at))
            else:
                at += len(piece)
        return "".join(piece for piece in pieces if piece not in (OPENS, CLOSES)), found


def serve() -> None:
    """The process: settings on the first line, then a list of requests a line, until there is no more input."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever prints goes to stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    settings = json.loads(sys.stdin.buffer.readline())
    bound_memory(settings["memory"])
    renderer = Renderer(settings["template"], settings["names"])
    style = Style.bind(renderer, settings)
    for line in sys.stdin.buffer:
        answered = (bounded(style, request, settings) for request in json.loads(line))
        replies.write(f"[{','.join(answered)}]\n")
        replies.flush()


def bounded(style: Style, request: dict[str, Any], settings: dict[str, Any]) -> str:
    """The reply. The kernel ends the process where it takes too long, whatever Python is doing then."""
    seconds = settings["seconds"] + settings["seconds_a_message"] * len(request["messages"])
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        reply = json.dumps(answer(style, request))
    except MemoryError:
        return json.dumps({"error": ["the chat template needs too much memory on this row", ""]})
    except Exception as error:  # noqa: BLE001  whatever a template does with a row costs that row alone
        return json.dumps({"error": [f"the row cannot be rendered: {type(error).__name__}: {error}", ""]})
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if len(reply) > REPLY:
        return json.dumps({"error": [f"the renders of this row have more than {REPLY} characters", ""]})
    return reply


def bound_memory(most: int) -> None:
    """Address space, by the kernel; where that is not to be had (macOS), a thread looks at the resident memory."""
    if sys.platform != "darwin":
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            return
    threading.Thread(target=watch_memory, args=(most,), daemon=True).start()


def watch_memory(most: int) -> None:
    unit = 1 if sys.platform == "darwin" else 1024
    while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < most:
        time.sleep(0.02)
    os._exit(TOO_LARGE)
