"""The model hub: who we are and whether we may write, found out before training; uploads in the background.

What is uploaded lies on the disk first. A folder is hard-linked aside as soon as it is whole, so a checkpoint can be
removed while it is still on its way. An upload is tried again where the network or the server fails, and where it fails
for good the run goes on: `finetune push` does it later.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from finetune_cli.engine.manifest import BASE, MANIFEST, PREFIX
from finetune_cli.errors import MachineError, Problem
from finetune_cli.log import LOGGER
from finetune_cli.recipe.sections import Save

if TYPE_CHECKING:
    from huggingface_hub import HfApi

STAGE = ".hub"
"""Folder in the run that holds what is on its way."""
LAST = "last-checkpoint"
"""Where the strategy `checkpoint` puts the newest, as transformers does."""
WAITS = (2.0, 8.0, 30.0)
"""Seconds before an upload is tried again."""
PARTING = 600.0
"""Seconds that the end of a run waits for uploads that are under way."""
WEIGHTS = (".safetensors", ".safetensors.index.json")
OF_MODEL = {
    "config.json", "generation_config.json", "adapter_config.json", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "preprocessor_config.json", "README.md",
}  # fmt: skip
"""Files that others need; plan, recipe and journal name places of this machine and stay here."""
TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer's templates beside the default."""
OF_RESUMING = (".pt", "trainer_state.json")


@dataclass(frozen=True)
class Repository:
    """Where a run is uploaded to."""

    id: str
    url: str
    private: bool


def api() -> "HfApi":
    """The hub that HF_ENDPOINT names, with the token that is found where huggingface_hub looks for it."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def open_repository(save: Save, run: Path) -> Repository:
    """Check identity, scope and repository, and make the repository where there is none.

    Raises MachineError, with rule FT025 at the key to blame.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HFValidationError

    hub = api()
    try:
        who = hub.whoami()
    except failures() as error:
        raise refused("save.push_to_hub", f"the hub does not know us: {first(error)}", LOGIN) from error
    name = save.hub_model_id or run.name
    owner = name.partition("/")[0] if "/" in name else str(who["name"])
    scope = who.get("auth", {}).get("accessToken", {}).get("role")
    if scope == "read":
        raise refused("save.push_to_hub", f"the token of {who['name']} can only read", LOGIN)
    owners = {str(who["name"]), *(str(org["name"]) for org in who.get("orgs", []))}
    if owner not in owners:
        found = ", ".join(sorted(owners))
        raise refused("save.hub_model_id", f"{who['name']} cannot write to {owner}", f"Owners that it can: {found}.")
    try:
        made = hub.create_repo(f"{owner}/{name.rpartition('/')[2]}", private=save.hub_private_repo, exist_ok=True)
        probe = CommitOperationAdd("README.md", b"probe")  # asks how it would be uploaded, and uploads nothing
        hub.preupload_lfs_files(made.repo_id, additions=[probe])
    except HFValidationError as error:
        raise refused("save.hub_model_id", first(error), "Use letters, digits, - _ and .") from error
    except failures() as error:
        raise refused("save.hub_model_id", f"{owner}/{name.rpartition('/')[2]}: {first(error)}", LOGIN) from error
    return Repository(made.repo_id, str(made), save.hub_private_repo)


LOGIN = "Set HF_TOKEN to a token with write access, or run `hf auth login`; save.push_to_hub: false keeps all here."


def refused(key: str, said: str, hint: str) -> MachineError:
    return MachineError(f"nothing can be uploaded: {said}", hint, problems=(Problem(key, said, rule="FT025"),))


def first(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def failures() -> tuple[type[Exception], ...]:
    """What the hub's library raises where an answer is no, or none comes: all errors of the HTTP client it is built
    on, whose base is the first of its own error's."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError.__bases__[0], OSError)


# ── what is uploaded ──────────────────────────────────────────────────────────────────────────────────────────────────


def model_files(folder: Path) -> Iterator[Path]:
    """Those that others load."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.name in OF_MODEL or path.name.endswith(WEIGHTS)):
            yield path


def resuming_files(folder: Path) -> Iterator[Path]:
    """All of a checkpoint but its manifest, whose sums are of files that name places of this machine."""
    for path in sorted(folder.iterdir()):
        if (
            path.is_file()
            and path.name != MANIFEST
            and (path in model_files(folder) or path.name.endswith(OF_RESUMING))
        ):
            yield path


def templates(folder: Path, place: str = "") -> dict[str, list[Path]]:
    """The tokenizer's further templates, by folder of the repository, at `place` in it."""
    found = sorted((folder / TEMPLATES).glob("*.jinja"))
    return {f"{place}{TEMPLATES}": found} if found else {}


def result_files(run: Path) -> dict[str, list[Path]]:
    """By folder of the repository; a base that a starting adapter was merged into is nowhere else."""
    base = run / BASE
    return {".": list(model_files(run)), **templates(run)} | ({BASE: list(model_files(base))} if base.is_dir() else {})


def stage(run: Path, label: str, parts: dict[str, list[Path]]) -> Path:
    """Link files aside, by folder of the repository; texts are copied without the places of this machine."""
    target = run / STAGE / f"{label}-{time.monotonic_ns()}"
    for place, files in parts.items():
        folder = target / place
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            if file.suffix == ".json" and file.name in OF_MODEL and file.name != "tokenizer.json":
                (folder / file.name).write_text(placeless(file.read_text(encoding="utf-8")), encoding="utf-8")
                continue
            try:
                os.link(file, folder / file.name)
            except OSError:  # another file system, or one without links
                shutil.copy2(file, folder / file.name)
    return target


def placeless(text: str) -> str:
    """JSON whose absolute paths are their last names."""
    return json.dumps(_placeless(json.loads(text)), indent=2, ensure_ascii=False) + "\n"


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _placeless(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placeless(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and is_place(value) else value


def is_place(text: str) -> bool:
    """An absolute path with more than one part."""
    return "\n" not in text and PurePath(text).is_absolute() and len(PurePath(text).parts) > 2


def upload(hub: "HfApi", repository: Repository, staged: Path, message: str) -> None:
    """One commit, tried again where the network or the server fails. Raises what the last try raised."""
    for wait in (*WAITS, None):
        try:
            hub.upload_folder(repo_id=repository.id, folder_path=staged, commit_message=message)
            return
        except failures() as error:
            if wait is None or not passing(error):
                raise
            LOGGER.info("the upload failed (%s) and is tried again in %g s", first(error), wait)
            time.sleep(wait)


def passing(error: Exception) -> bool:
    """Whether another try may help: not where the hub has understood and said no."""
    response = getattr(error, "response", None)
    return response is None or response.status_code in (408, 409, 412, 425, 429) or response.status_code >= 500


# ── while it trains ───────────────────────────────────────────────────────────────────────────────────────────────────


class Pusher:
    """Uploads one thing after the other in a thread. `saved` returns at once; of what waits, `every_save` and
    `checkpoint` keep the newest alone."""

    def __init__(self, save: Save, run: Path, repository: Repository) -> None:
        self.strategy, self.run, self.repository = save.hub_strategy, run, repository
        self.failed: str | None = None
        """What went wrong with the last upload."""
        self._hub = api()
        self._waiting: list[tuple[Path, str]] = []
        self._change = threading.Condition()
        self._busy = self._closed = False
        shutil.rmtree(run / STAGE, ignore_errors=True)
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
        self._thread.start()

    def saved(self, folder: Path) -> None:
        """A checkpoint is whole."""
        if self.strategy == "end":
            return
        step = folder.name.removeprefix(PREFIX)
        parts = {".": list(model_files(folder)), **templates(folder)}
        if self.strategy != "every_save":
            place = LAST if self.strategy == "checkpoint" else folder.name
            parts |= {place: list(resuming_files(folder)), **templates(folder, f"{place}/")}
        self._take(folder.name, parts, f"step {step}", newest_alone=self.strategy != "all_checkpoints")

    def finished(self) -> str | None:
        """The result is in the run folder: upload it, wait, and say what failed."""
        parts = result_files(self.run)
        if any(parts.values()):  # a run that never had a result leaves what it saved
            self._take("result", parts, "the result", newest_alone=self.strategy == "every_save")
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join(PARTING)
        if self._thread.is_alive():
            self.failed = f"it was not done after {PARTING:g} s"
        return self.failed

    def _take(self, label: str, parts: dict[str, list[Path]], message: str, *, newest_alone: bool) -> None:
        try:
            staged = stage(self.run, label, parts)
        except (OSError, ValueError) as error:
            self._lost(message, error)
            return
        with self._change:
            dropped = self._waiting if newest_alone else []
            self._waiting = [*([] if newest_alone else self._waiting), (staged, message)]
            self._change.notify_all()
        for folder, _ in dropped:
            shutil.rmtree(folder, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                staged, message = self._waiting.pop(0)
            try:
                upload(self._hub, self.repository, staged, message)
                self.failed = None
            except Exception as error:  # noqa: BLE001  whatever it is, it must not end a training
                self._lost(message, error)
            shutil.rmtree(staged, ignore_errors=True)

    def _lost(self, message: str, error: Exception) -> None:
        self.failed = first(error)
        LOGGER.warning("%s was not uploaded to %s: %s", message, self.repository.id, self.failed)


def push(run: Path, repository: Repository, *, tell: Callable[[str], None]) -> None:
    """The result of a finished run, now. Raises MachineError where it fails for good."""
    staged = stage(run, "push", result_files(run))
    try:
        tell(f"uploading {sum(f.stat().st_size for f in staged.rglob('*')) / 1e6:,.0f} MB to {repository.url}")
        upload(api(), repository, staged, "the result")
    except failures() as error:
        raise MachineError(f"the upload failed: {first(error)}", "Try again with the same command.") from error
    finally:
        shutil.rmtree(run / STAGE, ignore_errors=True)
