"""Memory-mapped request samples as tensors (format: schema.SAMPLE_ARRAYS).

Shape letters: A ads, R requests, B requests of a batch, M = K + N_s candidates, K slots, L behaviours.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from marketplace import schema
from model.ega_v1.network import Batch, VocabularySizes, geo_prior


def vocabulary_sizes(vocabulary: dict[str, list[int]]) -> VocabularySizes:
    """Embedding rows for a vocab.json: its ids plus padding and unknown."""
    return VocabularySizes(**{name: len(vocabulary[name]) + schema.FIRST_CODE for name in schema.VOCABULARIES})


def geo_table(vocabulary: dict[str, list[int]], width: int, seed: int) -> Tensor:
    """Starting geo embeddings for the cells of a vocab.json; see `geo_prior`."""
    latitude, longitude = schema.geo_centre(np.array(vocabulary["geo"], np.int64))
    places = np.full((len(vocabulary["geo"]) + schema.FIRST_CODE, 2), np.nan)
    places[schema.FIRST_CODE :, 0], places[schema.FIRST_CODE :, 1] = latitude, longitude
    return geo_prior(places, width, torch.Generator().manual_seed(seed))


@dataclass
class TrainingBatch:
    """A `Batch` with labels and money. Bids are over the city's median bid of the day."""

    requests: np.ndarray
    inputs: Batch
    click: Tensor
    purchase: Tensor
    exposed: Tensor
    log_inclusion: Tensor
    bid: Tensor
    reserve: Tensor


@dataclass(frozen=True)
class City:
    """The active ads of one city on one day: rows of the ad table, with money over the median bid `unit`."""

    rows: np.ndarray
    bid: np.ndarray
    reserve: np.ndarray
    unit: float


class Samples:
    """One sample folder. Arrays stay on disk; `batch` gathers what it needs, on `device`."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        self.info = json.loads((self.folder / "samples.json").read_text())
        self.vocabulary_document = json.loads((self.folder / "vocab.json").read_text())
        """vocab.json as it is; goes into the bundle unchanged."""
        self.vocabulary: dict[str, list[int]] = self.vocabulary_document["tables"]
        for array in (*schema.SAMPLE_ARRAYS, *schema.PAGE_ARRAYS):
            path = self.folder / f"{array.name}.npy"
            if array in schema.PAGE_ARRAYS and not path.is_file():
                continue  # of logs without creatives
            if not path.is_file():
                raise FileNotFoundError(f"sample array {path} is missing; run sample_requests again")
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            if values.dtype != np.dtype(array.dtype) or values.ndim != len(array.shape.split()):
                raise ValueError(f"{path} holds {values.dtype}{list(values.shape)}, expected {array.dtype} [{array.shape}]")
            setattr(self, "city_code" if array.name == "city" else array.name, values)
        self.slots = int(self.exposed_bid.shape[1])
        self._cities: dict[tuple[int, int], City] = {}
        self._translation: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.request_id)

    @cached_property
    def history_lengths(self) -> np.ndarray:
        """[R] behaviours of every request before the padding."""
        return (np.asarray(self.behaviours[:, :, 0]) != schema.PADDING).sum(1)

    def split_rows(self, split: int) -> np.ndarray:
        """Rows of TRAIN, VALIDATION or TEST that showed at least one ad."""
        return np.flatnonzero((np.asarray(self.split) == split) & (np.asarray(self.candidate[:, 0]) >= 0))

    def city(self, day: int, city: int) -> City:
        """Active ads of a city on a day (index into samples.json `days`)."""
        key = (int(day), int(city))
        if key not in self._cities:
            rows = np.flatnonzero((np.asarray(self.ad_city) == city) & np.isfinite(self.bid[day]))
            bid, reserve = np.array(self.bid[day, rows]), np.array(self.reserve[day, rows])
            unit = float(np.median(bid)) if len(bid) else 1.0
            self._cities[key] = City(rows, bid / unit, reserve / unit, unit)
        return self._cities[key]

    @cached_property
    def prior_rates(self) -> tuple[float, float]:
        """In training: click rate of exposed ads, and rate of "clicked or visited elsewhere" of a city's unexposed ads.

        The second undoes the sampling: what the user chose is always sampled and counts 1, every other candidate 1/pi.
        Both lie in [1e-5, 0.5].
        """
        rows = self.split_rows(schema.TRAIN)
        candidate, click = np.asarray(self.candidate[rows]), np.asarray(self.click[rows])
        real, shown = candidate >= 0, np.arange(candidate.shape[1]) < self.slots
        weight = np.where(click > 0, 1.0, np.exp(-np.asarray(self.log_inclusion[rows], np.float64))) * (real & ~shown)
        rates = (click[:, shown][real[:, shown]].mean() if real[:, shown].any() else 0.05, (weight * click).sum() / max(weight.sum(), 1.0))
        return float(np.clip(rates[0], 1e-5, 0.5)), float(np.clip(rates[1], 1e-5, 0.5))

    def translate(self, vocabulary: dict[str, list[int]]) -> Samples:
        """The same samples in the indices of another model's vocabulary (tables of its vocab.json); ids it never saw are unknown."""
        other = copy.copy(self)
        other._translation = {}
        for name in schema.VOCABULARIES:
            mine, theirs = np.asarray(self.vocabulary[name], np.int64), np.asarray(vocabulary[name], np.int64)
            table = np.full(len(mine) + schema.FIRST_CODE, schema.UNKNOWN, np.int64)
            table[schema.PADDING] = schema.PADDING
            if len(theirs):
                at = np.minimum(np.searchsorted(theirs, mine), len(theirs) - 1)
                table[schema.FIRST_CODE :] = np.where(theirs[at] == mine, at + schema.FIRST_CODE, schema.UNKNOWN)
            other._translation[name] = self.tensor(table)
        return other

    def tensor(self, values: np.ndarray) -> Tensor:
        """An array on the device; on a CPU without a copy."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def _fields(self, values: np.ndarray, fields: tuple[schema.Encoded, ...]) -> Tensor:
        """Encoded fields as int64, translated where a translation is set."""
        tensor = self.tensor(values).long()
        for index, field in enumerate(fields):
            if field.vocabulary and self._translation:
                tensor[..., index] = self._translation[field.vocabulary][tensor[..., index]]
        return tensor

    def inputs(self, requests: np.ndarray, ad_rows: np.ndarray, ad_mask: np.ndarray) -> Batch:
        """Network inputs for `requests` [B] with candidates `ad_rows` [B or 1, N]."""
        rows = np.where(ad_mask, ad_rows, 0)
        longest = max(1, int(self.history_lengths[requests].max(initial=1)))  # columns that are padding for all of them say nothing
        return Batch(
            ad_fields=self._fields(np.asarray(self.ad_fields)[rows], schema.AD_FIELDS) * self.tensor(ad_mask).unsqueeze(-1),
            ad_mask=self.tensor(ad_mask),
            ad_place=self.tensor(np.asarray(self.ad_place)[rows]),
            user_fields=self._fields(self.user_fields[requests], schema.USER_FIELDS),
            context_fields=self._fields(self.context_fields[requests], schema.CONTEXT_FIELDS),
            behaviours=self._fields(self.behaviours[requests, :longest], schema.BEHAVIOUR_FIELDS),
            request_place=self.tensor(self.request_place[requests]),
        )

    def behaviour_inputs(self, requests: np.ndarray) -> Tensor:
        """BEHAVIOUR_FIELDS [B, L, F], newest first."""
        return self._fields(self.behaviours[requests], schema.BEHAVIOUR_FIELDS)

    def user_inputs(self, requests: np.ndarray) -> Tensor:
        """USER_FIELDS and CONTEXT_FIELDS [B, F]."""
        return torch.cat([self._fields(self.user_fields[requests], schema.USER_FIELDS), self._fields(self.context_fields[requests], schema.CONTEXT_FIELDS)], 1)

    def batch(self, requests: np.ndarray, exposed_only: bool = False) -> TrainingBatch:
        """Sampled candidates (exposed first) of the given requests, or the exposed ones alone."""
        requests = np.sort(np.asarray(requests))
        width = self.slots if exposed_only else self.candidate.shape[1]
        candidate = np.array(self.candidate[requests, :width])
        mask = candidate >= 0
        exposed = mask & (np.arange(width) < self.slots)
        rows = np.where(mask, candidate, 0)
        day = np.asarray(self.day[requests])
        unit = np.array([self.city(d, c).unit for d, c in zip(day, self.city_code[requests], strict=True)])[:, None]
        bid = np.nan_to_num(np.asarray(self.bid)[day[:, None], rows])
        bid[:, : self.slots] = np.where(exposed[:, : self.slots], np.nan_to_num(self.exposed_bid[requests]), 0.0)
        reserve = np.nan_to_num(np.asarray(self.reserve)[day[:, None], rows])
        return TrainingBatch(
            requests=requests,
            inputs=self.inputs(requests, rows, mask),
            click=self.tensor(self.click[requests, :width]).float(),
            purchase=self.tensor(self.purchase[requests, :width]).float(),
            exposed=self.tensor(exposed),
            log_inclusion=self.tensor(self.log_inclusion[requests, :width]),
            bid=self.tensor(np.where(mask, bid / unit, 0.0)).float(),
            reserve=self.tensor(np.where(mask, reserve / unit, 0.0)).float(),
        )


def epoch_order(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a function of (seed, epoch) alone, so a resumed run sees the same batches."""
    return np.random.default_rng([seed, epoch]).permutation(rows)
