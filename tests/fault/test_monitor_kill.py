"""kill -9 inside the join of raw events: the next run finishes it, and the logs are those of a join that nobody disturbed."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.experiments import write_raw_events

CODE = "import sys; from pathlib import Path; from monitoring.store import update; print('joining', flush=True); update(Path(sys.argv[1]), Path(sys.argv[2]))"


def start(raw: Path, out: Path) -> subprocess.Popen[str]:
    """A join in a process of its own; returns once it has begun."""
    process = subprocess.Popen([sys.executable, "-c", CODE, str(raw), str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "joining\n"
    return process


def contents(out: Path) -> dict[str, str]:
    """Hash of every file of the joined logs."""
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*")) if path.is_file()}


def test_killed_joins_leave_nothing_behind_and_the_next_one_finishes(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_raw_events(raw, 20_000, np.random.default_rng(3), most_copies=3)
    begun = time.monotonic()
    assert start(raw, tmp_path / "whole").wait() == 0
    whole, expected = time.monotonic() - begun, contents(tmp_path / "whole")
    assert any(name.startswith("impressions/day=") for name in expected)
    killed = 0
    for share in (0.2, 0.45, 0.7, 0.9):
        process = start(raw, tmp_path / "killed")
        time.sleep(share * whole)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 1
    assert start(raw, tmp_path / "killed").wait() == 0
    assert contents(tmp_path / "killed") == expected
