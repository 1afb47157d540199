"""The pipeline for real at tiny size: kfp.local, Feast, Great Expectations, training, gates, the BentoML store, the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(1500)  # whole runs; a slow machine is no failure


class Run(NamedTuple):
    """A finished `ega run`."""

    code: int
    out: str
    folder: Path
    home: Path


def ega(home: Path, *arguments: str) -> tuple[int, str]:
    """Run the command line as a user would; returns exit code and everything it printed."""
    environment = {**os.environ, "EGA_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("EGA_SIGNING_KEY", None)
    done = subprocess.run([sys.executable, "-m", "cli.main", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    return done.returncode, done.stdout + done.stderr


def store_entries(home: Path) -> list[str]:
    """Models in the store of configuration `ci`."""
    return sorted(path.name for path in (home / "ci" / "bentoml" / "models" / "ega-v1").glob("*") if path.is_dir())


@pytest.fixture(scope="module")
def approved(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """config/ci.yaml from simulated logs to an approved model; the A/B test has its own tests."""
    base = tmp_path_factory.mktemp("approved")
    code, out = ega(base / "home", "run", "config/ci.yaml", "--runs", str(base / "runs"), "--run-id", "first", "--no-experiment")
    return Run(code, out, base / "runs" / "first", base / "home")


def test_a_run_ends_with_a_verdict_a_report_and_an_approved_model(approved: Run) -> None:
    assert approved.code == 0, approved.out
    assert "verdict   approved: ega-v1:" in approved.out
    metrics = json.loads((approved.folder / "metrics.json").read_text())
    assert store_entries(approved.home) == [metrics["verdict"].split(":")[1]]
    assert {gate["name"] for gate in metrics["gates"]} == {"incentive_compatibility", "revenue", "calibration"}
    page = (approved.folder / "report.html").read_text()
    assert "What each stage moved" in page and "TRUE eRPM" in page and "http" not in page.split("<style>")[0].replace("<!doctype html>", "")
    assert {row["model"] for row in json.loads((approved.folder / "evaluation" / "baselines.json").read_text())} == {
        "popularity", "most_visited", "hour_weighted", "ega_v1",
    }  # fmt: skip


def test_every_step_left_its_artifacts(approved: Run) -> None:
    steps = {path.parent.name for path in (approved.folder / "pipeline").glob("*/*/*")}
    assert {"validate-logs", "build-features", "sample-requests", "train-stage", "train-stage-5", "evaluate-candidate", "approve-model", "publish-ad-embeddings"} <= steps
    curve = next((approved.folder / "pipeline").glob("*/train-stage/curve")).read_text()
    assert "<svg" in curve


def test_the_published_embeddings_are_the_models_city_states(approved: Run) -> None:
    import numpy as np
    import torch

    from features.store import load_ad_embeddings
    from model.bundle import load_bundle, signing_key
    from model.training.data import Samples

    ids, matrix, version = load_ad_embeddings(approved.home / "ci")
    bundle = load_bundle(approved.folder / "bundle", signing_key(approved.home))
    samples = Samples(approved.folder / "samples")
    rows = np.searchsorted(samples.ad_id, ids)
    with torch.inference_mode():
        states = bundle.network.city_states(torch.from_numpy(np.array(samples.ad_fields[rows])).long().unsqueeze(0), torch.ones(1, len(rows), dtype=torch.bool))
    assert version == bundle.version and np.array_equal(matrix, states[0].numpy())


def test_the_rules_of_pricing_are_compared_on_a_finished_run(approved: Run, tmp_path: Path) -> None:
    code, out = ega(approved.home, "bench", "payments", "--run", str(approved.folder), "--steps", "2", "--out", str(tmp_path / "payments.json"))
    assert code == 0, out
    rows = {row["rule"]: row for row in json.loads((tmp_path / "payments.json").read_text())["table"]}
    assert {"first price", "GSP", "VCG", "critical", "network literal, rate, lagrangian", "network aware, critical, log_budget"} <= rows.keys()
    assert rows["critical"]["revenue, % of critical"] == pytest.approx(100.0) and rows["first price"]["psi_exact %"] is None  # no utility to divide by
    assert 0.0 <= rows["critical"]["psi_exact %"] < rows["GSP"]["psi_exact %"] and rows["critical"]["psi_loser %"] == pytest.approx(0.0, abs=1e-6)
    code, out = ega(approved.home, "bench", "bidders", "--run", str(approved.folder), "--plot", str(tmp_path / "bidders.svg"))
    assert code == 0, out
    assert (tmp_path / "bidders.svg").read_text().startswith("<svg")


def test_gates_that_nothing_can_pass_reject_with_exit_code_3_and_leave_the_store_alone(approved: Run, tmp_path: Path) -> None:
    """On given logs, with a cascade for a candidate: the other branch of the stages too, in four of them instead of five."""
    config = yaml.safe_load((ROOT / "config" / "ci.yaml").read_text())
    config["gates"] = {"psi_limit": -1.0, "minimum_lift": 1e9}
    config["world"], config["model"]["kind"] = None, "mca"
    strict = tmp_path / "strict.yaml"
    strict.write_text(yaml.safe_dump(config))
    before = store_entries(approved.home)
    code, out = ega(approved.home, "run", str(strict), "--logs", str(approved.folder / "logs"), "--runs", str(tmp_path / "runs"), "--run-id", "strict")
    assert code == 3, out
    assert "verdict   rejected:" in out and "utility" in out
    assert store_entries(approved.home) == before
    metrics = json.loads((tmp_path / "runs" / "strict" / "metrics.json").read_text())
    assert metrics["policy"] == "mca" and metrics["incumbent"] == before[0]
    assert "Rejected" in (tmp_path / "runs" / "strict" / "report.html").read_text()


def test_poisoned_logs_are_refused_before_anything_is_trained(approved: Run, tmp_path: Path) -> None:
    import pandas as pd

    from marketplace.logs import days_of, read_table, write_table

    logs = tmp_path / "logs"
    shutil.copytree(approved.folder / "logs", logs)
    (logs / "manifest.json").unlink()
    day = days_of(logs, "impressions")[0]
    frame = read_table(logs, "impressions", days=[day])
    frame["payment"] = frame["bid"] * 2
    shutil.rmtree(logs / "impressions" / f"day={day}")
    write_table(logs, "impressions", pd.DataFrame(frame))
    code, out = ega(tmp_path / "home", "run", "config/ci.yaml", "--logs", str(logs), "--runs", str(tmp_path / "runs"), "--run-id", "bad")
    assert code == 4, out
    assert "payment-at-most-bid" in out and "data refused" in out
    assert not (tmp_path / "runs" / "bad" / "stages").exists() and not (tmp_path / "runs" / "bad" / "samples").exists()


def test_an_edited_gate_record_is_refused_whatever_the_control_flow_said(approved: Run, tmp_path: Path) -> None:
    from model.bundle import signing_key
    from serving.store import ApprovalError, approve_bundle

    record = json.loads((approved.folder / "gate.json").read_text())
    record["gates"]["revenue"]["value"] = 9.9
    edited = tmp_path / "gate.json"
    edited.write_text(json.dumps(record))
    with pytest.raises(ApprovalError, match="signature"):
        approve_bundle(approved.folder / "bundle", edited, tmp_path / "home" / "ci", signing_key(approved.home))
    assert store_entries(tmp_path / "home") == []
