"""Writes the tables of measured results in README.md from the files in benchmarks/results.

    python tools/readme_tables.py            rewrite the tables
    python tools/readme_tables.py --check    exit code 1 if a table is not what its file says

A table stands between two lines of the README and is empty as long as its file is not there:

    <!-- table: h200-attention prefill/B8 decode -->
    <!-- end of table -->

The first word names benchmarks/results/NAME.json; further words pick the rows whose case begins with one of them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"(<!-- table: (\S+)((?: \S+)*) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def rewrite(text: str, results: Path) -> str:
    """The README's text with every table as its result file has it."""

    def replace(match: re.Match[str]) -> str:
        head, name, prefixes, end = match.groups()
        path = results / f"{name}.json"
        if not path.is_file():
            return head + end
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"{head}\n{table(record, path.name, tuple(prefixes.split()))}\n\n{end}"

    return TABLE.sub(replace, text)


def table(record: dict[str, Any], file: str, prefixes: tuple[str, ...] = ()) -> str:
    """One result file, or the rows of it whose case begins with one of `prefixes`, as a Markdown table."""
    rows = [row for row in record["rows"] if not prefixes or row["case"].startswith(prefixes)]
    if not rows:
        raise ValueError(f"{file} has no row that begins with {' or '.join(prefixes)}")
    peers = list(dict.fromkeys(peer for row in rows for peer in row.get("peer", {})))
    optional = {"p99": "99 %", "share_of_limit": "share of limit"}
    shown = [key for key in optional if any(key in row for row in rows)]
    header = ["case", "result", *(optional[key] for key in shown), *peers]
    lines = [source(record, file), "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for row in rows:
        cells = [f"`{row['case']}`", f"{number(row['value'])} {row['unit']}"]
        cells += [_optional(row, key) for key in shown]
        cells += [number(row["peer"][peer]) if peer in row.get("peer", {}) else "" for peer in peers]
        lines.append(_line(cells))
    return "\n".join(lines)


def source(record: dict[str, Any], file: str) -> str:
    """Where the numbers come from, in one line."""
    machine = record.get("gpu") or record.get("machine")
    parts = [f"`benchmarks/results/{file}`", machine, record.get("date", "")[:10]]
    if record.get("commit"):
        parts.append(f"commit {record['commit'][:10]}")
    if record.get("checks", "passed 0") != "passed 0":
        parts.append(f"checks {record['checks']}")
    if record.get("failed"):
        parts.append(f"without {', '.join(part.partition(':')[0] for part in record['failed'])}, which failed")
    return "From " + ", ".join(str(part) for part in parts if part) + ":"


def number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"


def _optional(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None:
        return ""
    return f"{row[key] * 100:.0f} %" if key == "share_of_limit" else number(row[key])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str]) -> int:
    readme = PROJECT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = rewrite(before, PROJECT / "benchmarks" / "results")
    if arguments == ["--check"]:
        print("README.md is up to date" if after == before else "run: python tools/readme_tables.py")
        return int(after != before)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
