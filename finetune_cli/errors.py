"""The errors people see, and the exit code each becomes.

FinetuneError
├── RecipeError      2   the recipe says something that is not so
├── DataError        3   the rows, or what the template makes of them
├── MachineError     4   this machine lacks something: a package, memory, disk, a process
├── ModelError       5   the model, its tokenizer or its adapter cannot be used as asked
└── TrainError       6   the training itself failed

0 is success, 1 an internal error (ours), 130 and 143 an interrupted run that was saved.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with its place: what a person needs to mend it, one line.

    `line` and `column` count from 1; 0 means that the place has no line (a command-line option, say).
    """

    key: str
    message: str
    file: str = ""
    line: int = 0
    column: int = 0
    rule: str = ""
    severity: str = "error"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return "  ".join(part for part in (place, self.key, self.message) if part)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class FinetuneError(Exception):
    """An error for people: what happened, and what to do about it."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "internal error"

    def __init__(self, message: str, hint: str = "", *, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = problems

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def named(self, file: str = "") -> tuple[Problem, ...]:
        """Its problems, for programs; the error itself where it has none of its own."""
        return self.problems or (Problem("", self.message, file=file),)

    def to_json(self) -> dict[str, Any]:
        return {
            "exit_code": self.exit_code,
            "kind": self.kind,
            "message": self.message,
            "hint": self.hint,
            "problems": [problem.to_json() for problem in self.problems],
        }


class RecipeError(FinetuneError):
    exit_code = 2
    kind = "recipe error"


class DataError(FinetuneError):
    exit_code = 3
    kind = "data error"


class MachineError(FinetuneError):
    exit_code = 4
    kind = "machine error"


class ModelError(FinetuneError):
    exit_code = 5
    kind = "model error"


class TrainError(FinetuneError):
    exit_code = 6
    kind = "training error"


KINDS: dict[int, type[FinetuneError]] = {
    error.exit_code: error for error in (RecipeError, DataError, MachineError, ModelError, TrainError)
}
