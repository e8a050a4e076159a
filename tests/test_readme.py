"""The README is true: its snippets run, its tables are their files, the names in it exist."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_line
import pytest

from soprano_cupy.cli import build_parser
from soprano_cupy.text import build_prompts

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"(?:<!-- not run: (.+?) -->\n)?```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = ["generate", "list", "download", "cache", "convert", "devices", "doctor", "bench", "serve"]
RUNNABLE = [(language, code) for why_not, language, code in SNIPPETS if not why_not]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with `soprano-cupy` on the PATH of its shell."""
    for name, value in command_line.quiet_environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    for name in ("SOPRANO_MODEL", "SOPRANO_ATTENTION", "SOPRANO_DTYPE"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "programs"
    programs.mkdir()
    program = programs / "soprano-cupy"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m soprano_cupy "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def test_snippets_are_found() -> None:
    assert [language for language, _ in RUNNABLE] == ["sh", "python", "python"]
    assert {language for _, language, _ in SNIPPETS} == {"sh", "python"}


@pytest.mark.parametrize("code", [code for language, code in RUNNABLE if language == "python"])
def test_python_snippets(place: Path, code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert all(path.stat().st_size > 44 for path in place.rglob("*.wav"))


@pytest.mark.parametrize("code", [code for language, code in RUNNABLE if language == "sh"])
def test_shell_snippets(place: Path, code: str) -> None:
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], capture_output=True, env=command_line.environment(), check=False
    )
    assert result.returncode == 0, result.stderr.decode()
    named = set(re.findall(r"[\w/]+\.wav", code))
    assert {str(path.relative_to(place)) for path in place.rglob("*.wav")} == named


def test_commands_that_are_not_run_exist() -> None:
    """Snippets that need more than a test has, and the table of commands: they parse."""
    parser = build_parser()
    for why_not, _, code in SNIPPETS:
        for line in re.findall(r"soprano-cupy ([^|&>#\n]+)", code) if why_not else []:
            parser.parse_args([word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)])
    listed = README.partition("The other commands:")[2].partition("Exit codes")[0]
    commands = re.findall(r"^\| `([a-z]+)[^`]*` \| ", listed, re.MULTILINE)
    assert sorted([*commands, "generate"]) == sorted(COMMANDS)
    for command in commands:
        with pytest.raises(SystemExit) as end:
            parser.parse_args([command, "--help"])
        assert end.value.code == 0


def test_settings_are_those_of_the_program() -> None:
    from soprano_cupy import settings

    documented = set(re.findall(r"`(SOPRANO_[A-Z_]+)`", README))
    assert documented - {"SOPRANO_SHARED"} == set(re.findall(r"SOPRANO_[A-Z_]+", settings.__doc__ or ""))
    rows = {
        name: set(re.findall(r"`([^`]+)`", values))
        for name, values in re.findall(r"^\| .*? \| `(SOPRANO_\w+)` \| (.*) \|$", README, re.MULTILINE)
    }
    assert rows["SOPRANO_ATTENTION"] == set(settings.ATTENTIONS)
    assert rows["SOPRANO_DTYPE"] == set(settings.DTYPES)


def test_the_prompt_in_the_readme() -> None:
    assert [(p.startswith("[STOP][TEXT]"), p.endswith("[START]")) for p in build_prompts("It costs $3.50.")] == [
        (True, True)
    ]


# The tables.


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    path = PROJECT / "tools" / "readme_tables.py"
    if not path.is_file():
        pytest.skip("tools/ is not here: the tests run beside an installed package")
    return runpy.run_path(str(path))


def test_tables_are_what_their_files_say(tables: dict[str, Any]) -> None:
    assert tables["rewrite"](README, PROJECT / "benchmarks" / "results") == README
    assert len(tables["TABLE"].findall(README)) == README.count("<!-- table: ") > 0


RECORD = {
    "what": "attention",
    "machine": "some machine",
    "gpu": "Some GPU",
    "date": "2026-01-02T03:04:05",
    "commit": "0123456789abcdef",
    "checks": "passed 12",
    "rows": [
        {"case": "prefill/B1", "value": 12.345, "unit": "us", "share_of_limit": 0.567, "peer": {"other": 1234.5}},
        {"case": "prefill/B8", "value": 0.01234, "unit": "us", "p99": 123.4},
        {"case": "decode/B1", "value": 4321.0, "unit": "us"},
    ],
}


def test_a_table(tables: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(json.dumps(RECORD))
    text = (
        "before\n<!-- table: some -->\nold\n<!-- end of table -->\nafter <!-- table: none -->\n<!-- end of table -->\n"
    )
    after = tables["rewrite"](text, tmp_path)
    assert after.splitlines() == [
        "before",
        "<!-- table: some -->",
        "",
        "From `benchmarks/results/some.json`, Some GPU, 2026-01-02, commit 0123456789, checks passed 12:",
        "",
        "| case | result | 99 % | share of limit | other |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `prefill/B1` | 12.3 us |  | 57 % | 1,234 |",
        "| `prefill/B8` | 0.0123 us | 123 |  |  |",
        "| `decode/B1` | 4,321 us |  |  |  |",
        "",
        "<!-- end of table -->",
        "after <!-- table: none -->",
        "<!-- end of table -->",
    ]
    assert tables["rewrite"](after, tmp_path) == after


def test_chosen_rows(tables: dict[str, Any]) -> None:
    lines = tables["table"](RECORD, "some.json", ("decode", "nothing")).splitlines()
    assert lines[2:] == ["| case | result |", "| --- | ---: |", "| `decode/B1` | 4,321 us |"]
    with pytest.raises(ValueError, match="no row that begins with nothing"):
        tables["table"](RECORD, "some.json", ("nothing",))
