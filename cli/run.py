"""`ega run`, `ega serve`, `ega ab` and `ega monitor` on named configurations: where things lie, and what is said at the end."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.config import RunConfig

APPROVED, FAILED, WRONG_CALL, REJECTED, REFUSED = 0, 1, 2, 3, 4


def ega_home() -> Path:
    """EGA_HOME, default .ega below the current folder."""
    return Path(os.environ.get("EGA_HOME", ".ega")).resolve()


def say(text: str = "") -> None:
    """A line for the person at the terminal, at once."""
    print(text, flush=True)


def _section(number: int, total: int, text: str) -> None:
    say(f"\n[{number}/{total}] {text}")


def run_command(
    config_path: Path | None, data: Path | None, logs: Path | None, resume: str | None, run_id: str | None, runs: Path, seed: int | None, no_experiment: bool
) -> int:
    """See `ega run --help`."""
    from pipelines.config import ConfigError

    try:
        config, run_dir, given = _prepare(config_path, data, logs, resume, run_id, runs, seed)
    except (ConfigError, FileNotFoundError, FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_CALL
    return _run(config, run_dir, Path(given["data"]) if given["data"] else None, Path(given["logs"]) if given["logs"] else None, no_experiment)


def _require_device(config: RunConfig) -> None:
    """Raises ValueError where the configuration's model cannot train on its device here: before the logs are made, not after."""
    if config.training.device != "cpu":
        from model.training.loop import Device

        Device(config.training.device).require(config.model.kind)


def _prepare(
    config_path: Path | None, data: Path | None, logs: Path | None, resume: str | None, run_id: str | None, runs: Path, seed: int | None
) -> tuple[RunConfig, Path, dict[str, str | None]]:
    """Resolve configuration and folders; a new run is written down so that it can be resumed."""
    from model.bundle import write_atomic
    from pipelines.config import as_yaml, load_run_config

    if resume is not None:
        run_dir = next((path.resolve() for path in (runs / resume, Path(resume)) if (path / "run.json").is_file()), None)
        if run_dir is None:
            known = ", ".join(sorted(path.parent.name for path in runs.glob("*/run.json"))) or "none"
            raise FileNotFoundError(f"no run {resume!r} to resume; runs in {runs}: {known}")
        config = load_run_config(run_dir / "config.yaml")
        _require_device(config)
        return config, run_dir, json.loads((run_dir / "run.json").read_text())
    if config_path is None:
        raise ValueError("give the YAML of a run, e.g. `ega run config/quickstart.yaml`, or --resume RUN")
    config = load_run_config(config_path, seed=seed)
    _require_device(config)
    if logs is not None and not logs.is_dir():
        raise FileNotFoundError(f"--logs {logs} is not a folder; docs/data.md describes what it must hold")
    if logs is None and config.world is None:
        raise ValueError(f"{config_path} names no world, so logs must be given: ega run {config_path} --logs DIR")
    checkins = logs is None and config.world is not None and config.world.kind == "checkins"
    if checkins and data is None and os.environ.get("EGA_DATA"):
        data = Path(os.environ["EGA_DATA"])
    if checkins and (data is None or not (data / "checkins.parquet").is_file()):
        raise FileNotFoundError(f"{config_path} needs a check-ins folder: --data DIR with checkins.parquet and pois.parquet (got {data})")
    run_dir = (runs / (run_id or f"{config.name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}")).resolve()
    if run_dir.exists() and any(run_dir.iterdir()):
        raise FileExistsError(f"{run_dir} exists already; take another --run-id, or go on with it: ega run --resume {run_dir.name}")
    run_dir.mkdir(parents=True, exist_ok=True)
    given = {"data": str(data.resolve()) if data else None, "logs": str(logs.resolve()) if logs else None}
    write_atomic(run_dir / "config.yaml", as_yaml(config).encode())
    write_atomic(run_dir / "run.json", json.dumps(given).encode())
    return config, run_dir, given


def _run(config: RunConfig, run_dir: Path, data: Path | None, logs: Path | None, no_experiment: bool) -> int:
    from model.bundle import BundleError, signing_key
    from pipelines.local import AlreadyRunning, PipelineFailed, home_lock, run_pipeline

    started = time.monotonic()
    home = ega_home() / config.name
    simulated = logs is None
    experiment = simulated and config.experiment.enabled and not no_experiment
    total = 2 + simulated + experiment
    say(f"run {run_dir.name}  (configuration {config.name}, seed {config.seed})")
    if not simulated and config.world is not None:
        say(f"note: state is kept per configuration name; {home} may hold a simulated market's store. Logs of another platform need a configuration with a name of its own.")
    try:
        with home_lock(home):
            signing_key(home.parent, create=True)
            step = 0
            if logs is None:
                step += 1
                _section(step, total, "logs of a simulated city" if data is None or config.world.kind == "synthetic" else f"logs on real check-ins of {data}")
                logs = _simulate(config, run_dir, data)
            step += 1
            _section(step, total, "pipeline train-and-approve: validate, features, samples, training stages, gates")
            verdict = run_pipeline(config, logs, run_dir, home, fresh=simulated)
            truth = _truth(run_dir) if simulated else None
            approved = not verdict.startswith("rejected")
            summary: dict[str, Any] = {"verdict": verdict, "approved": approved, "truth": truth}
            if experiment and approved:
                step += 1
                _section(step, total, "A/B test against the live service, two arms")
                summary["experiment"] = _experiment(config, run_dir, home)
            _section(total, total, "report")
            return _finish(config, run_dir, logs, data, summary, time.monotonic() - started, simulated)
    except PipelineFailed as error:
        return _explain_failure(run_dir, error)
    except AlreadyRunning as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: ega run --resume {run_dir.name}", file=sys.stderr)
        return 130
    except (BundleError, ValueError, FileNotFoundError, RuntimeError, OSError) as error:
        print(f"error: {error}\ngo on with: ega run --resume {run_dir.name}", file=sys.stderr)
    return FAILED


def _simulate(config: RunConfig, run_dir: Path, data: Path | None) -> Path:
    """World and logs of the run; found again when the run is resumed. The world's folder is written last and marks the end."""
    import shutil

    from marketplace.worlds import build_world

    logs, world_dir = run_dir / "logs", run_dir / "world"
    if world_dir.is_dir() and logs.is_dir():
        return logs
    shutil.rmtree(logs, ignore_errors=True)
    shutil.rmtree(world_dir, ignore_errors=True)
    world = build_world(config.world, config.seed, data)
    manifest = world.write_logs(logs, progress=True)
    part = run_dir / ".world.part"
    shutil.rmtree(part, ignore_errors=True)
    world.save(part)
    part.rename(world_dir)
    rows = manifest.get("rows", {})
    say("  " + (", ".join(f"{count:,} {table}" for table, count in rows.items()) if rows else f"written to {logs}"))
    return logs


def _truth(run_dir: Path) -> dict[str, Any]:
    """What the market's hidden truth says of the replayed pages, and the paired lifts that matter."""
    import pandas as pd

    from marketplace.oracle import exact, limits, shares
    from marketplace.truth import paired_lift, score_pages, summarise
    from marketplace.worlds import World
    from model.bundle import write_atomic
    from model.evaluation.replay import SEPARABLE

    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    pages = pd.read_parquet(run_dir / "evaluation" / "pages.parquet")
    world = World.load(run_dir / "world")
    scored = score_pages(world, pages)
    requests = scored["request_id"].unique()
    mode = metrics["price_mode"]
    mine, both = metrics["policy"], SEPARABLE + "/gsp" in metrics["policies"]
    pairs = [(f"{SEPARABLE}/{name}", f"{mine}/{name}", metric) for name in ("critical", "gsp") for metric in ("revenue", "clicks", "welfare") if both]
    pairs.append(("logged", f"{mine}/{mode}", "revenue"))
    result = {
        "policies": summarise(scored),
        "lifts": [{"control": a, "treatment": b, "metric": metric, **paired_lift(scored, a, b, metric)} for a, b, metric in pairs],
    }
    if exact(world):
        result["limits"] = shares(scored, requests, limits(world, requests), "logged")
    write_atomic(run_dir / "evaluation" / "truth.json", json.dumps(result, indent=1, default=float).encode())
    return result


def _experiment(config: RunConfig, run_dir: Path, home: Path) -> dict[str, Any]:
    from cli.ab import Experiment, execute
    from cli.monitor import describe
    from monitoring.report import MonitorResult

    summary, result = execute(Experiment(run_dir, home, config.experiment.monitor, config.experiment.driver, f"{run_dir.name}: experiment"))
    say(f"  {summary.answered:,} requests answered, {summary.errors} failed, {summary.clicks:,} clicks")
    if not isinstance(result, MonitorResult):
        say(result.text())
        return {"answered": summary.answered, "errors": summary.errors, "clicks": summary.clicks, "report": str(result.report), "exit_code": 0}
    say(describe(result))
    return {"answered": summary.answered, "errors": summary.errors, "clicks": summary.clicks, "report": str(result.report), "exit_code": result.exit_code}


def _finish(config: RunConfig, run_dir: Path, logs: Path, data: Path | None, summary: dict[str, Any], seconds: float, simulated: bool) -> int:
    from pipelines.report import result_lines, write_report

    report = write_report(run_dir, logs, summary)
    say("\n".join(result_lines(run_dir, summary)))
    approved = summary["approved"]
    say(f"\nverdict   {'approved: ' + summary['verdict'] if approved else summary['verdict']}")
    say(f"report    {report}")
    if "experiment" in summary:
        say(f"          {summary['experiment']['report']}")
    say(f"time      {seconds / 60:.1f} minutes; largest process {_largest_process() / 1e9:.1f} GB")
    source = run_dir / "config.yaml"
    say(f"next      {'ega serve ' + str(source) if approved else 'change gates or training in the configuration and run again'}")
    return APPROVED if approved else REJECTED


def _largest_process() -> int:
    """Largest resident set of this process or any of its steps so far, bytes."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _explain_failure(run_dir: Path, error: Exception) -> int:
    """Data that was refused has its own exit code and says why once more, without a traceback."""
    record = run_dir / "validation" / "validation.json"
    if record.is_file() and not json.loads(record.read_text())["passed"]:
        failures = [f for f in json.loads(record.read_text())["failures"] if f["severity"] == "critical"]
        print(f"\ndata refused: {len(failures)} critical rule(s) broken; nothing was trained", file=sys.stderr)
        for failure in failures:
            print(f"  {failure['message']}", file=sys.stderr)
        print(f"all checks: {run_dir / 'validation' / 'validation.html'}", file=sys.stderr)
        return REFUSED
    log = run_dir / "pipeline.log"
    tail = log.read_text(errors="replace").splitlines()[-30:] if log.is_file() else []
    print("\n".join(["", *tail, f"error: {error}", f"whole log: {log}", f"go on with: ega run --resume {run_dir.name}"]), file=sys.stderr)
    return FAILED


# ---------------------------------------------------------------------------------------------------------------------


def serve_command(config_path: Path, host: str, port: int, settings: Path | None = None, admin_port: int = 0) -> int:
    """Serve the live model of a configuration; `settings`: JSON with any fields of ServingConfig but `home`; its `admin_port` wins."""
    from dataclasses import replace

    from cli.serve import serve
    from pipelines.config import load_run_config
    from serving.launch import free_port
    from serving.settings import ServingConfig, load_settings

    home = ega_home() / load_run_config(config_path).name
    found = load_settings(settings, home) if settings else ServingConfig(home=home)
    return serve(found if found.admin_port else replace(found, admin_port=admin_port or free_port()), host, port)


def _newest_run(name: str, runs: Path) -> Path:
    import yaml

    candidates = []
    for path in runs.glob("*/run.json"):
        content = yaml.safe_load((path.parent / "config.yaml").read_text())
        if content.get("name") == name and (path.parent / "world").is_dir():
            candidates.append(path.parent)
    if not candidates:
        raise FileNotFoundError(f"no run of {name} with a world in {runs}; run `ega run` first")
    return max(candidates, key=lambda path: path.stat().st_mtime).resolve()


def ab_command(config_path: Path, run: str | None, runs: Path, url: str | None, plan_only: bool = False, aa: bool = False, shadow: bool = False) -> int:
    """Drive services with the users of a run's world; `plan_only`: say how long to run, and stop."""
    import dataclasses

    from cli.ab import Experiment, ab, plan_text
    from pipelines.config import load_run_config

    config = load_run_config(config_path)
    run_dir = _newest_run(config.name, runs) if run is None else next((p.resolve() for p in (runs / run, Path(run)) if p.is_dir()), runs / run)
    driver = config.experiment.driver
    if aa and shadow:
        raise ValueError("give either --aa or --shadow")
    if aa:
        driver = dataclasses.replace(driver, treatment_policy=driver.control_policy)
    if shadow:
        driver = dataclasses.replace(driver, shadow=True)
    experiment = Experiment(
        run_dir, ega_home() / config.name, config.experiment.monitor, driver, f"{run_dir.name}: experiment", url=url, token=os.environ.get("EGA_SERVING_TOKEN")
    )
    if plan_only:
        say(plan_text(experiment))
        return 0
    return ab(experiment)


def monitor_command(traffic: Path, reference: Path | None, out: Path | None, config_path: Path | None, workspace: Path | None = None, retrain_in: Path | None = None) -> int:
    """Report on a folder of traffic, or on a run's experiment; `retrain_in`: folder of runs, to train again where the alarms call for it."""
    from cli.monitor import monitor
    from pipelines.config import load_run_config

    of_run = (traffic / "experiment" / "logs").is_dir()
    retrain = retrain_in is not None
    if config_path is None and of_run and (traffic / "config.yaml").is_file():
        config_path = traffic / "config.yaml"  # the plan that the run was made with
    if retrain and config_path is None:
        raise ValueError("--retrain needs the configuration to train with: add --config CONFIG")
    if retrain and reference is None and not of_run:
        raise ValueError("--retrain needs the logs of the period before: add --reference DIR")
    settings = load_run_config(config_path).experiment.monitor if config_path else None

    def train(logs: Path) -> int:
        return run_command(config_path, None, logs, None, None, retrain_in or Path("runs"), None, True)

    start = train if retrain else None
    if of_run:
        return monitor(run=traffic, reference=reference, config=settings, out=out, workspace=workspace, train=start)
    return monitor(traffic=traffic, reference=reference, out=out, config=settings, workspace=workspace, train=start)


def monitor_ui_command(workspace: Path, host: str, port: int) -> int:
    """Evidently's own UI on a workspace."""
    if not workspace.is_dir():
        raise FileNotFoundError(f"{workspace} is no Evidently workspace yet; `ega monitor TRAFFIC --workspace {workspace}` makes one")
    from monitoring.evidently_report import serve

    serve(workspace, host, port)
    return 0
