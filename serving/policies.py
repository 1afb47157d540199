"""Who ranks a page: the approved model or the bootstrap policy, behind one interface."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from marketplace.bootstrap import BootstrapConfig, BootstrapPolicy
from serving.catalogue import CityAds
from serving.errors import Refusal
from serving.event_log import microseconds
from serving.invariants import PricedPage, gsp_page


@dataclass(frozen=True)
class Query:
    """A request as a policy sees it. Arrays run over the city's ads; money is currency per click."""

    request_id: int
    user_id: int
    time: datetime
    utc_offset_minutes: int
    latitude: float
    longitude: float
    user: Any | None
    """features.store.UserFeatures, or None for the default user."""
    bids: np.ndarray
    """What enters the auction: paced."""
    reserves: np.ndarray
    eligible: np.ndarray
    slots: int
    price_mode: str | None
    """Price rule asked for; None: the policy's default."""
    offered: np.ndarray | None = None
    """Bids before pacing; None: the same."""


StateT = TypeVar("StateT")


class Snapshots(Generic[StateT]):
    """What a policy keeps of each city's newest two snapshots: the one before still serves the requests that began with it."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[str, StateT]] = {}

    def add(self, city: int, name: str, build: Callable[[], StateT]) -> None:
        """Make `name` the newest; built unless it is kept already."""
        kept = dict(self._kept.get(city, {}))
        state = kept.pop(name) if name in kept else build()
        self._kept[city] = {**dict(list(kept.items())[-1:]), name: state}

    def of(self, city: int, name: str) -> StateT:
        return self._kept[city][name]


class Policy(Protocol):
    """Ranks and prices pages of prepared cities."""

    version: str
    """Value of `model_version` in answers and logs."""
    reads_user: bool
    """Whether user features enter; if not, none are read."""

    def prepare(self, ads: CityAds) -> None:
        """Precompute what depends on the snapshot of a city only; called before a request names it, while requests for the one before go on."""

    def rank(self, ads: CityAds, query: Query) -> PricedPage:
        """The page; raises Refusal if the query asks for what this policy cannot do."""


class Bootstrap:
    """marketplace.bootstrap over the catalogue's counts: the logging policy, the control arm of experiments. Prices by GSP."""

    reads_user = False
    version = BootstrapPolicy.version

    def __init__(self, exploration: float, seed: int, currency_step: float = 0.0) -> None:
        self._config = BootstrapConfig(exploration=exploration)
        self._seed, self._currency_step = seed, currency_step
        self._cities: Snapshots[BootstrapPolicy] = Snapshots()

    def prepare(self, ads: CityAds) -> None:
        self._cities.add(ads.city_id, ads.version, lambda: BootstrapPolicy(ads.ad_id, ads.latitude, ads.longitude, ads.impressions, ads.clicks, self._config))

    def rank(self, ads: CityAds, query: Query) -> PricedPage:
        draws = np.random.default_rng([self._seed, query.request_id])
        page = self._cities.of(ads.city_id, ads.version).rank(query.latitude, query.longitude, query.bids, query.eligible, query.slots, draws, query.reserves)
        unknown = np.full(len(page.rows), np.nan)
        return gsp_page(page.rows, page.pctr, page.next_score, unknown, page.propensity, query.bids, query.reserves, self._currency_step)


class Model:
    """An approved bundle: set-aware CTR, generated page, prices. Deterministic, so every propensity is 1."""

    reads_user = True

    def __init__(
        self, folder: Path, key: bytes, default_mode: str, learned_allowed: bool, behaviours: int, threads: int, currency_step: float = 0.0, quality_floor: float = 0.0,
        device: Literal["cpu", "cuda"] = "cpu", dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    ) -> None:  # fmt: skip
        """`folder`: a verified bundle; `behaviours`: L, length of the histories that the feature store keeps."""
        import torch

        from features.encoding import Vocabulary
        from features.store import UserFeatures
        from model.bundle import load_bundle
        from model.ega_v1.engine import RankingEngine
        from model.ega_v1.inference import Execution

        torch.set_num_threads(threads)
        bundle = load_bundle(folder, key)
        self.version = bundle.version
        self._vocabulary = Vocabulary.from_dict(bundle.vocabulary)
        self._engine = RankingEngine(bundle, execution=Execution(device=device, dtype=dtype))
        self._default_user = UserFeatures.unknown(behaviours)
        self._default_mode = default_mode
        self._learned_allowed = learned_allowed
        self._currency_step, self._quality_floor = currency_step, quality_floor
        self._cities: Snapshots[Any] = Snapshots()
        self._lock = threading.Lock()

    def prepare(self, ads: CityAds) -> None:
        from features.encoding import encode_ads

        places = np.stack([ads.latitude, ads.longitude], axis=1).astype(np.float32)
        # States belong to the set of ads: new bids cost nothing here.
        self._cities.add(ads.city_id, ads.members, lambda: self._engine.prepare_city(ads.ad_id, encode_ads(self._vocabulary, ads.frame), places))

    def rank(self, ads: CityAds, query: Query) -> PricedPage:
        from features.encoding import encode_requests

        mode = query.price_mode or self._default_mode
        if mode == "learned" and not self._learned_allowed:
            raise Refusal(422, "price_mode_unavailable", "the payment network of this model has not passed its gate; use 'critical'", "price_mode")
        if not query.eligible.any():
            nothing = np.empty(0)
            return PricedPage(np.empty(0, np.int64), nothing, nothing, nothing, nothing, mode)
        user = query.user or self._default_user
        latitude, longitude = np.array([query.latitude]), np.array([query.longitude])
        when, offset = np.array([microseconds(query.time)], np.int64), np.array([query.utc_offset_minutes], np.int64)
        encoded = encode_requests(self._vocabulary, user.profiles, user.histories, latitude, longitude, when, offset)
        offered = query.bids if query.offered is None else query.offered
        unit = float(np.median(np.where(query.eligible, offered, ads.bid)))  # neither pacing nor an override that takes no part moves the scale of the others
        with self._lock:  # one page at a time on these cores; two would only share them
            page = self._engine.rank(
                self._cities.of(ads.city_id, ads.members),
                encoded["user_fields"][0],
                encoded["context_fields"][0],
                encoded["behaviours"][0],
                np.array([query.latitude, query.longitude], np.float32),
                np.where(query.eligible, query.bids, ads.bid),
                query.reserves,
                query.eligible,
                min(query.slots, self._engine.slots),
                mode,
                bid_unit=unit,
                currency_step=self._currency_step,
                quality_floor=self._quality_floor,
            )
        rows = np.asarray(page.rows, np.int64)
        return PricedPage(
            rows=rows,
            pctr=np.asarray(page.pctr, np.float64),
            price=np.asarray(page.price, np.float64),
            critical_price=np.asarray(page.critical_price, np.float64),
            propensity=np.ones(len(rows)),
            price_mode=mode,
            basis=[
                {
                    "rank_ctr": float(page.set_pctr[slot]), "next_score": float(page.next_score[slot]), "currency_step": self._currency_step,
                    "theta": [max(float(value), 0.0) if value < np.inf else None for value in page.theta[slot]],
                    "slot_ctr": [float(value) for value in page.slot_ctr[slot]],
                    "scores_below": [float(value) for value in page.scores_below[slot]], "slot_clicks": [float(value) for value in page.slot_clicks],
                    "network_price": None if page.network_price is None else float(page.network_price[slot]),
                    "runner_up": int(ads.ad_id[page.runner_up[slot]]) if page.runner_up[slot] >= 0 else None, "repaired": bool(page.repaired[slot]),
                    "affinity": [float(value) for value in page.affinity[slot]], "slope": [float(value) for value in page.slope[slot]], "tied": bool(page.tied[slot]),
                }
                for slot in range(len(rows))
            ],
        )  # fmt: skip
