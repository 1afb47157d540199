"""Compile the pipelines to IR YAML; a test keeps the files in the repository equal to the code."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def compile_all(folder: Path = FOLDER) -> list[Path]:
    """Write <pipeline>.yaml for every pipeline into `folder`."""
    from kfp import compiler

    from pipelines.monitor_experiment import monitor_experiment
    from pipelines.train_and_approve import train_and_approve

    paths = []
    for name, pipeline in (("train_and_approve", train_and_approve), ("monitor_experiment", monitor_experiment)):
        paths.append(Path(folder) / f"{name}.yaml")
        compiler.Compiler().compile(pipeline, str(paths[-1]))
    return paths
