"""The `ega` command. Sub-commands import what they need when they run, so that `ega --help` is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from pipelines.environment import ENVIRONMENT

for _name, _value in ENVIRONMENT:
    os.environ.setdefault(_name, _value)

app = typer.Typer(
    name="ega", add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="End-to-end generative advertising: from a city's ad corpus to a priced page of ads.",
)  # fmt: skip

Config = Annotated[Path, typer.Argument(help="YAML of a named run, e.g. config/quickstart.yaml.", show_default=False)]
Data = Annotated[Optional[Path], typer.Option(help="Check-ins folder (checkins.parquet, pois.parquet) for a world of kind checkins; `ega run` also takes it from $EGA_DATA.")]  # noqa: UP045
Runs = Annotated[Path, typer.Option(help="Folder that holds runs.")]
Seed = Annotated[Optional[int], typer.Option(help="Seed instead of the configuration's.")]  # noqa: UP045


@app.command()
def run(
    config: Annotated[Optional[Path], typer.Argument(help="YAML of a named run; not needed with --resume.", show_default=False)] = None,  # noqa: UP045
    data: Data = None,
    logs: Annotated[Optional[Path], typer.Option(help="Your own folder of logs (docs/data.md); no simulator is used.")] = None,  # noqa: UP045
    resume: Annotated[Optional[str], typer.Option(help="Run id (or folder) to go on with after it was stopped or killed.")] = None,  # noqa: UP045
    run_id: Annotated[Optional[str], typer.Option(help="Name of the run; default: configuration and time.")] = None,  # noqa: UP045
    runs: Runs = Path("runs"),
    seed: Seed = None,
    no_experiment: Annotated[bool, typer.Option("--no-experiment", help="Stop after the verdict: no service, no A/B test.")] = False,
) -> None:
    """Logs to a gated model, a served price and an experiment report.

    Exit code 0: approved; 3: rejected by a gate; 4: the data was refused; 2: wrong call; 1: anything else.
    """
    from cli.run import run_command

    raise typer.Exit(run_command(config, data, logs, resume, run_id, runs, seed, no_experiment))


@app.command()
def simulate(config: Config, out: Annotated[Path, typer.Option(help="Folder to write logs/ and world/ into; must be new.")], data: Data = None, seed: Seed = None) -> None:
    """Write the logs of a configuration's world, and its hidden truth, into a folder."""
    from cli.simulate import simulate as command

    raise typer.Exit(_guarded(lambda: command(str(config), out, data, seed)))


@app.command("convert-checkins")
def convert_checkins(
    text: Annotated[Path, typer.Argument(help="TSMC2014 check-ins: user, venue, category id and name, latitude, longitude, offset, UTC time; tab-separated.")],
    out: Annotated[Path, typer.Argument(help="Check-ins folder to write.")],
    min_poi_checkins: Annotated[int, typer.Option(min=1, help="Leave out places with fewer check-ins.")] = 1,
    min_user_checkins: Annotated[int, typer.Option(min=1, help="Leave out users with fewer check-ins.")] = 1,
) -> None:
    """Turn the published TSMC2014 text into a check-ins folder."""
    from cli.convert import convert

    raise typer.Exit(_guarded(lambda: convert(text, out, min_poi_checkins, min_user_checkins)))


@app.command()
def compile(out: Annotated[Optional[Path], typer.Option(help="Folder for the IR YAML; default: pipelines/.")] = None) -> None:  # noqa: UP045
    """Compile the Kubeflow pipelines to IR YAML."""
    from pipelines.compile import FOLDER, compile_all

    for path in compile_all(out or FOLDER):
        typer.echo(path)


@app.command()
def submit(
    host: Annotated[str, typer.Option(help="Kubeflow Pipelines endpoint, e.g. http://localhost:8080.")],
    config: Config,
    logs: Annotated[str, typer.Option(help="Folder of logs as the cluster's volume sees it, under /ega.")],
    run_id: Annotated[Optional[str], typer.Option(help="Name of the run.")] = None,  # noqa: UP045
) -> None:
    """Submit the training pipeline to a Kubeflow Pipelines backend."""
    from cli.submit import submit as command

    raise typer.Exit(_guarded(lambda: command(host, config, logs, run_id)))


@app.command()
def serve(
    config: Config,
    host: Annotated[str, typer.Option(help="Address to bind; put a proxy in front before opening it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 3000,
    admin_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of `ega models` on 127.0.0.1; 0: any free port.")] = 3001,
    settings: Annotated[Optional[Path], typer.Option(help="JSON file with settings of the service (budgets, quality_floor, price_mode, ...; docs/serving.md).")] = None,  # noqa: UP045
) -> None:
    """Serve the newest approved model of a configuration over HTTP."""
    from cli.run import serve_command

    raise typer.Exit(_guarded(lambda: serve_command(config, host, port, settings, admin_port)))


models = typer.Typer(no_args_is_help=True, help="Which model serves: list, approve, activate, roll back.")
app.add_typer(models, name="models")
PlaceOption = Annotated[str, typer.Option(help="live: every model arm without a model of its own; arm:NAME; shadow: ranks along without being shown.")]


@models.command("list")
def models_list(config: Config, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Every approved model of a configuration, verified anew, and where it serves."""
    from cli.models import list_models

    raise typer.Exit(_guarded(lambda: list_models(config, as_json)))


@models.command("approve")
def models_approve(config: Config, run: Annotated[Path, typer.Argument(help="Folder of a finished run: its bundle/ and gate.json.", show_default=False)]) -> None:
    """Put the model of a run into the store if its signed gate record approves it; the next service start takes it. Exit code 3: refused."""
    from cli.models import approve

    raise typer.Exit(_guarded(lambda: approve(config, run)))


@models.command("activate")
def models_activate(
    config: Config,
    tag: Annotated[str, typer.Argument(help="Exact tag from `ega models list`; 'none' takes away the model of an arm or the shadow.", show_default=False)],
    place: PlaceOption = "live",
) -> None:
    """Make an approved model live, in the running service without a pause, or else at the next start. Exit code 3: refused, nothing changed."""
    from cli.models import activate

    raise typer.Exit(_guarded(lambda: activate(config, tag, place)))


@models.command("rollback")
def models_rollback(config: Config, place: PlaceOption = "live") -> None:
    """Back to the model that was live before, by a new signed decision. Exit code 3: refused, nothing changed."""
    from cli.models import rollback

    raise typer.Exit(_guarded(lambda: rollback(config, place)))


@app.command()
def ab(
    config: Config,
    run: Annotated[Optional[str], typer.Option(help="Run whose world gives the users; default: the newest of this configuration.")] = None,  # noqa: UP045
    runs: Runs = Path("runs"),
    url: Annotated[Optional[str], typer.Option(help="Service to drive; default: start one for the experiment.")] = None,  # noqa: UP045
    plan: Annotated[bool, typer.Option("--plan", help="Say how many users the experiment needs and what it can find; start nothing.")] = False,
    aa: Annotated[bool, typer.Option("--aa", help="A/A test: the control's policy in both arms; must show no difference.")] = False,
    shadow: Annotated[bool, typer.Option("--shadow", help="Users see the control only; the treatment answers the same requests unseen.")] = False,
) -> None:
    """Drive live services with simulated users in two or more arms, then report."""
    from cli.run import ab_command

    raise typer.Exit(_guarded(lambda: ab_command(config, run, runs, url, plan, aa, shadow)))


@app.command()
def monitor(
    traffic: Annotated[Optional[Path], typer.Argument(help="Folder of logs with the experiment's traffic, or a run folder.", show_default=False)] = None,  # noqa: UP045
    reference: Annotated[Optional[Path], typer.Option(help="Folder of logs to compare drift with.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Where the report goes; default: beside the traffic.")] = None,  # noqa: UP045
    config: Annotated[Optional[Path], typer.Option(help="Run configuration with the experiment's plan.")] = None,  # noqa: UP045
    retrain: Annotated[bool, typer.Option("--retrain", help="On a drift or calibration alarm train on reference and traffic; the gates judge the result.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder for the run that --retrain starts.")] = Path("runs"),
    workspace: Annotated[Optional[Path], typer.Option(help="Evidently workspace that keeps a snapshot of every report; --ui shows it.")] = None,  # noqa: UP045
    ui: Annotated[bool, typer.Option("--ui", help="Serve Evidently's dashboard on the workspace (default: workspace/) after the report, until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of --ui, on 127.0.0.1.")] = 8000,
) -> None:
    """Join events, compare arms, measure drift; writes one HTML page and JSON. Exit code 4: drift, 5: invalid or harmful."""
    from cli.run import monitor_command, monitor_ui_command

    if traffic is None and not ui:
        raise typer.BadParameter("give a folder of traffic, or --ui to look at the reports of a workspace", param_hint="TRAFFIC")
    store = workspace or (Path("workspace") if ui else None)
    code = 0 if traffic is None else _guarded(lambda: monitor_command(traffic, reference, out, config, store, runs if retrain else None))
    if ui and store is not None and code in (0, 4, 5):
        code = _guarded(lambda: monitor_ui_command(store, "127.0.0.1", port)) or code
    raise typer.Exit(code)


@app.command("replay-price")
def replay_price(
    receipt: Annotated[str, typer.Argument(help="File with receipts: one JSON object, a list, or one object a line; - reads standard input.")],
) -> None:
    """Recompute a charge from its price receipt alone. Exit code 1 if it differs."""
    from cli.receipts import replay_price as command

    raise typer.Exit(_guarded(lambda: command(receipt)))


@app.command("replay-day")
def replay_day(
    config: Config,
    day: Annotated[Optional[str], typer.Option(help="UTC day, e.g. 2026-03-31; default: every day.")] = None,  # noqa: UP045
) -> None:
    """Recompute every charge that the service of a configuration made, from the receipts. Exit code 1 if any differs."""
    from cli.receipts import replay_day as command

    raise typer.Exit(_guarded(lambda: command(config, day)))


@app.command()
def doctor() -> None:
    """Versions, stores and disk: what is wrong and how to mend it."""
    from cli.doctor import doctor as command

    raise typer.Exit(command())


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Speed and cost: latency, load, v2-decode, cluster-attention, auction, sampling, generator, oracle, flops. On a finished run: payments, bidders. Experiments: ab, alarms, events. The paper's tables: table1, table2, table3, table4, scaling, sensitivity, v2. Other people's data: sequential, next-poi, serp; peers: speed beside another library.")],
    out: Annotated[Optional[Path], typer.Option(help="Also write the figures to this JSON file, and a plot of what can be drawn beside it (.svg).")] = None,  # noqa: UP045
    run: Annotated[Optional[Path], typer.Option(help="Folder of a finished run, for payments, bidders and load.")] = None,  # noqa: UP045
    plot: Annotated[Optional[Path], typer.Option(help="Draw into this SVG file instead.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(min=1, help="Optimiser steps of every payment network in payments (default: the run's).")] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda, for latency (default: cpu).")] = None,  # noqa: UP045
    seconds: Annotated[Optional[float], typer.Option(min=1.0, help="Length of the overload in load (default: 60).")] = None,  # noqa: UP045
    config: Annotated[Optional[Path], typer.Option(help="Run configuration of a table's market and models (default: config/tables.yaml).")] = None,  # noqa: UP045
    data: Annotated[Optional[Path], typer.Option(help="Folder of data for sequential, next-poi, serp and peers, or its name under $EGA_DATA (default: games, nyc, serp, games there); check-ins of a table's market.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Seed of sequential, next-poi, serp and peers (default 0); of table4 (default: the configuration's).")] = None,  # noqa: UP045
    seeds: Annotated[Optional[int], typer.Option(min=1, help="Markets of a table, each with a seed of its own (default: 5; 1 for scaling and sensitivity).")] = None,  # noqa: UP045
    peer_python: Annotated[Optional[Path], typer.Option(help="Python in which RecBole is installed, for peers (docs/measuring.md).")] = None,  # noqa: UP045
    quick: Annotated[Optional[bool], typer.Option("--quick", help="Tiny sizes: shows that everything works, not how well.")] = None,  # noqa: UP045
) -> None:
    """Measure speed (medians and ratios within one run), what pricing rules do to honesty and revenue, or the paper's tables."""
    from cli.bench import bench as command

    raise typer.Exit(_guarded(lambda: command(name, out, plot, run=run, steps=steps, seconds=seconds, device=device, config=config, data=data, seed=seed, seeds=seeds, peer_python=peer_python, quick=quick)))


@app.command()
def results(
    folder: Annotated[Path, typer.Argument(help="Folder with the JSON files of `ega bench NAME --out`.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/results.md"),
) -> None:
    """Write the page of all measured tables from their JSON files."""
    from benchmarks.results import write_results

    raise typer.Exit(_guarded(lambda: print(f"{write_results(folder, out)} tables in {out}")))  # type: ignore[func-returns-value]


def _guarded(command: object) -> int:
    """Run a command; expected errors become one line on stderr and exit code 1."""
    try:
        return int(command() or 0)  # type: ignore[operator]
    except (ValueError, FileNotFoundError, FileExistsError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def main() -> None:
    """Entry point of the `ega` script."""
    app()


if __name__ == "__main__":
    main()
