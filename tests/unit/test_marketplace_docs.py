"""docs/data.md says what the schema says, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from marketplace_tiny import tiny_config

from marketplace.logs import read_table, verify_manifest
from marketplace.schema import TABLES
from marketplace.schema_docs import schema_markdown

ROOT = Path(__file__).parents[2]


def test_docs_are_what_the_schema_generates() -> None:
    assert (ROOT / "docs" / "data.md").read_text() == schema_markdown(), "run: python -m marketplace.schema_docs > docs/data.md"


def test_every_column_is_documented() -> None:
    text = schema_markdown()
    for table in TABLES.values():
        section = text.split(f"### {table.name}\n")[1].split("\n## ")[0].split("\n### ")[0]
        for column in table.columns:
            assert f"| `{column.name}` |" in section
            assert column.meaning in section


def test_the_example_runs_and_writes_valid_logs(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", schema_markdown(), re.DOTALL).group(1)
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=120)
    verify_manifest(tmp_path / "my_logs")
    assert all(len(read_table(tmp_path / "my_logs", table)) == 1 for table in TABLES)


def test_simulate_writes_logs_and_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import types

    from cli.convert import convert
    from cli.simulate import simulate

    run = types.SimpleNamespace(name="tiny", seed=1, world=tiny_config())
    module = types.ModuleType("pipelines.config")
    module.load_run_config = lambda path: run
    monkeypatch.setitem(sys.modules, "pipelines.config", module)
    simulate("tiny.yaml", tmp_path / "out", None, 4)
    assert verify_manifest(tmp_path / "out" / "logs")["extra"]["seed"] == 4
    assert (tmp_path / "out" / "world" / "world.json").exists()
    (tmp_path / "tsmc.txt").write_text("1\ta\tc\tBar\t40.7\t-74.0\t-240\tTue Apr 03 18:00:09 +0000 2012\n")
    convert(tmp_path / "tsmc.txt", tmp_path / "city")
    said = capsys.readouterr().out
    assert "requests" in said
    assert "1 check-ins of 1 users at 1 places" in said
