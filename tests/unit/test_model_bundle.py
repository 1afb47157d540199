"""Bundles and signatures (RELIABILITY T4, T18): nothing altered, unsigned, replayed or malformed is ever used; nothing is executed."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_tiny import tiny_network
from safetensors.torch import save

from model.bundle import (
    FILES,
    Bundle,
    BundleError,
    canonical,
    load_bundle,
    sign_json,
    signing_key,
    state_bytes,
    verify_bundle,
    verify_json,
    write_atomic,
    write_bundle,
)

KEY, OTHER_KEY = b"k" * 32, b"q" * 32
VOCABULARY = {"version": 1, "tables": {"ad": [1, 2, 3]}}
GATES = {"price_mode": "critical"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(folder, tiny_network(), VOCABULARY, GATES, {"run": "test"}, KEY)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def sign_again(folder: Path, key: bytes = KEY, **change: Any) -> None:
    """The manifest that somebody with the key would write for the files as they lie there."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"] = {name: {"bytes": (folder / name).stat().st_size, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()} for name in FILES}
    manifest |= {"version": manifest["files"]["model.safetensors"]["sha256"][:12], **change}
    (folder / "manifest.json").write_bytes(canonical(sign_json(manifest, key)))


def refused(folder: Path, says: str = "", key: bytes = KEY) -> None:
    with pytest.raises(BundleError, match=says):
        load_bundle(folder, key)


def test_round_trip(original: Path, bundle: Path) -> None:
    loaded, network = load_bundle(bundle, KEY), tiny_network()
    assert isinstance(loaded, Bundle) and state_bytes(loaded.network) == state_bytes(network)
    assert loaded.version == hashlib.sha256(state_bytes(network)).hexdigest()[:12] == loaded.manifest["version"]
    assert loaded.network.config == network.config and loaded.network.sizes == network.sizes and not loaded.network.training
    assert loaded.vocabulary == VOCABULARY and loaded.gates == GATES and loaded.manifest["provenance"] == {"run": "test"}
    assert sorted(path.name for path in original.parent.iterdir()) == ["bundle"]  # nothing half-written stays


def test_equal_weights_give_equal_bytes_and_a_bundle_is_replaced_whole(bundle: Path) -> None:
    assert state_bytes(tiny_network()) == state_bytes(tiny_network())
    version = write_bundle(bundle, tiny_network(seed=3), VOCABULARY, GATES, {}, KEY)
    assert load_bundle(bundle, KEY).version == version and sorted(path.name for path in bundle.iterdir()) == sorted([*FILES, "manifest.json"])


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_flipped_bits_are_refused(bundle: Path, name: str) -> None:
    data, rng = (bundle / name).read_bytes(), np.random.default_rng(len(name))
    for offset in rng.integers(0, len(data), 40):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << int(rng.integers(8))
        (bundle / name).write_bytes(flipped)
        refused(bundle)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_truncated_and_longer_files_are_refused(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    for size in (0, 1, 8, len(data) // 2, len(data) - 1):
        (bundle / name).write_bytes(data[:size])
        refused(bundle)
    (bundle / name).write_bytes(data + b" " if name != "manifest.json" else data[:-1] + b',"more":1}')
    refused(bundle)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_missing_files_links_and_folders_are_refused(bundle: Path, name: str) -> None:
    kept = bundle.parent / "kept"
    (bundle / name).rename(kept)
    refused(bundle, "missing or not a plain file")
    (bundle / name).symlink_to(kept)
    refused(bundle, "not a plain file")
    (bundle / name).unlink()
    os.mkfifo(bundle / name)  # reading it would hang
    refused(bundle, "not a plain file")
    (bundle / name).unlink()
    (bundle / name).mkdir()
    refused(bundle, "not a plain file")


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "missing")


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("signed", [False, True])
def test_a_pickle_in_safetensors_clothing_is_never_run(bundle: Path, signed: bool) -> None:
    canary = bundle.parent / "executed"
    for content in (pickle.dumps(Canary(canary)), pickle.dumps({"a": Canary(canary)}, 0)):
        (bundle / "model.safetensors").write_bytes(content)
        if signed:
            sign_again(bundle)
        refused(bundle)
    torch.save({"a": torch.zeros(2)}, bundle / "model.safetensors")
    sign_again(bundle)
    refused(bundle, "cannot be read")
    (bundle / "extra.pkl").write_bytes(pickle.dumps(Canary(canary)))
    assert not canary.exists()


def test_files_beside_the_bundle_are_never_opened(bundle: Path) -> None:
    """The model store lays its own files there; what is not in the manifest is not read."""
    canary = bundle.parent / "executed"
    for name in ("extra.pkl", "pytorch_model.bin", "config.yaml"):
        (bundle / name).write_bytes(pickle.dumps(Canary(canary)))
        os.chmod(bundle / name, 0)
    assert load_bundle(bundle, KEY).vocabulary == VOCABULARY and not canary.exists()


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> bytes:
    state = {name: value.clone() for name, value in tiny_network().state_dict().items()}
    change(state)
    return save({name: value.contiguous() for name, value in state.items()})


BAD_WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "nan": (lambda state: state["click_head.item.weight"].view(-1)[7].fill_(float("nan")), "not finite: click_head.item.weight"),
    "infinite": (lambda state: state["payment.reduce.bias"].view(-1)[0].fill_(float("inf")), "not finite: payment.reduce.bias"),
    "shape": (lambda state: state.update({"generator.slot": torch.zeros(9, 16)}), "do not fit config.json.*generator.slot"),
    "missing": (lambda state: state.pop("generator.slot"), "do not fit config.json"),
    "unknown": (lambda state: state.update({"surplus": torch.zeros(1)}), "do not fit config.json"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_signed_but_wrong_weights_are_refused(bundle: Path, name: str) -> None:
    change, says = BAD_WEIGHTS[name]
    (bundle / "model.safetensors").write_bytes(weights(change))
    refused(bundle, "not the file that was signed")
    sign_again(bundle)
    refused(bundle, says)


@pytest.mark.parametrize("length", [0, 5, 2**62, 2**64 - 1])
def test_lying_headers_are_refused_even_when_signed(bundle: Path, length: int) -> None:
    data = (bundle / "model.safetensors").read_bytes()
    (bundle / "model.safetensors").write_bytes(length.to_bytes(8, "little") + data[8:])
    sign_again(bundle)
    refused(bundle, "cannot be read")


def test_lying_offsets_are_refused_even_when_signed(bundle: Path) -> None:
    data = (bundle / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["click_head.item.weight"]["data_offsets"][1] += 10**9
    text = json.dumps(header).encode()
    (bundle / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    sign_again(bundle)
    refused(bundle, "cannot be read")


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b'{"network":{"width":-1},"sizes":{}}', b"\xff\xfe", b"[" * 100_000])
def test_signed_but_malformed_config_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / "config.json").write_bytes(content)
    sign_again(bundle)
    refused(bundle, "cannot be read")


def test_config_of_another_network_is_refused(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_bytes())
    config["network"]["width"] = 32
    (bundle / "config.json").write_bytes(canonical(config))
    sign_again(bundle)
    refused(bundle, "do not fit config.json")


def test_manifest_must_be_signed_by_this_key_and_for_these_files(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    refused(bundle, "signed with another key", OTHER_KEY)
    sign_again(bundle, OTHER_KEY)
    refused(bundle, "signed with another key")
    path = bundle / "manifest.json"
    path.write_bytes(canonical({name: value for name, value in manifest.items() if name != "signature"}))
    refused(bundle, "not signed")
    for signature in (None, 7, "", "é" * 64, "\ud800", True, [manifest["signature"]]):
        path.write_text(json.dumps({**manifest, "signature": signature}))
        refused(bundle)
    for text in ("[]", "null", '"signature"', "7", '{"signature": "x", "value": NaN}', "[" * 100_000, ""):
        path.write_text(text)
        refused(bundle)
    other = tmp_path / "other"
    write_bundle(other, tiny_network(seed=8), VOCABULARY, GATES, {}, KEY)
    shutil.copy(other / "manifest.json", path)  # signed, but for other files
    refused(bundle, "not the file that was signed")


@pytest.mark.parametrize("change", [{"format": 2}, {"kind": "ega_v9"}, {"version": "0" * 12}, {"files": {}}, {"files": {"../model.safetensors": {"bytes": 1, "sha256": ""}}}])
def test_signed_manifests_of_another_kind_are_refused(bundle: Path, change: dict[str, Any]) -> None:
    sign_again(bundle, **change)
    refused(bundle)
    with pytest.raises(BundleError):
        verify_bundle(bundle, KEY)


# ---------------------------------------------------------------------------------------------------------------------
# Signatures and keys


def test_any_change_of_a_signed_record_is_noticed() -> None:
    record = sign_json({"approved": False, "psi": 0.2, "signature": "old"}, KEY)
    assert verify_json(record, KEY) == {"approved": False, "psi": 0.2}
    for change in ({"approved": True}, {"psi": 0.1}, {"more": None}):
        with pytest.raises(BundleError, match="altered"):
            verify_json({**record, **change}, KEY)
    with pytest.raises(BundleError, match="altered"):
        verify_json({name: value for name, value in record.items() if name != "psi"}, KEY)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), {"deep": [float("nan")]}])
def test_canonical_json_refuses_what_is_not_a_number(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"value": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        sign_json({"value": value}, KEY)


def test_canonical_json_does_not_depend_on_order_or_alphabet() -> None:
    assert canonical({"b": 1, "a": "é"}) == canonical({"a": "é", "b": 1}) == b'{"a":"\\u00e9","b":1}'


def test_signing_key_is_made_once_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EGA_SIGNING_KEY", raising=False)
    with pytest.raises(BundleError, match="no signing key"):
        signing_key(tmp_path / "home")
    key = signing_key(tmp_path / "home", create=True)
    assert len(key) == 32 and signing_key(tmp_path / "home", create=True) == key == signing_key(tmp_path / "home")
    assert (tmp_path / "home" / "signing.key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["signing.key"]
    monkeypatch.setenv("EGA_SIGNING_KEY", KEY.hex())
    assert signing_key(tmp_path / "elsewhere") == KEY


@pytest.mark.parametrize("text", ["", "\n", "00", "zz" * 32, "00" * 15])
def test_an_empty_short_or_damaged_key_signs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv("EGA_SIGNING_KEY", raising=False)
    (tmp_path / "signing.key").write_text(text)
    with pytest.raises(BundleError, match="at least 32 hex digits"):
        signing_key(tmp_path, create=True)
    if text.strip():
        monkeypatch.setenv("EGA_SIGNING_KEY", text)
        with pytest.raises(BundleError, match="EGA_SIGNING_KEY must be"):
            signing_key(tmp_path)


def race(home: Path, go: Any, found: Any) -> None:
    go.wait(30)
    found.put(signing_key(home, create=True).hex())


def test_processes_that_race_for_the_first_key_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EGA_SIGNING_KEY", raising=False)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["model.training.run"])
    for attempt in range(3):
        go, found = processes.Barrier(3), processes.Queue()
        racers = [processes.Process(target=race, args=(tmp_path / str(attempt), go, found)) for _ in range(3)]
        for racer in racers:
            racer.start()
        keys = {found.get(timeout=60) for _ in racers}
        for racer in racers:
            racer.join(30)
            assert racer.exitcode == 0
        assert len(keys) == 1
        assert [path.name for path in (tmp_path / str(attempt)).iterdir()] == ["signing.key"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_write_on_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*/record\.json'"):
        write_atomic(tmp_path / "record.json", b"new")
    assert not list(tmp_path.iterdir())
