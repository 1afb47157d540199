"""Residual-quantisation k-means: an item's features become a tuple of codes (a^1 .. a^C), coarse to fine.

Layer 1 clusters the features, layer c what the layers before left over (the residual); the codes of an item are the nearest
centres, one a layer. Codebooks are fitted once and then frozen, so that a new item gets its codes without training anything.
Shape letters: N items, F features, C layers, W codes a layer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as config_dataclass
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from model.bundle import canonical, write_atomic

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

Features = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.int64]

FORMAT, KIND = 1, "rq_kmeans"
MANIFEST, CODEBOOKS = "tokenizer.json", "codebooks.safetensors"
_ROWS = 4096
"""Items whose distances to all codes are in memory at once."""


class TokenizerError(ValueError):
    """Features or a stored tokenizer that cannot be used; the message says what is wrong and what would be right."""


@config_dataclass(frozen=True, config=_STRICT)
class TokenizerConfig:
    """Shape of the codes, and what counts as healthy."""

    layers: int = Field(3, ge=1, le=8)
    """C, codes of a tuple (paper: 3)."""
    codes: int = Field(0, ge=0, le=65_536)
    """W, codes a layer (paper: 1024); 0: the smallest power of two that is healthy on the items."""
    iterations: int = Field(100, ge=1)
    """Most rounds of Lloyd's algorithm a layer."""
    seed: int = 1
    """Seed of the first centres."""
    least_use: float = Field(0.8, ge=0, le=1)
    """Health: share of each layer's codes that some item has, at least."""
    most_collisions: float = Field(0.05, ge=0, le=1)
    """Health: share of distinguishable items that share their tuple with another, below this."""


@dataclass(frozen=True)
class Health:
    """What a catalogue looks like in codes. Items with equal features are counted once: no tokenizer could tell them apart."""

    items: int
    """Items with features of their own."""
    duplicates: int
    """Items whose features another one before them had already."""
    use: tuple[float, ...]
    """Share of a layer's codes that at least one item has, in [0, 1]."""
    entropy: tuple[float, ...]
    """Entropy of a layer's codes over log W, in [0, 1]; 1: all codes equally common."""
    collisions: float
    """Share of items whose tuple another item has too, in [0, 1]."""
    largest_group: int
    """Items of the most common tuple."""
    error: tuple[float, ...]
    """Share of the features' variance that is left after each layer."""

    def faults(self, config: TokenizerConfig) -> list[str]:
        """Every way in which `config`'s limits are missed; empty: healthy. A measurement that is not a number is a fault."""
        faults = [
            f"layer {layer} uses {share:.1%} of its codes, at least {config.least_use:.0%} are needed: take fewer codes"
            for layer, share in enumerate(self.use, 1)
            if not share >= config.least_use
        ]
        if not self.collisions < config.most_collisions:
            faults.append(f"{self.collisions:.1%} of the items share their tuple with another, less than {config.most_collisions:.0%} may: take more codes or layers")
        return faults


class Tokenizer:
    """Frozen codebooks. `encode` is a function of an item's own features: neither company nor order changes its codes."""

    def __init__(self, codebooks_CWF: npt.NDArray[np.float32], config: TokenizerConfig, health: Health) -> None:
        self.codebooks = codebooks_CWF
        self.config, self.health = config, health

    @property
    def layers(self) -> int:
        """C."""
        return self.codebooks.shape[0]

    @property
    def codes(self) -> int:
        """W."""
        return self.codebooks.shape[1]

    @property
    def features(self) -> int:
        """F."""
        return self.codebooks.shape[2]

    def encode(self, features_NF: Features) -> Codes:
        """Codes [N, C] in 0..W-1: the nearest centre, layer by layer; of equally near ones the lower code.

        Raises TokenizerError unless the features are finite and of the width that the codebooks were fitted on.
        """
        return _encode(self.codebooks, checked(features_NF, self.features))

    def decode(self, codes_NC: Codes) -> npt.NDArray[np.float64]:
        """Features [N, F] that the codes stand for: the sum of their centres."""
        return sum(centres[codes_NC[:, layer]] for layer, centres in enumerate(self.codebooks.astype(np.float64)))

    def save(self, folder: Path) -> str:
        """Write codebooks and manifest; returns the version, 12 hex digits of the codebooks' sha256.

        The folder appears whole or not at all. An existing one is never overwritten: codes of one version mean nothing to another.
        """
        folder = Path(folder)
        if folder.exists():
            raise TokenizerError(f"tokenizer {folder} exists already; a fitted tokenizer is never replaced, write the new one beside it")
        weights = save_tensors({"codebooks": self.codebooks})
        digest = hashlib.sha256(weights).hexdigest()
        manifest = {
            "format": FORMAT, "kind": KIND, "version": digest[:12], "layers": self.layers, "codes": self.codes, "features": self.features,
            "config": asdict(self.config), "health": asdict(self.health), "file": {"name": CODEBOOKS, "bytes": len(weights), "sha256": digest},
        }  # fmt: skip
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            write_atomic(part / CODEBOOKS, weights)
            write_atomic(part / MANIFEST, canonical(manifest))
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return digest[:12]

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """A stored tokenizer; raises TokenizerError unless every byte is what was saved."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            data = (folder / CODEBOOKS).read_bytes()
            if manifest["format"] != FORMAT or manifest["kind"] != KIND:
                raise TokenizerError(f"tokenizer {folder}: format {manifest['format']!r} of kind {manifest['kind']!r} is unknown here; this version reads {FORMAT}, {KIND}")
            if len(data) != manifest["file"]["bytes"] or hashlib.sha256(data).hexdigest() != manifest["file"]["sha256"]:
                raise TokenizerError(f"tokenizer {folder}: {CODEBOOKS} is not the file that was saved (size or sha256 differs); restore it or fit a new tokenizer")
            codebooks = load_tensors(data)["codebooks"]
            config = TokenizerConfig(**manifest["config"])
            health = Health(**{name: tuple(value) if isinstance(value, list) else value for name, value in manifest["health"].items()})
            expected = tuple(manifest[name] for name in ("layers", "codes", "features"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError, ValidationError, SafetensorError) as error:
            raise TokenizerError(f"tokenizer {folder} cannot be read ({error.__class__.__name__}: {str(error).splitlines()[0]})") from error
        if codebooks.shape != expected or codebooks.dtype != np.float32 or not np.isfinite(codebooks).all():
            raise TokenizerError(f"tokenizer {folder}: codebooks must be finite float32 of shape {expected}, got {codebooks.dtype} of shape {codebooks.shape}")
        return cls(codebooks, config, health)


def checked(features_NF: Features, width: int | None = None) -> npt.NDArray[np.float64]:
    """The features as float64, or a TokenizerError that says what is wrong with them."""
    features = np.asarray(features_NF)
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.number) or np.iscomplexobj(features):
        raise TokenizerError(f"features must be a matrix of real numbers [items, features], got {features.dtype} of shape {features.shape}")
    if width is not None and features.shape[1] != width:
        raise TokenizerError(f"items have {features.shape[1]} features, the codebooks were fitted on {width}")
    features = features.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise TokenizerError(f"features must be finite; {len(bad)} items have others, the first is item {bad[0]}")
    return features


def _nearest(points_NF: npt.NDArray[np.float64], centres_WF: npt.NDArray[np.float64]) -> Codes:
    """Index of the nearest centre [N]. Every pair is summed by itself, feature by feature, so other rows never move a distance, not by a bit. NumPy alone:
    a service gives new ads their codes and has no SciPy."""
    found = np.empty(len(points_NF), np.int64)
    for start in range(0, len(points_NF), _ROWS):
        points = points_NF[start : start + _ROWS]
        distance = np.zeros((len(points), len(centres_WF)))
        for feature in range(points.shape[1]):
            distance += np.square(points[:, feature, None] - centres_WF[:, feature])
        found[start : start + _ROWS] = distance.argmin(1)
    return found


def _encode(codebooks_CWF: npt.NDArray[np.float32], points_NF: npt.NDArray[np.float64]) -> Codes:
    """Nearest centre of what the layers before left over, layer by layer; [N, C]."""
    codes = np.empty((len(points_NF), len(codebooks_CWF)), np.int64)
    for layer, centres in enumerate(codebooks_CWF.astype(np.float64)):
        codes[:, layer] = _nearest(points_NF, centres)
        points_NF = points_NF - centres[codes[:, layer]]
    return codes


def _codebooks(distinct_NF: npt.NDArray[np.float64], config: TokenizerConfig, codes: int) -> npt.NDArray[np.float32]:
    """Fit C codebooks of W centres, [C, W, F], each on the residuals that the rounded centres before it leave.

    A residual met by several items counts once: after a layer with a centre to itself an item's residual is zero, and k-means would
    spend centre upon centre on the same point. Where fewer than W residuals are left, they are the centres and the rest stay at zero.
    """
    from sklearn.cluster import KMeans  # seconds of import that only a fit needs, and the service goes without
    from threadpoolctl import threadpool_limits

    books = np.zeros((config.layers, codes, distinct_NF.shape[1]), np.float32)
    residual = distinct_NF
    with threadpool_limits(limits=1):  # the order in which threads add up would decide the last bits
        for layer in range(config.layers):
            points = np.unique(residual, axis=0)
            if len(points) <= codes:
                books[layer, : len(points)] = points
            else:
                kmeans = KMeans(codes, n_init=1, max_iter=config.iterations, random_state=config.seed + layer, algorithm="lloyd").fit(points)
                books[layer] = kmeans.cluster_centers_
            centres = books[layer].astype(np.float64)
            residual = residual - centres[_nearest(residual, centres)]
    return books


def health_of(features_NF: Features, codebooks_CWF: npt.NDArray[np.float32]) -> Health:
    """How healthy the codes of these items are, whether or not the codebooks were fitted on them."""
    features = checked(features_NF, codebooks_CWF.shape[2])
    if len(features) == 0:
        raise TokenizerError("health is measured on at least one item, got none")
    points = np.unique(features, axis=0)
    codes, width = _encode(codebooks_CWF, points), codebooks_CWF.shape[1]
    _, group = np.unique(codes, axis=0, return_counts=True)
    use, entropy, error = [], [], []
    spread = float(((points - points.mean(0)) ** 2).sum())
    left = points
    for layer, centres in enumerate(codebooks_CWF.astype(np.float64)):
        count = np.bincount(codes[:, layer], minlength=width)
        share = count[count > 0] / len(codes)
        left = left - centres[codes[:, layer]]
        use.append(float((count > 0).mean()))
        entropy.append(float(-(share * np.log(share)).sum() / np.log(width)) if width > 1 else 1.0)
        error.append(float((left**2).sum() / spread) if spread > 0 else 0.0)
    return Health(
        items=len(points), duplicates=len(features) - len(points), use=tuple(use), entropy=tuple(entropy),
        collisions=float(group[group > 1].sum() / len(points)), largest_group=int(group.max()), error=tuple(error),
    )  # fmt: skip


def fit(features_NF: Features, config: TokenizerConfig | None = None) -> Tokenizer:
    """Fit the codebooks on a catalogue: features [N, F], in the scale in which distance shall count. Deterministic in (features, seed).

    With `codes` 0 the smallest power of two that is healthy is taken; TokenizerError when there is none. With `codes` given the tokenizer is
    returned whatever its health: `require_healthy` is the gate.
    """
    config = config or TokenizerConfig()
    features = checked(features_NF)
    distinct = np.unique(features, axis=0)
    if len(distinct) < 2:
        raise TokenizerError(f"a catalogue needs at least two items with different features, got {len(distinct)} among {len(features)}")
    tried = []
    for codes in [config.codes] if config.codes else _widths(len(distinct)):
        books = _codebooks(distinct, config, codes)
        health = health_of(features, books)
        faults = health.faults(config)
        if config.codes or not faults:
            return Tokenizer(books, config, health)
        tried.append(f"{codes} codes: {'; '.join(faults)}")
    raise TokenizerError(f"no number of codes a layer is healthy on {len(distinct)} items in {config.layers} layers. " + " | ".join(tried))


def _widths(items: int) -> list[int]:
    """Powers of two up to the number of items, at least 2."""
    return [2**power for power in range(1, max(2, items.bit_length()))]


def require_healthy(tokenizer: Tokenizer, name: str = "tokenizer") -> None:
    """The gate: TokenizerError with every fault, where there is one; `name` says which tokenizer it is."""
    faults = tokenizer.health.faults(tokenizer.config)
    if faults:
        raise TokenizerError(f"{name} with {tokenizer.layers} x {tokenizer.codes} codes is not healthy: {'; '.join(faults)}")
