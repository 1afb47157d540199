"""The approved models: what enters the BentoML model store of a home, and what the service may load from it.

A model goes live only with a *gate record*: signed JSON that says which bundle passed which gates. The record is checked when
a bundle is approved and again whenever the service starts; so are the signature, size and sha256 of every file of the bundle.
Each approval carries a rising sequence number under its own signature: the newest approval is a signed fact, not a file date.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.bundle import FILES, BundleError, canonical, sha256_of, sign_json, verify_bundle, verify_json, write_atomic

if TYPE_CHECKING:
    from bentoml._internal.models import ModelStore

MODEL_NAME = "ega-v1"
GATE_RECORD, APPROVAL = "gate_record.json", "approval.json"
_FORMAT = 1
_BUNDLE_FILES = (*FILES, "manifest.json")


class ApprovalError(ValueError):
    """A model that must not go live; the text says why."""


@dataclass(frozen=True)
class Approved:
    """A verified entry of the store."""

    tag: str
    """Exact BentoML tag, `ega-v1:<bundle version>`."""
    version: str
    """The bundle's version."""
    folder: Path
    """Where the bundle lies; pass it to model.bundle.load_bundle."""
    gates: dict[str, Any]
    """Payload of the gate record."""
    sequence: int
    """Order of approval in this home, from 1."""

    @property
    def price_mode(self) -> str:
        """Default price rule that the gates allow: 'learned' or 'critical'."""
        return str(self.gates.get("price_mode", "critical"))


def write_gate_record(path: Path, bundle: Path, gates: dict[str, dict[str, Any]], key: bytes, price_mode: str = "critical") -> dict[str, Any]:
    """Sign the verdict of the gates on one bundle; returns the record. Approved only if there are gates and each says so.

    Args: gates: for each gate a dict with at least `approved: bool` and `reason: str`, JSON-able and finite;
    price_mode: 'learned' if the payment network passed its own gate, else 'critical'.
    """
    manifest = verify_bundle(bundle, key)
    payload = {
        "format": _FORMAT,
        "approved": bool(gates) and all(gate.get("approved") is True for gate in gates.values()),
        "bundle_version": manifest["version"],
        "manifest_sha256": sha256_of(Path(bundle) / "manifest.json"),
        "gates": gates,
        "price_mode": price_mode,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    record = sign_json(payload, key)
    write_atomic(Path(path), canonical(record))
    return record


def check_gate_record(path: Path, bundle: Path, key: bytes) -> dict[str, Any]:
    """The payload of a gate record that approves exactly this bundle; raises ApprovalError otherwise.

    Every test is positive: a missing field, a string, a NaN or any value but true is a refusal.
    """
    try:
        manifest = verify_bundle(Path(bundle), key)
        record = verify_json(_read_json(Path(path)), key)
    except BundleError as error:
        raise ApprovalError(f"refused: {error}") from error
    gates = record.get("gates")
    if record.get("format") != _FORMAT or not isinstance(gates, dict) or not gates:
        raise ApprovalError(f"refused: {path} is not a gate record of format {_FORMAT} with at least one gate")
    failed = [name for name, gate in gates.items() if not (isinstance(gate, dict) and gate.get("approved") is True)]
    if failed:
        first = gates[failed[0]]
        reason = str(first.get("reason", "no reason given")) if isinstance(first, dict) else "malformed"
        raise ApprovalError(f"rejected: gate {failed[0]} did not approve: {reason}")
    if record.get("approved") is not True:
        raise ApprovalError(f"rejected: {path} does not say approved")
    if record.get("bundle_version") != manifest["version"] or record.get("manifest_sha256") != sha256_of(Path(bundle) / "manifest.json"):
        raise ApprovalError(f"refused: {path} speaks about bundle {record.get('bundle_version')}, not about {manifest['version']} as it lies here")
    if record.get("price_mode") not in ("critical", "learned"):
        raise ApprovalError(f"refused: price_mode in {path} must be 'critical' or 'learned', got {record.get('price_mode')!r}")
    return record


def approve_bundle(bundle_dir: Path, gate_record_path: Path, home: Path, key: bytes) -> str:
    """Put a bundle that its signed gate record approves into the model store of `home`; returns its tag.

    The store is unchanged when anything is refused (ApprovalError). Approving the newest approved bundle again returns its tag;
    approving an older one again makes it the newest: a new signed decision.
    """
    import bentoml
    from bentoml.models import ModelContext

    bundle_dir, gate_record_path = Path(bundle_dir), Path(gate_record_path)
    record = check_gate_record(gate_record_path, bundle_dir, key)
    version = record["bundle_version"]
    tag = f"{MODEL_NAME}:{version}"
    with _locked(home):
        store = _model_store(home)
        entries = _approvals(home, key)
        newest = max((entry["sequence"] for entry in entries.values()), default=0)
        if tag in entries and entries[tag]["sequence"] == newest:
            _check_entry(home, tag, key)
            return tag
        approval = sign_json(
            {
                "format": _FORMAT,
                "tag": tag,
                "sequence": newest + 1,
                "gate_record_sha256": sha256_of(gate_record_path),
                "approved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            key,
        )
        if (_folder(home, tag)).exists():  # an older approval, or what a killed approval left behind
            store.delete(tag)
        with bentoml.models.create(
            tag,
            labels={"stage": "approved"},
            metadata={"bundle_version": version, "sequence": newest + 1},
            context=ModelContext(framework_name="", framework_versions={}),
            _model_store=store,
        ) as entry:
            for name in _BUNDLE_FILES:
                shutil.copyfile(bundle_dir / name, entry.path_of(name), follow_symlinks=False)
            shutil.copyfile(gate_record_path, entry.path_of(GATE_RECORD), follow_symlinks=False)
            Path(entry.path_of(APPROVAL)).write_bytes(canonical(approval))
            check_gate_record(Path(entry.path_of(GATE_RECORD)), Path(entry.path), key)
        _check_entry(home, tag, key)
    return tag


def newest_approved(home: Path, key: bytes) -> Approved:
    """The entry approved last, verified anew; raises ApprovalError if there is none or it was altered."""
    found = find_newest_approved(home, key)
    if found is None:
        raise ApprovalError(f"no approved model in {home / 'bentoml'}; run the pipeline until its gates approve one")
    return found


def find_newest_approved(home: Path, key: bytes) -> Approved | None:
    """`newest_approved`, or None while nothing was approved; what a killed approval left behind is no approval.

    An altered newest entry is an error, never a reason to fall back to an older one silently.
    """
    entries = _approvals(home, key)
    return _check_entry(home, max(entries, key=lambda tag: entries[tag]["sequence"]), key) if entries else None


def approved(home: Path, tag: str, key: bytes) -> Approved:
    """The entry of an exact tag, verified anew; raises ApprovalError."""
    return _check_entry(home, tag, key)


def _check_entry(home: Path, tag: str, key: bytes) -> Approved:
    name, _, version = tag.partition(":")
    if name != MODEL_NAME or not version.isalnum() or version == "latest":
        raise ApprovalError(f"refused: {tag!r} is not an exact tag like {MODEL_NAME}:0123456789ab")
    folder = _folder(home, tag)
    if not folder.is_dir() or folder.is_symlink():
        raise ApprovalError(f"refused: there is no model {tag} in {home / 'bentoml'}")
    approval = _approval(folder, key)
    if approval is None:
        raise ApprovalError(f"refused: {tag} was never approved ({APPROVAL} is missing)")
    gates = check_gate_record(folder / GATE_RECORD, folder, key)
    if approval.get("gate_record_sha256") != sha256_of(folder / GATE_RECORD) or gates["bundle_version"] != version:
        raise ApprovalError(f"refused: the approval of {tag} belongs to another gate record or bundle")
    return Approved(tag=tag, version=version, folder=folder, gates=gates, sequence=int(approval["sequence"]))


def _approval(folder: Path, key: bytes) -> dict[str, Any] | None:
    """Payload of an entry's approval, None if it has none; raises ApprovalError if it was altered."""
    if not (folder / APPROVAL).exists():
        return None
    try:
        approval = verify_json(_read_json(folder / APPROVAL), key)
    except BundleError as error:
        raise ApprovalError(f"refused: the approval of {folder.parent.name}:{folder.name}: {error}") from error
    if approval.get("format") != _FORMAT or approval.get("tag") != f"{folder.parent.name}:{folder.name}" or not isinstance(approval.get("sequence"), int):
        raise ApprovalError(f"refused: the approval in {folder} belongs to {approval.get('tag')!r}")
    return approval


def _approvals(home: Path, key: bytes) -> dict[str, dict[str, Any]]:
    """Approval of every entry that has one, by tag."""
    shelf = home / "bentoml" / "models" / MODEL_NAME
    folders = sorted(folder for folder in shelf.iterdir() if folder.is_dir() and not folder.is_symlink()) if shelf.is_dir() else []
    found = {f"{MODEL_NAME}:{folder.name}": _approval(folder, key) for folder in folders}
    return {tag: approval for tag, approval in found.items() if approval is not None}


def _folder(home: Path, tag: str) -> Path:
    name, _, version = tag.partition(":")
    return home / "bentoml" / "models" / name / version


def _model_store(home: Path) -> ModelStore:
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    from bentoml._internal.models import ModelStore

    models = home / "bentoml" / "models"
    models.mkdir(parents=True, exist_ok=True)
    return ModelStore(models)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One approval at a time in a home, over processes."""
    folder = home / "bentoml"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".approve.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error.__class__.__name__})") from error
    if not isinstance(record, dict):
        raise BundleError(f"{path} must hold a JSON object")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
