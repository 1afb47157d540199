"""The monitoring pipeline through kfp.local, both ends: raw traffic to a report, and to the logs of a training where bids moved."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from marketplace import logs
from monitoring.facts import events_of
from monitoring.report import MonitorConfig
from monitoring.store import write_events
from pipelines.config import as_json

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))
import monitoring_traffic  # noqa: E402 - beside the unit tests


def _raw(folder: Path, tables: dict[str, pd.DataFrame]) -> Path:
    """Traffic as a platform collects it: outcomes as events, and a tenth of everything twice."""
    shown = tables["impressions"]
    rng = np.random.default_rng(0)
    bare = shown.assign(click=0, click_timestamp=pd.Series(pd.NaT, index=shown.index, dtype="datetime64[us, UTC]"), purchase=0, order_value=0.0)
    for name, frame in (("requests", tables["requests"]), ("impressions", bare)):
        twice = pd.concat([frame, frame.sample(frac=0.1, random_state=1)], ignore_index=True).sample(frac=1.0, random_state=2)
        for day, rows in twice.groupby(twice["event_timestamp"].dt.date):
            table = logs.table_of(name)
            whole = logs.with_defaults(rows, table)[table.names]
            logs.write_parquet(folder / name / f"day={day}" / "part-0.parquet", pa.Table.from_pandas(whole, schema=table.arrow, preserve_index=False))
    write_events(folder, events_of(shown).sample(frac=1.0, random_state=int(rng.integers(100))))
    for name in ("ads", "users"):
        logs.write_table(folder, name, tables[name])
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    monitoring_traffic.write(folder, monitoring_traffic.traffic(0, days=5, users=600))
    return folder


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("moved", [False, True])
def test_the_pipeline_ends_in_a_report_and_in_training_logs_where_bids_moved(reference, tmp_path, monkeypatch, moved):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    from kfp import local

    from pipelines.monitor_experiment import monitor_experiment

    tables = monitoring_traffic.traffic(1, days=1, users=600, first_day=5, arms={"control": 0.5, "ega": 0.5}, bid_factor=1.3 if moved else 1.0)
    traffic, out = _raw(tmp_path / "traffic", tables), tmp_path / "report"
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "pipeline"), raise_on_error=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = monitor_experiment(
            traffic=str(traffic), reference=str(reference), out=str(out), workspace="", window_hours=24.0, config=as_json(MonitorConfig()), title="test", code_version="0"
        )
    record = json.loads((out / "ab_result.json").read_text())
    assert (out / "report.html").is_file()
    assert record["counts"]["clicks"] == int(tables["impressions"]["click"].sum())
    assert record["counts"]["duplicate_requests"] > 0
    if not moved:
        assert task.output.startswith("keep: ok: "), task.output
        return
    assert "catalogue: bid" in task.output and task.output.startswith("retrain: ")
    folder = Path(task.output.split(": ")[1])
    assert len(logs.days_of(folder, "requests")) == 6
    assert logs.verify_manifest(folder)["files"]
    merged = logs.read_table(folder, "impressions")
    assert len(merged) == len(tables["impressions"]) + len(logs.read_table(reference, "impressions"))
