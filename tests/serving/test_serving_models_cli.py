"""`ega models`, without a service and through the admin port of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from serving_world import KEY, catalogue, tiny_bundle, vocabulary_of
from test_serving_live import Served, approve, ask
from typer.testing import CliRunner

from cli.main import app
from serving.admin import AdminServer, address_file
from serving.launch import free_port
from serving.store import live_model, write_gate_record

CI = str(Path(__file__).parents[2] / "config" / "ci.yaml")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two finished runs with approving gate records; EGA_HOME is ours."""
    monkeypatch.setenv("EGA_HOME", str(tmp_path / "ega"))
    monkeypatch.setenv("EGA_SIGNING_KEY", KEY.hex())
    folders = []
    for seed in range(2):
        run = tmp_path / "runs" / str(seed)
        tiny_bundle(run / "bundle", seed, vocabulary_of(catalogue()))
        write_gate_record(run / "gate.json", run / "bundle", {"ic": {"approved": True, "reason": "test"}}, KEY)
        folders.append(run)
    return folders


def ega(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["models", *words])
    return found.exit_code, found.output


def test_without_a_service_the_next_start_is_decided(runs: list[Path], tmp_path: Path) -> None:
    home = tmp_path / "ega" / "ci"
    assert "no approved model" in ega("list", CI)[1]
    for run in runs:
        code, said = ega("approve", CI, str(run))
        assert code == 0 and "is approved" in said
    listed = json.loads(ega("list", CI, "--json")[1])
    newer, older = (row["tag"] for row in listed)
    assert [row["places"] for row in listed] == [["live"], []] and live_model(home, KEY).tag == newer
    assert ega("rollback", CI)[0] == 0 and live_model(home, KEY).tag == older
    code, said = ega("rollback", CI)
    assert code == 3 and "nothing to roll back to" in said
    code, said = ega("activate", CI, newer)
    assert code == 0 and "from the next start on" in said and live_model(home, KEY).tag == newer
    assert ega("activate", CI, newer, "--place", "nowhere")[0] == 3
    assert ega("activate", CI, "ega-v1:000000000000")[0] == 3 and live_model(home, KEY).tag == newer
    assert f"{newer}  approved" in ega("list", CI)[1]


def test_a_rejected_run_is_not_approved(runs: list[Path]) -> None:
    write_gate_record(runs[0] / "gate.json", runs[0] / "bundle", {"ic": {"approved": False, "reason": "psi 0.2"}}, KEY)
    code, said = ega("approve", CI, str(runs[0]))
    assert code == 3 and "psi 0.2" in said


def test_through_a_running_service(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "ega" / "ci"
    for run in runs:
        (run / "bundle.json").write_bytes((run / "gate.json").read_bytes())
    old = approve(home, runs[0] / "bundle")
    served = Served(home)
    monkeypatch.setenv("EGA_ADMIN_TOKEN", "secret")
    admin = AdminServer(replace(served.config, admin_port=free_port()), served.models)
    admin.start()
    try:
        new = approve(home, runs[1] / "bundle")
        code, said = ega("activate", CI, new)
        assert code == 0 and f"{new} is live after" in said and served.ranking.rank(ask())["model_version"] == new[7:]
        assert [(row["tag"], row["places"]) for row in json.loads(ega("list", CI, "--json")[1])] == [(new, ["live"]), (old, [])]
        assert ega("rollback", CI)[0] == 0 and served.ranking.rank(ask())["model_version"] == old[7:]
        code, said = ega("activate", CI, new, "--place", "arm:control")
        assert code == 3 and "no place" in said
        monkeypatch.setenv("EGA_ADMIN_TOKEN", "wrong")
        code, said = ega("rollback", CI)
        assert code == 3 and "Bearer" in said
    finally:
        left_behind = address_file(home).read_bytes()
        admin.stop()
        served.close()
    address_file(home).write_bytes(left_behind)  # as a killed service leaves it
    monkeypatch.setenv("EGA_ADMIN_TOKEN", "secret")
    assert "from the next start on" in ega("activate", CI, new)[1]
