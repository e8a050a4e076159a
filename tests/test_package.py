"""The package from outside: what importing it loads, what it offers, and what is shipped with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import command_line
import pytest

import soprano_cupy
from soprano_cupy.cuda.source import kernels_folder

PROJECT = Path(__file__).resolve().parents[1]
HEAVY = {"numpy", "cupy", "ml_dtypes", "tokenizers", "safetensors", "huggingface_hub", "anyascii", "http.server"}


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has loaded after a statement."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, env=command_line.environment()
    )
    return set(json.loads(result.stdout))


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import soprano_cupy")
    assert HEAVY.isdisjoint(loaded)
    assert {name for name in loaded if name.startswith("soprano_cupy")} == {"soprano_cupy"}


def test_the_classes_need_numpy_alone() -> None:
    loaded = modules_after("from soprano_cupy import Qwen3, SopranoTTS, VocosDecoder")
    assert HEAVY & loaded == {"numpy"}


def test_public_names() -> None:
    assert soprano_cupy.__all__ == sorted(soprano_cupy.__all__)
    for name in soprano_cupy.__all__:
        assert getattr(soprano_cupy, name).__name__ == name
        assert name in dir(soprano_cupy)
    with pytest.raises(AttributeError, match="'soprano_cupy' has no attribute 'nothing'"):
        soprano_cupy.nothing  # noqa: B018
    for module, names in {
        "text": ("build_prompts", "normalize", "split_sentences"),
        "attention": ("attention", "flash_attention", "select_attention", "standard_attention"),
        "testing": ("make_checkpoint",),
    }.items():
        assert all(callable(getattr(import_module(f"soprano_cupy.{module}"), name)) for name in names)


def test_errors_have_one_base() -> None:
    for name in soprano_cupy.__all__:
        value = getattr(soprano_cupy, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, soprano_cupy.SopranoError)
    assert issubclass(soprano_cupy.ParameterError, ValueError)


def test_what_is_shipped() -> None:
    """The bundled voice, the kernels' sources and the marker for type checkers, wherever the package lies."""
    package = Path(soprano_cupy.__file__).parent
    assert (package / "py.typed").is_file()
    voice = {path.name for path in (package / "voices" / "mini").iterdir()}
    assert voice >= {"config.json", "tokenizer.json", "model.safetensors", "decoder.safetensors", "README.md"}
    assert "attention_params.cuh" in {path.name for path in kernels_folder().iterdir()}
    assert list((package / "cpu").glob("*.so"))


def test_version_and_change_log() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", soprano_cupy.__version__)
    newest = re.search(r"^## (\S+)", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == soprano_cupy.__version__


def test_metadata_of_the_installed_package() -> None:
    try:
        installed = metadata.metadata("soprano-cupy")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is imported from a folder, not installed")
    assert installed["Version"] == soprano_cupy.__version__
    assert installed["License-Expression"] == "Apache-2.0"
    assert {"cuda12", "cuda13", "play", "test"} <= set(installed.get_all("Provides-Extra"))
    lines = metadata.requires("soprano-cupy") or []
    required = {re.split(r"[<>=\[; ]", line)[0] for line in lines if "extra" not in line}
    assert required == {"numpy", "tokenizers", "huggingface_hub", "anyascii"}
