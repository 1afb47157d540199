"""The approved models: what enters the BentoML model store of a home, and what the service may load from it.

A model goes live only with a *gate record*: signed JSON that says which bundle passed which gates. The record is checked when
a bundle is approved and again whenever the service starts; so are the signature, size and sha256 of every file of the bundle.
Which model is live is a signed fact too, not a file date: approvals, activations and rollbacks are *decisions* under one rising
sequence number, and the newest one of a place counts. Places: `live` (every model arm without a model of its own), `arm:<name>`,
`shadow`. An approval is a decision for `live`: the service takes it at its next start, or at once by `ega models activate`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model.bundle import FILES, BundleError, canonical, sha256_of, sign_json, verify_bundle, verify_json, write_atomic

if TYPE_CHECKING:
    from bentoml._internal.models import ModelStore

    from serving.settings import ServingConfig

MODEL_NAME = "ega-v1"
GATE_RECORD, APPROVAL = "gate_record.json", "approval.json"
LIVE, SHADOW, ARM = "live", "shadow", "arm:"
NO_MODEL = ""
"""Tag of a decision that takes the model away from a place (`shadow` off, an arm back to `live`)."""
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
    """Order of its approval among the decisions of this home, from 1."""
    approved_at: str
    """UTC time of the approval, ISO 8601."""

    @property
    def price_mode(self) -> str:
        """Default price rule that the gates allow: 'learned', 'critical' or 'implicit'."""
        return str(self.gates.get("price_mode", "critical"))


def write_gate_record(path: Path, bundle: Path, gates: dict[str, dict[str, Any]], key: bytes, price_mode: str = "critical") -> dict[str, Any]:
    """Sign the verdict of the gates on one bundle; returns the record. Approved only if there are gates and each says so.

    Args: gates: for each gate a dict with at least `approved: bool` and `reason: str`, JSON-able and finite;
    price_mode: 'learned' if the payment network passed its own gate, else 'critical', or 'implicit' of EGA (V2), whose pages have no thresholds.
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
    if record.get("price_mode") not in ("critical", "learned", "implicit"):
        raise ApprovalError(f"refused: price_mode in {path} must be 'critical', 'learned' or 'implicit', got {record.get('price_mode')!r}: judge the model again")
    return record


def approve_bundle(bundle_dir: Path, gate_record_path: Path, home: Path, key: bytes) -> str:
    """Put a bundle that its signed gate record approves into the model store of `home`; returns its tag.

    The store is unchanged when anything is refused (ApprovalError). Approving the live bundle again returns its tag; approving an
    older one again makes it live: a new signed decision.
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
        newest = _last_sequence(home, key)
        if tag in entries and _live_tag(home, key, LIVE) == tag:
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


def live_model(home: Path, key: bytes, place: str = LIVE) -> Approved:
    """The entry that the newest decision puts in a place, verified anew; raises ApprovalError if there is none or it was altered."""
    found = find_live_model(home, key, place)
    if found is None:
        raise ApprovalError(f"no approved model in {home / 'bentoml'}; run the pipeline until its gates approve one")
    return found


def find_live_model(home: Path, key: bytes, place: str = LIVE) -> Approved | None:
    """`live_model`, or None while nothing was decided; what a killed approval left behind is no approval.

    An altered entry is an error, never a reason to fall back to an older one silently.
    """
    tag = _live_tag(home, key, place)
    return _check_entry(home, tag, key) if tag else None


@dataclass(frozen=True)
class Decision:
    """A signed fact about what a place serves."""

    sequence: int
    action: Literal["approve", "activate", "rollback"]
    place: str
    tag: str
    decided_at: str
    """UTC, ISO 8601."""


def decisions(home: Path, key: bytes) -> list[Decision]:
    """Every decision of a home, oldest first; raises ApprovalError where one was altered."""
    found = [Decision(entry["sequence"], "approve", LIVE, tag, str(entry["approved_at"])) for tag, entry in _approvals(home, key).items()]
    for path in sorted((home / "bentoml" / "decisions").glob("*.json")):
        try:
            record = verify_json(_read_json(path), key)
        except BundleError as error:
            raise ApprovalError(f"refused: decision {path}: {error}") from error
        if record.get("format") != _FORMAT or path.name != _decision_name(record.get("sequence")):
            raise ApprovalError(f"refused: {path} holds another decision than its name says")
        found.append(Decision(*(record[name] for name in ("sequence", "action", "place", "tag", "decided_at"))))
    return sorted(found, key=lambda decision: decision.sequence)


def previous_tag(home: Path, key: bytes, place: str = LIVE) -> str:
    """What a rollback of a place returns to: the model before the live one, rolled-back ones not counted. Raises ApprovalError."""
    history = _history(home, key, place)
    if len(history) < 2:
        raise ApprovalError(f"refused: no model was in place {place!r} before {history[-1] if history else 'now'}; there is nothing to roll back to")
    return history[-2]


def decide(home: Path, key: bytes, tag: str, place: str = LIVE, rollback: bool = False) -> Decision:
    """Sign that `tag` serves a place from now on, or with NO_MODEL that nothing of its own does; the entry is verified first.

    Raises ApprovalError, with nothing written; so it does when a rollback's target is no longer `previous_tag` (another operator was faster).
    """
    if place not in (LIVE, SHADOW) and not place.startswith(ARM):
        raise ApprovalError(f"refused: no place {place!r}; places are {LIVE!r}, {SHADOW!r} and {ARM + 'NAME'!r}")
    with _locked(home):
        if tag != NO_MODEL:
            _check_entry(home, tag, key)
        elif place == LIVE:
            raise ApprovalError("refused: the place 'live' needs a model")
        if rollback and tag != previous_tag(home, key, place):
            raise ApprovalError(f"refused: another decision about {place!r} came first; look at `ega models list` and try again")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        made = Decision(_last_sequence(home, key) + 1, "rollback" if rollback else "activate", place, tag, now)
        path = home / "bentoml" / "decisions" / _decision_name(made.sequence)
        write_atomic(path, canonical(sign_json({"format": _FORMAT, **asdict(made)}, key)))
    return made


def _decision_name(sequence: object) -> str:
    return f"{sequence:08d}.json" if isinstance(sequence, int) else ""


def _last_sequence(home: Path, key: bytes) -> int:
    return max((decision.sequence for decision in decisions(home, key)), default=0)


def _history(home: Path, key: bytes, place: str) -> list[str]:
    """Tags of a place as a stack: a rollback takes the top away."""
    stack: list[str] = []
    for decision in decisions(home, key):
        if decision.place != place:
            continue
        if decision.action == "rollback" and len(stack) > 1 and stack[-2] == decision.tag:
            stack.pop()
        elif not stack or stack[-1] != decision.tag:
            stack.append(decision.tag)
    return stack


def _live_tag(home: Path, key: bytes, place: str) -> str:
    return next((decision.tag for decision in reversed(decisions(home, key)) if decision.place == place), NO_MODEL)


def places(config: ServingConfig) -> list[str]:
    """Places of a configuration."""
    return [LIVE, SHADOW, *(ARM + arm.name for arm in config.arms if arm.policy == "model")]


def placed(config: ServingConfig, key: bytes) -> dict[str, Approved]:
    """The verified entry of every place that has a model of its own. Raises ApprovalError where one is missing or altered.

    `live`: `model_tag` if the settings pin it, else the newest decision. `arm:NAME`: its newest decision, else the arm's `model`.
    """
    found: dict[str, Approved] = {}
    for arm in config.arms:
        if arm.policy == "model":
            own = find_live_model(config.home, key, ARM + arm.name) or (approved(config.home, arm.model, key) if arm.model else None)
            if own is not None:
                found[ARM + arm.name] = own
    if any(arm.policy == "model" and ARM + arm.name not in found for arm in config.arms):
        found[LIVE] = approved(config.home, config.model_tag, key) if config.model_tag else live_model(config.home, key)
    shadow = find_live_model(config.home, key, SHADOW)
    if shadow is not None and any(arm.policy == "model" for arm in config.arms):
        found[SHADOW] = shadow
    return found


def all_approved(home: Path, key: bytes) -> list[Approved | ApprovalError]:
    """Every approved entry, newest first, verified anew; in place of one that must not be served the reason."""
    entries = sorted(_approvals(home, key).items(), key=lambda entry: -entry[1]["sequence"])
    found: list[Approved | ApprovalError] = []
    for tag, _ in entries:
        try:
            found.append(_check_entry(home, tag, key))
        except ApprovalError as error:
            found.append(error)
    return found


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
    return Approved(tag=tag, version=version, folder=folder, gates=gates, sequence=int(approval["sequence"]), approved_at=str(approval["approved_at"]))


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
