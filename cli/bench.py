"""`ega bench NAME`: one measurement, printed and optionally kept as JSON and as a plot."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _load(run: Path, seconds: float = 60.0) -> dict[str, Any]:
    """`benchmarks.load` on the service of a finished, approved run."""
    from benchmarks.load import load
    from cli.run import ega_home
    from pipelines.config import load_run_config

    if not (run / "config.yaml").is_file():
        raise ValueError(f"benchmark load drives the service of a finished, approved run; {run} holds none")
    return load(ega_home() / load_run_config(run / "config.yaml").name, seconds, say=print)


def _table4(config: Path | None = None, data: Path | None = None, seed: int | None = None, quick: bool = False) -> dict[str, Any]:
    """`benchmarks.online.table4` with the experiments of `ega ab`."""
    from benchmarks.online import table4
    from cli.ab import Experiment, execute
    from monitoring.report import MonitorResult

    def drive(run: Path, home: Path, monitoring: Any, driver: Any, price_modes: Any, title: str) -> MonitorResult:
        _, result = execute(Experiment(run, home, monitoring, driver, title, price_modes=price_modes))
        if not isinstance(result, MonitorResult):
            raise ValueError("table4 judges what users do; set experiment.driver.shadow to false")
        return result

    return table4(drive, config, data, seed, quick)


def benchmarks() -> dict[str, Callable[..., dict[str, Any]]]:
    """Every benchmark by name. Its parameters are the options that it takes."""
    from benchmarks.anchors import ON_DATA, anchor
    from benchmarks.auctions import ON_RUN
    from benchmarks.experiments import EXPERIMENTS
    from benchmarks.flops import flops
    from benchmarks.pages import PAGES
    from benchmarks.peers import peers
    from benchmarks.speed import BENCHMARKS
    from benchmarks.tables import TABLES

    return {**BENCHMARKS, **EXPERIMENTS, **ON_RUN, **TABLES, **PAGES, "table4": _table4, "flops": flops, "peers": peers, "load": _load, **{name: anchor(name) for name in ON_DATA}}


def bench(name: str, out: Path | None = None, plot: Path | None = None, **options: Any) -> int:
    """Run a benchmark by name with the options that were given (None: not given); print it, keep it as JSON and, where it has something to show, as a plot: in
    `plot`, or beside `out`."""
    from benchmarks.results import drawing, markdown
    from model.bundle import write_atomic
    from model.evaluation.evaluate import finite_only

    known = benchmarks()
    if name not in known:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(known)}")
    takes = inspect.signature(known[name]).parameters
    given = {option: value for option, value in options.items() if value is not None}
    wrong = [option for option in given if option not in takes]
    if wrong:
        others = [other for other, function in known.items() if wrong[0] in inspect.signature(function).parameters]
        raise ValueError(f"benchmark {name} takes no --{wrong[0].replace('_', '-')}" + (f"; only {', '.join(others)} can" if others else ""))
    if "run" in takes and "run" not in given:
        raise ValueError(f"benchmark {name} measures a finished run: add --run RUN, e.g. the folder that `ega run config/quickstart.yaml` wrote")
    for file in (out, plot):  # a measurement may take an hour
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir() or not os.access(file.parent, os.W_OK):
                raise ValueError(f"{file} cannot be written; name another file")
    shown = "".join(f" --{option.replace('_', '-')}" + ("" if value is True else f" {value}") for option, value in given.items())
    if out is not None and "keep" in takes:
        given["keep"] = out.with_suffix(".seeds")
    result = {"command": f"ega bench {name}{shown}", **known[name](**given)}
    drawn = drawing(result) if out is not None or plot is not None else None
    if plot is not None and drawn is None:
        raise ValueError(f"benchmark {name} has nothing to plot")
    for key, value in result.items():
        if key not in ("series", "axes", "command") and not isinstance(value, list | dict):
            print(f"{key:<40}{value:.4g}" if isinstance(value, float) else f"{key:<40}{value}")
    for key in ("table", "second_table", "third_table"):
        if key in result:
            print(("" if key == "table" else "\n") + markdown(result[key]))
    if out is not None:
        write_atomic(out, json.dumps(finite_only({"name": name, **result}), indent=1, allow_nan=False).encode())
    if drawn is not None:
        write_atomic(plot or out.with_suffix(".svg"), drawn.encode())
    return 0
