"""The ads that the service may show: columnar, one immutable snapshot a city, looked up by ad id in O(log A)."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from serving.errors import Refusal

logger = logging.getLogger("ega.serving")

_INTEGERS = ("ad_id", "creative_id", "poi_id", "category_id", "impressions", "clicks")
_REALS = ("latitude", "longitude", "bid", "reserve")


@dataclass(frozen=True)
class CityAds:
    """Active ads of one city, ascending by ad_id; every array has shape [A]. Money is currency per click."""

    city_id: int
    ad_id: np.ndarray
    creative_id: np.ndarray
    """What is shown of an ad by a model that chooses no creative."""
    poi_id: np.ndarray
    category_id: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    bid: np.ndarray
    reserve: np.ndarray
    impressions: np.ndarray
    clicks: np.ndarray
    frame: pd.DataFrame
    """The catalogue rows in the same order, for encoders."""
    creatives: pd.DataFrame | None
    """Creatives of all cities ascending by creative_id (ad_id, embedding); None where every ad has the one of the catalogue."""
    version: str
    """First 12 hex digits of a sha256 over ids, places, bids, reserves and counts: names the snapshot in receipts."""
    members: str
    """The same over ids, places and what else a model reads of the ads: two snapshots with equal members differ in bids and counts alone."""

    @cached_property
    def owners(self) -> dict[int, int]:
        """ad_id of every creative."""
        return {} if self.creatives is None else dict(zip(self.creatives["creative_id"].tolist(), self.creatives["ad_id"].tolist(), strict=True))

    def rows_of(self, ids: list[int], field: str) -> np.ndarray:
        """Rows of the ads; raises Refusal (422) naming the first id that is not an active ad of this city."""
        wanted = np.asarray(ids, np.int64)
        rows = np.searchsorted(self.ad_id, wanted)
        known = rows < len(self.ad_id)
        known[known] = self.ad_id[rows[known]] == wanted[known]
        if not known.all():
            first = int(np.flatnonzero(~known)[0])
            raise Refusal(422, "unknown_ad", f"ad {wanted[first]} is not an active ad of city {self.city_id}", f"{field}.{first}")
        return rows


def split_by_city(catalogue: pd.DataFrame, creatives: pd.DataFrame | None = None) -> dict[int, CityAds]:
    """Snapshots by city_id. `catalogue`: one row an active ad, with the ADS columns plus `impressions`, `clicks` and `shown_creative_id`;
    `creatives`: as `features.store.load_creatives` gives them.

    Raises ValueError where an ad is named twice or a bid or reserve is not a finite price.
    """
    if catalogue["ad_id"].duplicated().any():
        twice = int(catalogue.loc[catalogue["ad_id"].duplicated(), "ad_id"].iloc[0])
        raise ValueError(f"catalogue names ad {twice} twice; it must hold one row an active ad")
    money = catalogue[["bid", "reserve"]].to_numpy(np.float64)
    bad = ~np.isfinite(money).all(axis=1) | (money[:, 0] <= 0) | (money[:, 1] < 0)
    if bad.any():
        row = catalogue[bad].iloc[0]
        raise ValueError(f"catalogue: ad {row['ad_id']} has bid {row['bid']} and reserve {row['reserve']}; a bid must be finite and > 0, a reserve finite and >= 0")
    ordered = catalogue.sort_values("ad_id", kind="stable")
    return {int(city): _snapshot(int(city), frame.reset_index(drop=True), creatives) for city, frame in ordered.groupby("city_id", sort=True)}


def _snapshot(city: int, frame: pd.DataFrame, creatives: pd.DataFrame | None) -> CityAds:
    columns = {name: frame[name].to_numpy(np.int64) for name in _INTEGERS} | {"creative_id": frame["shown_creative_id"].to_numpy(np.int64)} | {name: frame[name].to_numpy(np.float64) for name in _REALS}
    names = [name for name in sorted(frame.columns) if (name.endswith("_id") and name != "shown_creative_id") or name == "price_band"]
    read = [columns[name] for name in ("ad_id", "latitude", "longitude")] + [frame[name].to_numpy() for name in names]
    if creatives is not None:
        read += [creatives["creative_id"].to_numpy(), creatives["ad_id"].to_numpy(), np.stack(creatives["embedding"].to_list())]
    members = _digest(read)
    version = _digest([*(columns[name] for name in _REALS + _INTEGERS), *(() if creatives is None else (np.frombuffer(members.encode(), np.uint8),))])
    for column in columns.values():
        column.setflags(write=False)
    return CityAds(city_id=city, frame=frame, creatives=creatives, version=version, members=members, **columns)


def _digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


class Feed:
    """Watches the file that the catalogue comes from and hands on what changed, from a thread of its own.

    A file that cannot be read, or a snapshot that is refused, leaves the ads as they are; it is tried again when the file changes once more.
    """

    def __init__(self, path: Path, load: Callable[[], dict[int, CityAds]], renew: Callable[[dict[int, CityAds]], None], seconds: float) -> None:
        """`load` reads the catalogue of `path` into snapshots by city; `renew` takes them; `seconds` between two looks."""
        self._path, self._load, self._renew, self._seconds = path, load, renew, seconds
        self._seen: tuple[int, ...] | None = None  # the first look reads the file: it may have changed while the service started
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catalogue", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Returns when no renewal is under way any more."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _run(self) -> None:
        while not self._closed.wait(self._seconds):
            stamp = self._stamp()
            if stamp is None or stamp == self._seen:
                continue
            self._seen = stamp
            try:
                self._renew(self._load())
            except Exception:
                logger.exception("the changed catalogue %s is not taken over; ads and bids stay as they were", self._path)

