"""Run the training pipeline in this environment through kfp.local: same components, same control flow, no cluster."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.config import RunConfig, as_json
from pipelines.version import code_version


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


def run_pipeline(config: RunConfig, logs: Path, run_dir: Path, home: Path) -> str:
    """Run train_and_approve on a folder of logs; returns its verdict: an exact model tag, or "rejected: reason".

    Steps run as subprocesses of this interpreter. Finished training stages are found again and unfinished ones resume from
    their checkpoints, so running this twice with one `run_dir` is how a run is resumed.
    """
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # kfp starts `python3`
    from kfp import local

    from pipelines.train_and_approve import train_and_approve

    logging.getLogger("kfp").setLevel(logging.WARNING)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(run_dir / "pipeline"), raise_on_error=True)
    try:
        task = train_and_approve(
            logs=str(logs), run_dir=str(run_dir), home=str(home), validation=as_json(config.validation), behaviours=config.features.behaviours,
            sampling=as_json(config.sampling), network=as_json(config.network), training=as_json(config.training),
            candidate=as_json(config.candidate), seed=config.seed, code_version=code_version(),
        )  # fmt: skip
    except RuntimeError as error:
        raise PipelineFailed(str(error)) from error
    verdict = task.output
    if not isinstance(verdict, str) or not verdict:
        raise PipelineFailed(f"the pipeline ended without a verdict ({verdict!r})")
    return verdict
