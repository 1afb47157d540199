"""Compile the pipelines to IR YAML; a test keeps the files in the repository equal to the code."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def compile_all(folder: Path = FOLDER) -> list[Path]:
    """Write <pipeline>.yaml for every pipeline into `folder`."""
    from kfp import compiler

    from pipelines.train_and_approve import train_and_approve

    path = Path(folder) / "train_and_approve.yaml"
    compiler.Compiler().compile(train_and_approve, str(path))
    return [path]
