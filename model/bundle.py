"""Model bundles and signed records: what may go live, and the proof that it is what passed the gates.

A bundle is a folder with `model.safetensors`, `config.json`, `vocab.json`, `gates.json` and `manifest.json`. The manifest
lists size and sha256 of every file and is signed with HMAC-SHA256 over its canonical JSON. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import shutil
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from model.ega_v1.network import NetworkConfig, RankingModel, VocabularySizes
from model.kinds import STAGES, create

FILES = ("model.safetensors", "config.json", "vocab.json", "gates.json")
MAX_FILE_BYTES = 8 << 30


class BundleError(ValueError):
    """A bundle or signed record that must not be used; the message says why."""


def canonical(payload: Any) -> bytes:
    """JSON with sorted keys and no spaces: the bytes that are signed. NaN and infinity are refused."""
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def signing_key(ega_home: Path, create: bool = False) -> bytes:
    """The HMAC key: environment variable EGA_SIGNING_KEY (hex), else `<ega_home>/signing.key`."""
    if value := os.environ.get("EGA_SIGNING_KEY"):
        return _key_of(value, "EGA_SIGNING_KEY")
    path = Path(ega_home) / "signing.key"
    if not path.exists():
        if not create:
            raise BundleError(f"no signing key: set EGA_SIGNING_KEY or run a pipeline with this EGA_HOME first ({path} is missing)")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"signing.key.{os.getpid()}")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # the first of two processes wins; both then read the same key
        except FileExistsError:
            pass
        finally:
            part.unlink()
    return _key_of(path.read_text(), str(path))


def _key_of(text: str, where: str) -> bytes:
    """A key of at least 16 bytes from hex; an empty or damaged one would sign for everybody."""
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) < 16:
        raise BundleError(f"signing key in {where} must be at least 32 hex digits; restore it, or remove it and approve models anew")
    return key


def sign_json(payload: dict[str, Any], key: bytes) -> dict[str, Any]:
    """`payload` with a `signature` over the rest."""
    body = {name: value for name, value in payload.items() if name != "signature"}
    return {**body, "signature": hmac.new(key, canonical(body), hashlib.sha256).hexdigest()}


def verify_json(record: dict[str, Any], key: bytes) -> dict[str, Any]:
    """The payload of a signed record; raises BundleError when the signature is missing or wrong."""
    signature = record.get("signature") if isinstance(record, dict) else None
    if not isinstance(signature, str):
        raise BundleError("record is not signed")
    body = {name: value for name, value in record.items() if name != "signature"}
    try:
        expected = hmac.new(key, canonical(body), hashlib.sha256).hexdigest()
    except ValueError as error:  # NaN or infinity, which nobody here signs
        raise BundleError(f"record cannot have been signed: {error}") from error
    if not hmac.compare_digest(signature.encode("utf-8", "replace"), expected.encode()):
        raise BundleError("signature does not match: the record was altered after it was signed, or signed with another key")
    return body


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, sync, rename: a reader sees the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.errno is not None:  # of the system: a full disk names no file, the others the part
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@plain_dataclass(frozen=True)
class Bundle:
    """A verified model: `version` is the first 12 hex digits of the weights' sha256."""

    version: str
    network: RankingModel
    vocabulary: dict[str, list[int]]
    config: dict[str, Any]
    gates: dict[str, Any]
    manifest: dict[str, Any]


def state_bytes(network: torch.nn.Module) -> bytes:
    """The weights as safetensors bytes, in a fixed order: equal weights give equal bytes."""
    state = network.state_dict()
    return save_tensors({name: state[name].detach().cpu().contiguous() for name in sorted(state)})


def write_bundle(
    folder: Path, network: RankingModel, vocabulary: dict[str, list[int]], gates: dict[str, Any], provenance: dict[str, Any], key: bytes
) -> str:
    """Write and sign a bundle; returns its version. The folder appears whole or not at all; an existing one is replaced."""
    folder = Path(folder)
    weights = state_bytes(network)
    digest = hashlib.sha256(weights).hexdigest()
    config = {"kind": network.config.kind, "network": TypeAdapter(NetworkConfig).dump_python(network.config, mode="json"), "sizes": asdict(network.sizes)}
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    contents = {"model.safetensors": weights, "config.json": canonical(config), "vocab.json": canonical(vocabulary), "gates.json": canonical(gates)}
    for name, data in contents.items():
        write_atomic(part / name, data)
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    manifest = {"format": 1, "kind": network.config.kind, "version": digest[:12], "files": files, "provenance": provenance}
    write_atomic(part / "manifest.json", canonical(sign_json(manifest, key)))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(part, folder)
    return digest[:12]


def _check_names(folder: Path) -> None:
    """Every file of a bundle is there and plain. Others (the model store adds its own) are never opened."""
    for name in (*FILES, "manifest.json"):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"bundle {folder}: {name} is missing or not a plain file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BundleError(f"bundle {folder}: {name} is larger than {MAX_FILE_BYTES} bytes")


def verify_bundle(folder: Path, key: bytes) -> dict[str, Any]:
    """Check names, links, sizes, hashes and signature; returns the manifest or raises BundleError."""
    folder = Path(folder)
    _check_names(folder)
    try:
        manifest = verify_json(json.loads((folder / "manifest.json").read_bytes()), key)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"bundle {folder}: manifest.json cannot be read ({error.__class__.__name__})") from error
    if manifest.get("format") != 1 or manifest.get("kind") not in STAGES:
        raise BundleError(f"bundle {folder}: unknown format {manifest.get('format')!r} or kind {manifest.get('kind')!r}")
    if sorted(manifest["files"]) != sorted(FILES):
        raise BundleError(f"bundle {folder}: manifest lists {sorted(manifest['files'])}, expected {sorted(FILES)}")
    for name, expected in manifest["files"].items():
        path = folder / name
        if path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
            raise BundleError(f"bundle {folder}: {name} is not the file that was signed (size or sha256 differs)")
    if manifest["version"] != manifest["files"]["model.safetensors"]["sha256"][:12]:
        raise BundleError(f"bundle {folder}: version {manifest['version']} does not belong to its weights")
    return manifest


def load_bundle(folder: Path, key: bytes) -> Bundle:
    """A verified bundle with its network in evaluation mode; every weight finite and of the expected shape."""
    folder = Path(folder)
    manifest = verify_bundle(folder, key)
    contents = {name: (folder / name).read_bytes() for name in FILES}
    for name, data in contents.items():  # what is parsed is what was hashed, even if the file changes meanwhile
        if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
            raise BundleError(f"bundle {folder}: {name} changed while it was read")
    try:
        config, vocabulary, gates = (json.loads(contents[name]) for name in ("config.json", "vocab.json", "gates.json"))
        network = create(TypeAdapter(NetworkConfig).validate_python(config["network"]), VocabularySizes(**config["sizes"]))
        state = load_tensors(contents["model.safetensors"])
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:  # signed, yet not what this version writes
        raise BundleError(f"bundle {folder}: cannot be read ({error.__class__.__name__}: {str(error).splitlines()[0]})") from error
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        raise BundleError(f"bundle {folder}: weights are not finite: {', '.join(bad[:3])}")
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise BundleError(f"bundle {folder}: weights do not fit config.json: {str(error).splitlines()[-1].strip()}") from error
    network.eval()
    return Bundle(manifest["version"], network, vocabulary, config, gates, manifest)
