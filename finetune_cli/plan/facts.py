"""What is known of a model before its weights are read: its kind, its size, whether it is an adapter."""

import json
from pathlib import Path

from finetune_cli.errors import ModelError
from finetune_cli.recipe.sections import Model
from finetune_cli.spec import Spec


class Facts(Spec):
    """Facts about `model.name_or_path`."""

    kind: str
    """folder | adapter | merged | gguf | builtin | hub. Merged: an adapter that becomes part of its base first."""
    model_type: str | None = None
    parameters: int | None = None
    """Number of weights, where the folder tells."""
    base: str | None = None
    """The model under an adapter."""


def of(model: Model) -> Facts:
    """Raises ModelError for a path that is not there or is no model."""
    found = look(model.name_or_path)
    merged = found.kind == "adapter" and model.starting_adapter == "merge"
    return found.model_copy(update={"kind": "merged"}) if merged else found


def look(name: str) -> Facts:
    """Raises ModelError for a path that is not there or is no model."""
    if name.startswith("builtin:"):
        return Facts(kind="builtin")
    path = Path(name)
    if name.endswith(".gguf"):
        _must_exist(path)
        return Facts(kind="gguf")
    if path.is_dir():
        return _folder(path)
    if path.is_absolute() or name.startswith("."):
        _must_exist(path)
        raise ModelError(f"{name} is a file, not a model", "Name a model folder, an adapter folder or a .gguf file.")
    return Facts(kind="hub")


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise ModelError(f"{path} does not exist", "Check model.name_or_path; paths are relative to the recipe.")


def _folder(path: Path) -> Facts:
    adapter = path / "adapter_config.json"
    if adapter.exists():
        return Facts(kind="adapter", base=_json(adapter).get("base_model_name_or_path"))
    config = path / "config.json"
    if not config.exists():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise ModelError(f"{path} has no config.json (found: {found})", "Name the folder that holds the model.")
    return Facts(kind="folder", model_type=_json(config).get("model_type"), parameters=_parameters(path))


def _json(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}", "Fetch the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", "Fetch the model again.")
    return value


def _parameters(path: Path) -> int | None:
    """Weights by the headers of the safetensors files."""
    total = 0
    for file in sorted(path.glob("*.safetensors")):
        total += sum(_product(shape) for shape in shapes(file).values())
    return total or None


def shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor, by the header of a safetensors file. Raises ModelError where it has none."""
    try:
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(min(size, file.stat().st_size)))  # a damaged file may ask for exabytes
            return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is damaged: it has no safetensors header", "Fetch the model again.") from error


def _product(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
