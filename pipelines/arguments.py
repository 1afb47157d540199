"""The arguments of the training pipeline for a configuration: the same for a local run and for a cluster."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from pipelines.config import RunConfig, as_json
from pipelines.version import code_version


def pipeline_arguments(config: RunConfig, logs: PurePath, run_dir: PurePath, home: PurePath, fresh: bool = False) -> dict[str, Any]:
    """Arguments of `train_and_approve` by name.

    Args:
        logs, run_dir, home: folders as the steps see them.
        fresh: empty the feature store first; for simulated runs.
    """
    return {
        "logs": str(logs),
        "run_dir": str(run_dir),
        "home": str(home),
        "validation": as_json(config.validation),
        "behaviours": config.features.behaviours,
        "fresh": fresh,
        "sampling": as_json(config.sampling),
        "kind": config.model.kind,
        "model": as_json(config.model),
        "training": as_json(config.training),
        "candidate": as_json(config.candidate),
        "seed": config.seed,
        "code_version": code_version(),
    }
