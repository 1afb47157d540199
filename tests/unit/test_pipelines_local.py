"""The local runner's console, its lock, and what it does about processes that a killed run left behind."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.local import RUN_VARIABLE, AlreadyRunning, StepConsole, end_orphans, home_lock
from pipelines.version import code_version


def test_the_terminal_gets_one_line_a_step_and_the_log_gets_everything() -> None:
    terminal, log = io.StringIO(), io.StringIO()
    console = StepConsole(terminal, log)
    text = "12:00:00 - INFO - Executing task \x1b[96m'validate-logs'\x1b[0m\nchatter\n    pretrain:  50%|###  | 5/10 [00:01]\r    pretrain: 100%|#####| 10/10 [00:02]\n"
    for character in text:  # however it arrives
        console.write(character)
    assert log.getvalue() == text
    lines = terminal.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].endswith("validate-logs") and "100%" in lines[1] and "chatter" not in terminal.getvalue()


def test_one_run_a_home(tmp_path: Path) -> None:
    with home_lock(tmp_path / "home"), pytest.raises(AlreadyRunning, match="another run is using"), home_lock(tmp_path / "home"):
        pass
    with home_lock(tmp_path / "home"):
        pass


def test_only_the_orphans_of_this_very_run_are_ended(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    ours, other = (
        subprocess.Popen(sleeper, env={**os.environ, RUN_VARIABLE: str(tmp_path / name)}, stdout=subprocess.PIPE) for name in ("mine", "another")
    )
    try:
        for process in (ours, other):
            assert process.stdout is not None and process.stdout.readline() == b"up\n"
        assert end_orphans(tmp_path / "mine") == 1
        assert ours.poll() is not None and other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def test_the_code_version_is_stable_and_short() -> None:
    assert code_version() == code_version() and len(code_version()) == 12
