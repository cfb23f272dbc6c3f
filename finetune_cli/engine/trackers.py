"""Trackers, as accelerate knows them: TensorBoard, Weights & Biases, MLflow and others.

They hear the numbers of train and eval events under their own names, and the recipe as it was resolved, without
secrets. A tracker that fails while the run goes on is told of once and left; it never ends a training.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_cli.engine.manifest import WRITING, write_text
from finetune_cli.errors import MachineError
from finetune_cli.log import LOGGER
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe import secrets
from finetune_cli.recipe.sections import Logging

IDS = "trackers.json"
"""Under which ids trackers know the run, for a resumed one to go on there."""
PROJECT = "finetune"
OWN_NAMES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME", "comet_ml": "COMET_PROJECT_NAME"}
"""Where trackers themselves look for the project; heeded where the recipe names none."""


def redacted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values that every tracker takes; what looks like a secret, or is called one, is not told."""
    return {key: _told(key.rpartition(".")[2], value) for key, value in values.items()}


def _told(name: str, value: Any) -> Any:
    if secrets.is_secret(name, value):
        return "***"
    if isinstance(value, bool | int | float):
        return value
    return secrets.mask(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def config_of(plan: Plan) -> dict[str, Any]:
    return redacted({**plan.effective, "fingerprint": plan.fingerprint})


class Trackers:
    """Those that `logging.report_to` names. `keep_through` is the step that a resumed run goes on from."""

    def __init__(self, logging: Logging, run: Path, config: dict[str, Any], *, keep_through: int | None = None) -> None:
        for file in (run / "tensorboard").rglob("events.out.tfevents.*"):
            cut_back(file, keep_through if keep_through is not None else -1)
        ids = _ids(run) if keep_through is not None else {}
        named = [name for name in logging.report_to if name != "none"]
        self.trackers = {name: start(name, logging, run, ids.get(name)) for name in named}
        ids = {name: found for name, tracker in self.trackers.items() if (found := id_of(name, tracker)) is not None}
        if ids:
            write_text(run / IDS, json.dumps(ids))
        if keep_through is None:
            self._each("store_init_configuration", config)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] in ("train", "eval"):
            numbers = {k: v for k, v in event.items() if isinstance(v, int | float) and k not in ("step",)}
            self._each("log", numbers, step=event["step"])

    def close(self) -> None:
        self._each("finish")

    def _each(self, what: str, *args: Any, **kwargs: Any) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                getattr(tracker, what)(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  whatever a tracker raises, the training is worth more
                LOGGER.warning("the tracker %s failed and is left: %s: %s", name, type(error).__name__, error)
                del self.trackers[name]


def start(name: str, logging: Logging, run: Path, known: str | None) -> Any:
    """A tracker that has begun its run, or gone on with the one of the id `known`. Raises MachineError for one that
    accelerate does not know, whose package is missing, or that does not start."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        choices = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise MachineError(f"logging.report_to {name!r} is not a tracker", f"Known: none, {choices}.")
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](*arguments(name, logging, run), **keywords(name, logging, run, known))
        tracker.start()
    except ImportError as error:
        raise MachineError(f"logging.report_to {name} needs a package: {error}", f"pip install {name}") from error
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = f"Log in to {name}, use its offline mode, or take it out of logging.report_to."
        raise MachineError(f"the tracker {name} does not start: {said}", hint) from error
    return tracker


def arguments(name: str, logging: Logging, run: Path) -> tuple[str, ...]:
    """TensorBoard's project is the folder itself; the others' is `logging.project`, else that of their environment."""
    if name == "tensorboard":
        return (".", str(run / "tensorboard"))
    project = logging.project or os.environ.get(OWN_NAMES.get(name, "")) or PROJECT
    return (project, str(run / name)) if name in ("aim",) else (project,)


def keywords(name: str, logging: Logging, run: Path, known: str | None) -> dict[str, Any]:
    """The name of the run, where its files lie, and the id under which it goes on, in each tracker's own words."""
    called = logging.run_name or run.name
    if name == "wandb":
        again = {"id": known, "resume": "allow"} if known is not None else {}
        return {"name": called, "dir": str(run), **again}
    if name == "mlflow":
        if "MLFLOW_TRACKING_URI" not in os.environ:
            import mlflow

            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3 refuses plain files without it
            mlflow.set_tracking_uri(f"sqlite:///{run / 'mlflow.db'}" if _has_sql() else (run / "mlflow").as_uri())
        return {"run_name": called, "run_id": known}
    return {"name": called} if name in ("trackio", "swanlab") else {}


def _has_sql() -> bool:
    """mlflow-skinny comes without the package that its database needs."""
    from importlib.util import find_spec

    return find_spec("sqlalchemy") is not None and find_spec("alembic") is not None


def id_of(name: str, tracker: Any) -> str | None:
    if name == "wandb":
        return str(tracker.run.id)
    return str(tracker.active_run.info.run_id) if name == "mlflow" else None


def _ids(run: Path) -> dict[str, str]:
    file = run / IDS
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def cut_back(file: Path, keep_through: int) -> None:
    """Take the events of later steps out of a TensorBoard file, and what was half written at its end."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept = [raw for raw in RawEventFileLoader(str(file)).Load() if Event.FromString(raw).step <= keep_through]
    if not kept:
        file.unlink()
        return
    beside = file.with_name(WRITING)  # TensorBoard reads whatever has "tfevents" in its name
    with beside.open("wb") as stream:
        writer = RecordWriter(stream)
        for raw in kept:
            writer.write(raw)
    beside.replace(file)
