"""`ega simulate`: write a folder of logs from a simulated market, without training anything."""

from __future__ import annotations

from pathlib import Path


def simulate(config: str, out: Path, data: Path | None = None, seed: int | None = None) -> None:
    """Write OUT/logs (the pipeline's input) and OUT/world (hidden truth, for scoring) from the world of a named config.

    Args: config, a path to a run config; out, a new folder; data, the check-ins folder of a world of kind `checkins`;
    seed, instead of the config's.
    """
    from marketplace.worlds import build_world
    from pipelines.config import load_run_config

    run = load_run_config(config)
    world = build_world(run.world, run.seed if seed is None else seed, data)
    summary = world.write_logs(out / "logs", progress=True)
    world.save(out / "world")
    print(f"{run.name}: {summary['requests']:,} requests, {summary['impressions']:,} impressions on {summary['days']} days, CTR {summary['ctr']:.2%}")
    print(f"logs: {out / 'logs'} (columns: docs/data.md)   hidden truth: {out / 'world'}")
