"""External anchors: our models on other people's data, beside other people's numbers (docs/measuring.md)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

ON_DATA = {"sequential": ("benchmarks.sequential", "games"), "next-poi": ("benchmarks.next_poi", "nyc"), "serp": ("benchmarks.serp", "serp")}
"""Benchmark -> its module and the folder that it reads by default under $EGA_DATA."""
FOLDERS = {name: folder for name, (_, folder) in ON_DATA.items()} | {"peers": "games"}


def find_data(name: str, data: Path | None) -> Path:
    """`--data`: a path, or the name of a folder under $EGA_DATA; without it the benchmark's own folder there."""
    root = os.environ.get("EGA_DATA")
    if data is not None and data.exists():
        return data
    wanted = data or Path(FOLDERS[name])
    if root and (Path(root) / wanted).exists():
        return Path(root) / wanted
    where = f"neither here nor under EGA_DATA={root}" if root else "not here, and EGA_DATA is not set"
    raise FileNotFoundError(f"benchmark {name} needs a folder of data: {wanted} is {where}; add --data DIR")


def anchor(name: str) -> Callable[..., dict[str, Any]]:
    """The benchmark `name` as a function of its options."""

    def run(data: Path | None = None, seed: int = 0, quick: bool = False) -> dict[str, Any]:
        return measure(name, data, seed, quick)

    return run


def measure(name: str, data: Path | None, seed: int, quick: bool) -> dict[str, Any]:
    """Run one anchor; its result with what is needed to repeat it."""
    import torch

    from pipelines.version import code_version

    module = import_module(ON_DATA[name][0])
    function: Callable[..., dict[str, Any]] = getattr(module, name.replace("-", "_"))
    folder = find_data(name, data)
    started = time.perf_counter()
    result = function(folder, seed=seed, quick=quick)
    minutes = (time.perf_counter() - started) / 60
    versions = {package: metadata.version(package) for package in ("torch", "numpy", "pandas")}
    return {**result, "minutes": minutes, "data": folder.name, "quick": quick, "threads": torch.get_num_threads(), "code_version": code_version(), "versions": versions}
