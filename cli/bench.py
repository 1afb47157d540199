"""`ega bench NAME`: one measurement, printed and optionally kept as JSON and as a plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def bench(name: str, out: Path | None, run: Path | None = None, plot: Path | None = None, steps: int | None = None) -> int:
    """Run a benchmark by name; some need the folder of a finished run."""
    from benchmarks.auctions import ON_RUN
    from benchmarks.experiments import EXPERIMENTS
    from benchmarks.speed import BENCHMARKS
    from model.bundle import write_atomic
    from model.evaluation.evaluate import finite_only
    from model.evaluation.plots import lines_svg

    if steps is not None and name != "payments":
        raise ValueError(f"benchmark {name} takes no --steps; only payments trains anything")
    if name in ON_RUN:
        if run is None:
            raise ValueError(f"benchmark {name} measures a finished run: add --run RUN, e.g. the folder that `ega run config/quickstart.yaml` wrote")
        result = ON_RUN[name](run) if steps is None else ON_RUN[name](run, steps=steps)
    elif name in BENCHMARKS or name in EXPERIMENTS:
        result = (BENCHMARKS | EXPERIMENTS)[name]()
    else:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join([*BENCHMARKS, *EXPERIMENTS, *ON_RUN])}")
    if plot is not None and "series" not in result:
        raise ValueError(f"benchmark {name} has no course to plot")
    for key, value in result.items():
        if key not in ("table", "series", "axes"):
            print(f"{key:<28}{value:.4g}" if isinstance(value, float) else f"{key:<28}{value}")
    if "table" in result:
        print(markdown(result["table"]))
    if out is not None:
        write_atomic(out, json.dumps(finite_only({"name": name, **result}), indent=1, allow_nan=False).encode())
    if plot is not None:
        write_atomic(plot, lines_svg(result["series"], *result["axes"]).encode())
    return 0


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for the terminal that is also Markdown."""

    def cell(value: Any) -> str:
        return ("–" if not math.isfinite(value) else f"{value:.4g}") if isinstance(value, float) else str(value)

    header = list(rows[0])
    cells = [header, *([cell(row[name]) for name in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
