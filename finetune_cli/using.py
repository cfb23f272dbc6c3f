"""What the commands on finished runs do."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_cli import log, show
from finetune_cli.errors import RecipeError


def report(runs: Sequence[Path], output: Path | None, *, as_json: bool) -> int:
    """The page of a run, or of several beside one another; what differs is also told here."""
    from finetune_cli.use import report

    path = report.write(runs, output)
    told = report.summary(runs, path)
    if as_json:
        show.to_stdout(told)
        return 0
    if len(runs) > 1:
        show.beside(told)
    show.out.print(f"wrote {show.short(str(path))}", markup=False)
    return 0


@dataclass(frozen=True)
class Talk:
    """What `finetune chat` was asked for beside the model."""

    prompt: str | None = None
    system: str | None = None
    before: bool = False
    raw: bool = False
    temperature: float | None = None
    max_new_tokens: int | None = None
    as_json: bool = False


def chat(name: str, talk: Talk) -> int:
    """One answer, or a conversation until the input ends."""
    log.setup()
    log.quiet_libraries()
    from finetune_cli.use.chat import Speaker, find

    if talk.as_json and talk.prompt is None:
        raise RecipeError("--json needs --prompt", "A conversation is for people.")
    target = find(name)
    asked = {"temperature": talk.temperature, "max_new_tokens": talk.max_new_tokens}
    given = {key: value for key, value in asked.items() if value is not None}
    generation = type(target.generation).model_validate({**target.generation.model_dump(), **given})
    speaker = Speaker(target, generation, with_before=talk.before)
    opening = [{"role": "system", "content": talk.system}] if talk.system else []
    if talk.prompt is not None:
        messages = [*opening, {"role": "user", "content": talk.prompt}]
        told = turn(speaker, messages, talk)
        if talk.as_json:
            show.to_stdout({"prompt": talk.prompt, **told})
        return 0
    show.err.print("an empty line or Ctrl-D ends, /clear forgets the conversation, Ctrl-C stops an answer")
    messages = opening
    for text in show.asked():
        if text == "/clear":
            messages = opening
            continue
        messages = [*messages, {"role": "user", "content": text}]
        try:
            told = turn(speaker, messages, talk)
        except KeyboardInterrupt:
            show.out.print()
            messages = messages[:-1]
            continue
        messages = [*messages, {"role": "assistant", "content": told["answer"]}]
    return 0


def turn(speaker: Any, messages: list[dict[str, str]], talk: Talk) -> dict[str, str]:
    """An answer, and with --before the one that the model gave before it was trained."""
    ids = speaker.ids(messages, raw=talk.raw)
    told = {}
    for what in ("before", "answer") if talk.before else ("answer",):
        if talk.before and not talk.as_json:
            show.out.print(f"[bold]{'before' if what == 'before' else 'after'}[/]  ", end="")
        told[what] = speaker.answer(ids, (lambda _: None) if talk.as_json else show.piece, before=what == "before")
        if not talk.as_json:
            show.out.print()
    return told


def doctor(*, as_json: bool) -> int:
    """What this machine offers, and what is wrong with it."""
    log.setup()
    log.quiet_libraries()
    from finetune_cli.use import doctor

    found = doctor.examine()
    if as_json:
        show.to_stdout(found.to_json())
    else:
        show.out.print(doctor.block(found), markup=False)
    return doctor.exit_code(found)


def merge(run: Path, output: Path | None, *, dtype: str, as_json: bool) -> int:
    """Add an adapter into its base, and say how near the two are."""
    log.setup()
    log.quiet_libraries()
    from finetune_cli.use.merge import merge

    folder, kind, found = merge(run, output, dtype=dtype)
    if as_json:
        show.to_stdout({"folder": str(folder), "dtype": kind, **asdict(found)})
    else:
        show.out.print(f"merged into {show.short(str(folder))}, {kind}\n{found}", markup=False)
    return 0


def push(run: Path, *, as_json: bool) -> int:
    """Upload the result of a finished run."""
    log.setup()
    from finetune_cli.engine import hub
    from finetune_cli.use.finished import plan_of

    repository = hub.open_repository(plan_of(run).recipe.save, run.absolute())
    hub.push(run, repository, tell=log.LOGGER.info)
    if as_json:
        show.to_stdout({"repository": repository.id, "url": repository.url})
    else:
        show.out.print(f"uploaded to {repository.url}", markup=False)
    return 0
