"""Run the training pipeline in this environment through kfp.local: same components, same control flow, no cluster."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipelines.arguments import pipeline_arguments
from pipelines.config import RunConfig


class PipelineFailed(RuntimeError):
    """A step failed; its own message is in the output above."""


class AlreadyRunning(RuntimeError):
    """Another run of this configuration is active in the same EGA_HOME."""


@contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """One run a home at a time: two would overwrite each other's feature store. Freed by the system when the process ends."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "run.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"another run is using {home}; wait for it to end, or set EGA_HOME to another folder") from None
        yield


RUN_VARIABLE = "EGA_RUN_DIR"
"""Marks the processes of a run, so that a resumed run finds what a killed one left behind."""


def end_orphans(run_dir: Path) -> int:
    """End the steps that outlived a killed run of this folder; returns how many. Call with the home's lock held: whoever else
    carries the mark then has no parent that waits for it."""
    import psutil

    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    orphans = []
    for process in psutil.process_iter():
        try:
            if process.pid not in ours and process.environ().get(RUN_VARIABLE) == str(run_dir):
                process.kill()
                orphans.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue  # another user's process, or one that ended by itself
    psutil.wait_procs(orphans, timeout=30)
    return len(orphans)


_STEP = re.compile(r"Executing task \S*?'([^']+)'")
_PROGRESS = re.compile(r"^\s*(\w[\w ]*:\s+\d+%\|.*)$")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class StepConsole(io.TextIOBase):
    """What kfp.local prints goes to a log file; the terminal gets one line a step, and the progress bars of training."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal, self._log, self._line, self._bar = terminal, log, "", False

    def write(self, text: str) -> int:
        self._log.write(text)
        *lines, self._line = (self._line + text).replace("\r", "\n").split("\n")
        for line in lines:
            plain = _COLOUR.sub("", line)
            if found := _STEP.search(plain):
                self._show(f"  {time.strftime('%H:%M:%S')}  {found[1]}")
            elif found := _PROGRESS.match(plain):
                self._progress(found[1])
        return len(text)

    def flush(self) -> None:
        self._log.flush()
        self._terminal.flush()

    def _show(self, line: str) -> None:
        self._terminal.write(("\n" if self._bar else "") + line + "\n")
        self._bar = False
        self.flush()

    def _progress(self, bar: str) -> None:
        if self._terminal.isatty():
            self._terminal.write(f"\r            {bar[:110]:<110}")
            self._bar = True
            self.flush()
        elif "100%" in bar:
            self._show(f"            {bar}")


def run_pipeline(config: RunConfig, logs: Path, run_dir: Path, home: Path, fresh: bool = False) -> str:
    """Run train_and_approve on a folder of logs; returns its verdict: an exact model tag, or "rejected: reason".

    `fresh` empties the feature store first, so that nothing of an earlier simulated experiment is left in it.

    Steps run as subprocesses of this interpreter. Finished training stages are found again and unfinished ones resume from
    their checkpoints, so running this twice with one `run_dir` is how a run is resumed.
    """
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # kfp starts `python3`
    from kfp import local

    from pipelines.train_and_approve import train_and_approve

    if left := end_orphans(run_dir):
        print(f"  ended {left} process(es) that an interrupted run had left behind")
    os.environ[RUN_VARIABLE] = str(run_dir)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(run_dir / "pipeline"), raise_on_error=True)
    try:
        with open(run_dir / "pipeline.log", "a", buffering=1) as log, contextlib.redirect_stdout(StepConsole(sys.stdout, log)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # resource limits and images mean nothing to the local runner, and it says so for every step
            task = train_and_approve(**pipeline_arguments(config, logs, run_dir, home, fresh))
    except RuntimeError as error:
        raise PipelineFailed(str(error)) from error
    verdict = task.output
    if not isinstance(verdict, str) or not verdict:
        raise PipelineFailed(f"the pipeline ended without a verdict ({verdict!r})")
    return verdict
