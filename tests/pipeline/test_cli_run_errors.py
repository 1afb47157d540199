"""`ega run` called wrongly: exit code 2 and one clear line, before anything is simulated, written or trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app

CONFIG = Path(__file__).resolve().parents[2] / "config"
CI = str(CONFIG / "ci.yaml")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call `ega run` in an empty folder; returns the exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EGA_DATA", raising=False)
    monkeypatch.setenv("EGA_HOME", str(tmp_path / "home"))

    def call(*arguments: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, ["run", *arguments])
        return found.exit_code, found.stderr

    return call


@pytest.fixture
def checkins(tmp_path) -> str:
    path = tmp_path / "checkins.yaml"
    path.write_text("name: checkins\nworld: {kind: checkins}\n")
    return str(path)


def wrong(result: tuple[int, str], *parts: str) -> None:
    code, stderr = result
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and "Traceback" not in stderr
    assert all(part in stderr for part in parts), stderr


def test_no_configuration(run):
    wrong(run(), "ega run config/quickstart.yaml", "--resume")


def test_a_missing_configuration(run):
    wrong(run("quickstart.yaml"), "no run configuration at quickstart.yaml", "did you mean")


def test_a_missing_folder_of_logs(run, tmp_path):
    wrong(run(CI, "--logs", str(tmp_path / "nowhere")), "nowhere is not a folder", "docs/data.md")


def test_no_world_and_no_logs(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    wrong(run(str(tmp_path / "mine.yaml")), "--logs DIR")


def test_an_unknown_run_to_resume(run, tmp_path):
    wrong(run("--resume", "yesterday"), "no run 'yesterday' to resume", "none")
    (tmp_path / "runs" / "today").mkdir(parents=True)
    (tmp_path / "runs" / "today" / "run.json").write_text("{}")
    wrong(run("--resume", "yesterday"), "today")


def test_a_run_id_that_exists(run, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("name: ci\n")
    wrong(run(CI, "--run-id", "mine"), "exists already", "ega run --resume mine")
    assert (tmp_path / "runs" / "mine" / "config.yaml").read_text() == "name: ci\n"


def test_checkins_without_data(run, checkins, tmp_path):
    wrong(run(checkins), "--data DIR", "checkins.parquet")
    wrong(run(checkins, "--data", str(tmp_path / "nowhere")), "--data DIR", "nowhere")


def test_nothing_is_left_behind(run, checkins, tmp_path):
    for arguments in ((), ("quickstart.yaml",), (CI, "--logs", "nowhere"), ("--resume", "x"), (checkins,)):
        run(*arguments)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "home").exists()


def test_an_unknown_option_is_a_wrong_call(run):
    code, stderr = run(CI, "--no-such-option")
    assert code == 2 and "--no-such-option" in stderr and "Traceback" not in stderr
