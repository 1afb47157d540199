"""`model.kind: ega_v2` from logs to an A/B test, at the smallest size: figures mean nothing, every step is the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]

SHORT = {"steps": 4, "batch": 16, "validate_every": 2, "validation_requests": 32}
CHANGES: dict[str, dict[str, Any]] = {
    "world": {"creatives": {"per_ad": 3, "width": 6}, "organic": {"items": 2}},
    "model": {
        "kind": "ega_v2",
        "ega_v2": {
            "behaviours": 16, "encoder_blocks": 1, "decoder_blocks": 1, "poi_codes": 32, "creative_codes": 32, "creative_width": 6, "organic_items": 2, "most_collisions": 0.6, "search": {"beams": 4},
        },
    },
    "training": {
        "ega_v2": {
            "pretrain": SHORT, "reward": SHORT, "evaluation": {**SHORT, "seed": 2}, "rlaf": {**SHORT, "batch": 4, "validation_requests": 4, "requests": 16, "beams": 4},
            "payment": {**SHORT, "batch": 4, "validation_requests": 4, "requests": 8, "misreports": [0.5, 1.0, 1.5]},
        },
    },
    "evaluation": {"requests": 40, "audited_requests": 3, "audited_losers": 1},
    "gates": {"psi_limit": 10.0, "psi_limit_independent": 10.0, "psi_loser_limit": 10.0, "minimum_lift": -1.0, "dev_limit": 10.0},
}  # fmt: skip


def test_ega_v2_is_trained_judged_served_and_compared(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "config" / "ci.yaml").read_text())
    for section, change in CHANGES.items():
        config[section] = {**config[section], **change}
    config |= {"name": "ci_v2"}
    config["experiment"]["driver"]["most_requests"] = 60
    (tmp_path / "ci_v2.yaml").write_text(yaml.safe_dump(config))
    environment = {**os.environ, "EGA_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def ega(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", "cli.main", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    said = ega("run", str(tmp_path / "ci_v2.yaml"), "--runs", str(tmp_path / "runs"), "--run-id", "first")
    run = tmp_path / "runs" / "first"
    assert "verdict   approved: ega-v1:" in said and (run / "report.html").is_file() and (run / "experiment" / "report.html").is_file()
    record = json.loads((run / "gate.json").read_text())
    assert record["price_mode"] in ("implicit", "learned") and set(record["gates"]) == {"incentive_compatibility", "revenue", "calibration"}
    psi = json.loads((run / "metrics.json").read_text())["psi"]
    assert set(psi) == {"learned", "implicit", "gsp", "first_price"} and psi["implicit"]["psi_exact_model"] < psi["gsp"]["psi_exact_model"]
    assert "0 failed" in said and "0 differ" in ega("replay-day", str(tmp_path / "ci_v2.yaml"))
    logs = run / "experiment" / "logs"
    assert {"organic", "creatives"} <= {path.stem for path in logs.iterdir()}  # live traffic trains this kind again
    # The next model is judged against this one, at the prices that this one charges.
    assert "of incumbent" in ega("run", str(tmp_path / "ci_v2.yaml"), "--runs", str(tmp_path / "runs"), "--run-id", "second", "--seed", "8", "--no-experiment")
