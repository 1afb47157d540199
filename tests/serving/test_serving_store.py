"""Only what passed its gates goes live: at approval and again when the service starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving_world import KEY, tiny_bundle

from model.bundle import canonical, load_bundle, sign_json
from serving.launch import resolve, running_service
from serving.settings import ServingConfig
from serving.store import ApprovalError, approve_bundle, approved, check_gate_record, live_model, write_gate_record

GOOD = {"ic": {"approved": True, "reason": "psi_exact=0.01"}, "revenue": {"approved": True, "reason": "lift 3 % [1, 5]"}}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for seed in (0, 1):
        tiny_bundle(folder / str(seed), seed)
        write_gate_record(folder / f"{seed}.json", folder / str(seed), GOOD, KEY)
    return [folder / "0", folder / "1"]


def record_of(bundle: Path) -> Path:
    return bundle.with_suffix(".json")


def files_of(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_an_approved_bundle_goes_live_under_its_exact_tag(bundles: list[Path], tmp_path: Path) -> None:
    tag = approve_bundle(bundles[0], record_of(bundles[0]), tmp_path, KEY)
    entry = live_model(tmp_path, KEY)
    assert entry == approved(tmp_path, tag, KEY) and entry.tag == tag == f"ega-v1:{entry.version}"
    assert load_bundle(entry.folder, KEY).version == entry.version and entry.price_mode == "critical"
    assert approve_bundle(bundles[0], record_of(bundles[0]), tmp_path, KEY) == tag and entry.sequence == 1


def test_the_newest_decision_is_live_not_the_newest_file(bundles: list[Path], tmp_path: Path) -> None:
    first, second, again = (approve_bundle(bundle, record_of(bundle), tmp_path, KEY) for bundle in (bundles[0], bundles[1], bundles[0]))
    entry = live_model(tmp_path, KEY)
    assert first == again == entry.tag != second and entry.sequence == 3


@pytest.mark.parametrize(
    "change",
    [
        {"approved": "x' or True or 'x"}, {"approved": 1}, {"approved": "true"}, {"approved": None}, {"approved": False}, {"gates": {}}, {"gates": None},
        {"gates": {"ic": {"approved": "True"}}}, {"gates": {"ic": {"approved": True}, "revenue": {"approved": False, "reason": "no lift"}}},
        {"gates": {"ic": True}}, {"gates": {"ic": {}}}, {"bundle_version": "0" * 12}, {"manifest_sha256": "0" * 64}, {"price_mode": "free"}, {"format": 2},
    ],
)  # fmt: skip
def test_signed_records_that_do_not_approve_this_bundle(bundles: list[Path], tmp_path: Path, change: dict) -> None:
    payload = json.loads(record_of(bundles[0]).read_text())
    record = tmp_path / "gate.json"
    record.write_bytes(canonical(sign_json({**payload, **change}, KEY)))
    home = tmp_path / "home"
    with pytest.raises(ApprovalError, match="re[fj]"):
        approve_bundle(bundles[0], record, home, KEY)
    assert not home.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"approved": NaN}', '{"approved": true}', '{"approved": true, "signature": "00"}'])
def test_unsigned_or_broken_records(bundles: list[Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "gate.json").write_text(text)
    with pytest.raises(ApprovalError, match="refused"):
        check_gate_record(tmp_path / "gate.json", bundles[0], KEY)


def test_a_missing_metric_never_approves(bundles: list[Path], tmp_path: Path) -> None:
    assert write_gate_record(tmp_path / "g.json", bundles[0], {}, KEY)["approved"] is False
    assert write_gate_record(tmp_path / "g.json", bundles[0], {"ic": {"approved": 1, "reason": ""}}, KEY)["approved"] is False


def test_a_tampered_record_is_refused_at_approval(bundles: list[Path], tmp_path: Path) -> None:
    write_gate_record(tmp_path / "gate.json", bundles[0], {"ic": {"approved": False, "reason": "psi 0.2"}}, KEY)
    edited = json.loads((tmp_path / "gate.json").read_text())
    edited["approved"] = edited["gates"]["ic"]["approved"] = True
    (tmp_path / "gate.json").write_text(json.dumps(edited))
    with pytest.raises(ApprovalError, match="signature"):
        approve_bundle(bundles[0], tmp_path / "gate.json", tmp_path / "home", KEY)


def test_the_record_of_another_bundle_or_key_is_refused(bundles: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ApprovalError, match="speaks about"):
        approve_bundle(bundles[1], record_of(bundles[0]), tmp_path, KEY)
    with pytest.raises(ApprovalError, match="signature"):
        approve_bundle(bundles[0], record_of(bundles[0]), tmp_path, b"other" * 8)


@pytest.mark.parametrize("name", ["gate_record.json", "approval.json", "model.safetensors", "config.json", "vocab.json", "gates.json", "manifest.json"])
def test_a_changed_file_is_refused_when_the_service_starts(bundles: list[Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGA_SIGNING_KEY", KEY.hex())
    approve_bundle(bundles[1], record_of(bundles[1]), tmp_path, KEY)
    approve_bundle(bundles[0], record_of(bundles[0]), tmp_path, KEY)
    file = live_model(tmp_path, KEY).folder / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ApprovalError, match="refused"), running_service(ServingConfig(home=tmp_path)):
        pass


def test_an_entry_that_was_never_approved_is_no_candidate(bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGA_SIGNING_KEY", KEY.hex())
    with pytest.raises(ApprovalError, match="no approved model"):
        resolve(ServingConfig(home=tmp_path))
    tag = approve_bundle(bundles[0], record_of(bundles[0]), tmp_path, KEY)
    (approved(tmp_path, tag, KEY).folder / "approval.json").unlink()  # what a killed approval may leave
    with pytest.raises(ApprovalError, match="no approved model"):
        live_model(tmp_path, KEY)
    assert approve_bundle(bundles[0], record_of(bundles[0]), tmp_path, KEY) == tag == live_model(tmp_path, KEY).tag


@pytest.mark.parametrize("tag", ["ega-v1", "ega-v1:latest", "ega-v1:", "other:0123456789ab", "ega-v1:../x", "ega-v1:0123"])
def test_only_exact_tags(tmp_path: Path, tag: str) -> None:
    with pytest.raises(ApprovalError, match="refused"):
        approved(tmp_path, tag, KEY)


def test_a_refusal_leaves_the_store_as_it_was(bundles: list[Path], tmp_path: Path) -> None:
    approve_bundle(bundles[0], record_of(bundles[0]), tmp_path, KEY)
    before = files_of(tmp_path)
    with pytest.raises(ApprovalError):
        approve_bundle(bundles[1], record_of(bundles[0]), tmp_path, KEY)
    assert files_of(tmp_path) == before


_APPROVE = "import sys; from pathlib import Path; from serving.store import approve_bundle; b = Path(sys.argv[1]); approve_bundle(b, b.with_suffix('.json'), Path(sys.argv[2]), b'k' * 32)"


def test_two_approvals_at_once_give_two_decisions(bundles: list[Path], tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    children = [subprocess.Popen([sys.executable, "-c", _APPROVE, str(bundle), str(tmp_path)], cwd=root) for bundle in bundles]
    assert [child.wait() for child in children] == [0, 0]
    sequences = sorted(approved(tmp_path, f"ega-v1:{json.loads(record_of(b).read_text())['bundle_version']}", KEY).sequence for b in bundles)
    assert sequences == [1, 2]
