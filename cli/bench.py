"""`ega bench NAME`: one measurement, printed and optionally kept as JSON."""

from __future__ import annotations

import json
from pathlib import Path


def bench(name: str, out: Path | None) -> int:
    """Run a benchmark by name."""
    from benchmarks.speed import BENCHMARKS
    from model.bundle import write_atomic

    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    result = BENCHMARKS[name]()
    for key, value in result.items():
        print(f"{key:<28}{value:.4g}" if isinstance(value, float) else f"{key:<28}{value}")
    if out is not None:
        write_atomic(out, json.dumps({"name": name, **result}, indent=1).encode())
    return 0
