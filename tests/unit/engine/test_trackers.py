"""Trackers hear the numbers under their names and the recipe without secrets, go on where a run goes on, and never end
a training."""

import pytest

from finetune_cli.engine import trackers as module
from finetune_cli.engine.trackers import IDS, Trackers, redacted
from finetune_cli.errors import MachineError
from finetune_cli.recipe.sections import Logging
from tests.helpers import finetune

NUMBERS = [
    {"event": "train", "step": 1, "epoch": 0.5, "loss": 0.5},
    {"event": "train", "step": 2, "epoch": 1.0, "loss": 0.25},
    {"event": "eval", "step": 2, "epoch": 1.0, "eval_loss": 0.75},
]


def test_unknown_tracker_is_named(tmp_path):
    with pytest.raises(MachineError, match="'tensorbord' is not a tracker") as caught:
        Trackers(Logging(report_to=["tensorbord"]), tmp_path, {})
    assert "tensorboard" in caught.value.hint


def test_tensorboard_gets_the_numbers_under_their_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(Logging(), tmp_path, {"fingerprint": "abc"})
    trackers({"event": "train", "step": 3, "epoch": 0.5, "loss": 0.25})
    trackers({"event": "eval", "step": 3, "epoch": 0.5, "eval_loss": 0.75})
    trackers({"event": "sample", "step": 3, "epoch": 0.5, "row": 1})
    trackers.close()
    files = (tmp_path / "tensorboard").rglob("events.out.tfevents.*")
    (read,) = (found for file in files if (found := EventAccumulator(str(file)).Reload()).Tags()["scalars"])
    assert set(read.Tags()["scalars"]) == {"loss", "eval_loss", "epoch"}
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(3, 0.25)]
    assert [(e.step, e.value) for e in read.Scalars("eval_loss")] == [(3, 0.75)]


def test_the_project_is_the_recipes_then_that_of_the_trackers_own_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert module.arguments("wandb", Logging(), tmp_path) == ("finetune",)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert module.arguments("wandb", Logging(), tmp_path) == ("theirs",)
    assert module.arguments("mlflow", Logging(), tmp_path) == ("finetune",)
    assert module.arguments("wandb", Logging(project="ours"), tmp_path) == ("ours",)


def test_secrets_are_not_told():
    values = {
        "train.learning_rate": 1e-4, "hub.token": "whatever", "data.train": [{"path": "https://me:pass@host/x"}],
        "model.name_or_path": "hf_" + "a" * 34, "lora.use_dora": False, "model.revision": None,
    }  # fmt: skip
    assert redacted(values) == {
        "train.learning_rate": 1e-4, "hub.token": "***", "data.train": '[{"path": "https://***@host/x"}]',
        "model.name_or_path": "***", "lora.use_dora": False, "model.revision": "null",
    }  # fmt: skip


class Failing:
    def __init__(self, at):
        self.at, self.heard = at, []

    def store_init_configuration(self, config):
        self.heard.append("config")

    def log(self, numbers, step):
        self.heard.append(step)
        if step == self.at:
            raise ConnectionError("the server is gone")

    def finish(self):
        self.heard.append("end")


def test_a_tracker_that_fails_is_left_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    made = {"wandb": Failing(at=1), "aim": Failing(at=None)}
    monkeypatch.setattr(module, "start", lambda name, *_: made[name])
    monkeypatch.setattr(module, "id_of", lambda *_: None)
    told = Trackers(Logging(report_to=["wandb", "aim"]), tmp_path, {})
    for event in NUMBERS:
        told(event)
    told.close()
    assert made["wandb"].heard == ["config", 1]
    assert made["aim"].heard == ["config", 1, 2, 2, "end"]
    assert caplog.text.count("the tracker wandb failed and is left: ConnectionError: the server is gone") == 1


def test_wandb_offline_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore  # the file of an offline run

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logging = Logging(report_to=["wandb"], project="numbers", run_name="first")
    told = Trackers(logging, tmp_path, {"train.learning_rate": 0.5})
    for event in NUMBERS:
        told(event)
    told.close()
    (file,) = tmp_path.rglob("run-*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    records = []
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        records.append(record)
    (run,) = (r.run for r in records if r.HasField("run"))
    assert (run.project, run.display_name) == ("numbers", "first")
    rows = [
        {item.key or ".".join(item.nested_key): item.value_json for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert [row["loss"] for row in rows if "loss" in row] == ["0.5", "0.25"]
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == ["0.75"]
    said = [item for r in records if r.HasField("config") for item in r.config.update]
    assert any("learning_rate" in (item.key or ".".join(item.nested_key)) and item.value_json == "0.5" for item in said)
    again = Trackers(logging, tmp_path, {}, keep_through=1)
    assert f'"{again.trackers["wandb"].run.id}"' in (tmp_path / IDS).read_text()
    assert again.trackers["wandb"].run.id == run.run_id
    again.close()


def test_mlflow_in_files_for_real(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    logging = Logging(report_to=["mlflow"], project="numbers", run_name="first")
    told = Trackers(logging, tmp_path, {"train.learning_rate": 0.5})
    for event in NUMBERS:
        told(event)
    told.close()
    again = Trackers(logging, tmp_path, {}, keep_through=1)
    again({"event": "train", "step": 3, "epoch": 1.5, "loss": 0.125})
    again.close()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("numbers")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first"
    assert run.data.params["train.learning_rate"] == "0.5"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.125),
    ]
    assert run.data.metrics["eval_loss"] == 0.75


@pytest.mark.parametrize(
    ("name", "said"),
    [("tensorbord", "did you mean tensorboard?"), ("clearml", "clearml is not installed"), ("wandb", None)],
)
def test_what_cannot_start_is_told_before_the_run(name, said, recipe_of, tmp_path):
    done = finetune(
        "run", str(recipe_of(logging={"report_to": name})), cwd=tmp_path, WANDB_API_KEY="", WANDB_MODE="", NETRC="/none"
    )
    assert done.returncode == 2
    assert "FT112" in done.stderr
    assert "recipe.yaml:" in done.stderr
    assert said is None or said in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_names_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    from finetune_cli.checks.lints import TRACKERS

    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
