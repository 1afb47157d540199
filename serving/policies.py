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
class Organic:
    """Organic results of a page, in their order; arrays [O]."""

    poi_id: np.ndarray
    category_id: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray

    @classmethod
    def of(cls, items: list[dict[str, Any]]) -> Organic:
        """From items as a request names them."""
        return cls(*(np.array([item[name] for item in items], kind) for name, kind in (("poi_id", np.int64), ("category_id", np.int64), ("latitude", np.float64), ("longitude", np.float64))))

    def __len__(self) -> int:
        return len(self.poi_id)


NO_ORGANIC = Organic.of([])


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
    organic: Organic = NO_ORGANIC
    alpha: float | None = None
    """Weight of money in the search of EGA (V2), as `beta`; None: the model's."""
    beta: float | None = None


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
        self, bundle: Any, default_mode: str, learned_allowed: bool, behaviours: int, currency_step: float = 0.0, quality_floor: float = 0.0,
        device: Literal["cpu", "cuda"] = "cpu", dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    ) -> None:  # fmt: skip
        """`bundle`: a loaded one; `behaviours`: L, length of the histories that the feature store keeps."""
        from features.encoding import Vocabulary
        from features.store import UserFeatures
        from model.ega_v1.engine import RankingEngine
        from model.ega_v1.inference import Execution

        self.version = bundle.version
        self._vocabulary = Vocabulary.from_dict(bundle.vocabulary)
        self._engine = RankingEngine(bundle, execution=Execution(device=device, dtype=dtype))
        self._default_user, self._behaviours = UserFeatures.unknown(behaviours), behaviours
        self._default_mode = default_mode
        self._learned_allowed = learned_allowed
        self._currency_step, self._quality_floor = currency_step, quality_floor
        self._cities: Snapshots[Any] = Snapshots()
        self._lock = threading.Lock()

    def prepare(self, ads: CityAds) -> None:
        from features.encoding import encode_ads

        places = np.stack([ads.latitude, ads.longitude], axis=1).astype(np.float32)
        # States belong to the set of ads: new bids cost nothing here.
        self._cities.add(ads.city_id, ads.members, lambda: self._engine.prepare_city(ads.ad_id, encode_ads(self._vocabulary, ads.frame), places, self._behaviours))

    def rank(self, ads: CityAds, query: Query) -> PricedPage:
        mode = query.price_mode or self._default_mode
        if mode == "learned" and not self._learned_allowed:
            raise Refusal(422, "price_mode_unavailable", "the payment network of this model has not passed its gate; use 'critical'", "price_mode")
        if mode == "implicit":
            raise Refusal(422, "price_mode_unavailable", "this model knows the exact truthful price; use 'critical'", "price_mode")
        if not query.eligible.any():
            nothing = np.empty(0)
            return PricedPage(np.empty(0, np.int64), nothing, nothing, nothing, nothing, mode)
        encoded = _encoded(self._vocabulary, query.user or self._default_user, query)
        with self._lock:  # one page at a time: on two cores the other one is the rest of the service's, or it would be late in overload
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
                bid_unit=_bid_unit(ads, query),
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


def _encoded(vocabulary: Any, user: Any, query: Query) -> dict[str, np.ndarray]:
    """`features.encoding.encode_requests` of one request."""
    from features.encoding import encode_requests

    latitude, longitude = np.array([query.latitude]), np.array([query.longitude])
    when, offset = np.array([microseconds(query.time)], np.int64), np.array([query.utc_offset_minutes], np.int64)
    return encode_requests(vocabulary, user.profiles, user.histories, latitude, longitude, when, offset)


def _bid_unit(ads: CityAds, query: Query) -> float:
    """The median bid; neither pacing nor an override that takes no part moves the scale of the others."""
    offered = query.bids if query.offered is None else query.offered
    return float(np.median(np.where(query.eligible, offered, ads.bid)))


class GeneratedPages:
    """An approved EGA (V2): ads, creatives and places among organic results in one search. Deterministic, so every propensity is 1."""

    reads_user = True

    def __init__(self, bundle: Any, default_mode: str, learned_allowed: bool, behaviours: int, currency_step: float = 0.0) -> None:
        """`bundle`: a loaded one; `behaviours`: L, length of the histories that the feature store keeps."""
        from features.encoding import Vocabulary
        from features.store import UserFeatures
        from model.ega_v2.engine import PageEngine

        self.version = bundle.version
        self._vocabulary = Vocabulary.from_dict(bundle.vocabulary)
        self._engine = PageEngine(bundle)
        self._default_user = UserFeatures.unknown(behaviours)
        self._default_mode, self._learned_allowed, self._currency_step = default_mode, learned_allowed, currency_step
        self._cities: Snapshots[Any] = Snapshots()
        self._lock = threading.Lock()

    def prepare(self, ads: CityAds) -> None:
        self._cities.add(ads.city_id, ads.members, lambda: self._prepare(ads))

    def _prepare(self, ads: CityAds) -> Any:
        from model.ega_v2.engine import Creatives

        if ads.creatives is None:
            raise RuntimeError(f"model {self.version} chooses creatives, and the feature store of these ads has none (view ad_creatives); build the features from logs with the table creatives")
        creatives = Creatives(*(ads.creatives[name].to_numpy(np.int64) for name in ("creative_id", "ad_id")), np.stack(ads.creatives["embedding"].to_list()).astype(np.float32))
        return self._engine.prepare_city(ads.ad_id, self._places(ads.poi_id, ads.category_id, ads.latitude, ads.longitude), creatives)

    def _places(self, poi_id: np.ndarray, category_id: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> Any:
        from model.ega_v2.engine import Places

        return Places(self._vocabulary.index("poi", poi_id), poi_id, category_id, np.stack([latitude, longitude], axis=1))

    def rank(self, ads: CityAds, query: Query) -> PricedPage:
        from model.ega_v2.engine import Visits

        mode: Any = query.price_mode or self._default_mode
        if mode == "learned" and not self._learned_allowed:
            raise Refusal(422, "price_mode_unavailable", "the payment network of this model has not passed its gate; use 'implicit'", "price_mode")
        if mode in ("critical", "vcg"):
            raise Refusal(422, "price_mode_unavailable", f"a page that is searched for has no {mode} prices (docs/ega_v2.md); use 'implicit', 'learned', 'gsp' or 'first_price'", "price_mode")
        if len(query.organic) > self._engine.organic_items:
            raise Refusal(422, "too_many_organic", f"this model reads at most {self._engine.organic_items} organic results a page", "organic")
        nothing = np.empty(0)
        if not query.eligible.any():
            return PricedPage(np.empty(0, np.int64), nothing, nothing, nothing, nothing, mode)
        user = query.user or self._default_user
        encoded = _encoded(self._vocabulary, user, query)
        past = user.histories.before(np.array([microseconds(query.time)], np.int64))
        visits = Visits(self._places(past.poi_id[0], past.category_id[0], past.latitude[0], past.longitude[0]), past.creative_id[0], int(past.count[0]))
        organic = query.organic
        with self._lock:
            page = self._engine.rank(
                query.request_id, self._cities.of(ads.city_id, ads.members), encoded["user_fields"][0], encoded["context_fields"][0], encoded["behaviours"][0], visits,
                np.array([query.latitude, query.longitude], np.float32), self._places(organic.poi_id, organic.category_id, organic.latitude, organic.longitude), ads.impressions, ads.clicks,
                np.where(query.eligible, query.bids, ads.bid), query.reserves, query.eligible, min(query.slots, self._engine.slots), mode, _bid_unit(ads, query), self._currency_step,
                query.alpha, query.beta,
            )  # fmt: skip
        basis = [
            {
                "rank_ctr": float(page.pctr[k]), "next_score": float(page.next_score[k]), "currency_step": self._currency_step,
                "network_price": None if page.network_price is None else float(page.network_price[k]), "page_log_chance": page.log_chance,
                "probe_ctr": None if page.probe_ctr is None else page.probe_ctr[k].tolist(),
            }
            for k in range(len(page.rows))
        ]  # fmt: skip
        return PricedPage(page.rows, page.pctr, page.price, np.full(len(page.rows), np.nan), np.ones(len(page.rows)), mode, basis, page.creative_id, page.above)


def load_model(
    folder: Path, key: bytes, default_mode: str, learned_allowed: bool, behaviours: int, threads: int, currency_step: float = 0.0, quality_floor: float = 0.0,
    device: Literal["cpu", "cuda"] = "cpu", dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> Model | GeneratedPages:  # fmt: skip
    """The policy of a verified bundle, by its kind. `behaviours`: L, length of the histories that the feature store keeps."""
    import torch

    from model.bundle import load_bundle

    torch.set_num_threads(threads)
    bundle = load_bundle(folder, key)
    searched = bundle.manifest["kind"] == "ega_v2"
    if default_mode in (("critical", "vcg") if searched else ("implicit",)):
        raise ValueError(f"model {bundle.version} has no {default_mode} prices: set price_mode to {'implicit' if searched else 'critical'}, or to auto for what its gates chose")
    if not searched:
        return Model(bundle, default_mode, learned_allowed, behaviours, currency_step, quality_floor, device, dtype)
    if quality_floor > 0 or device != "cpu":
        raise ValueError(f"model {bundle.version} is an EGA (V2): quality_floor must be 0 and device cpu for it (got {quality_floor:g} and {device})")
    return GeneratedPages(bundle, default_mode, learned_allowed, behaviours, currency_step)
