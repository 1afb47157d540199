"""Worlds: hidden truth that writes logs, sends live traffic, answers pages and scores them.

A world knows everything; what leaves it is a folder of logs in the schema, requests, and the answers of users. The same
request meets the same user with the same luck under every policy: draws are keyed by (seed, request, ad, purpose).

Shapes: R requests, N ads asked about, A ads of a city, K slots, S substitutes, M creatives (ordered by ad), O organic items.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import field
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import ConfigDict, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from scipy.sparse import csr_matrix
from scipy.special import ndtri
from tqdm import tqdm

from marketplace import checkins, keyed, organic, synthetic
from marketplace.bootstrap import BootstrapConfig, BootstrapPolicy
from marketplace.checkins import CheckinsConfig
from marketplace.click_model import (
    ClickConfig,
    attraction,
    calibrate_base,
    continuation,
    page_click_probability,
    reading_probability,
    sigmoid,
    substitution_from_below,
)
from marketplace.creatives import CreativeConfig, best_creatives, draw_creatives
from marketplace.logs import write_bytes, write_manifest, write_table
from marketplace.organic import OrganicConfig
from marketplace.schema import ACTION_CLICK, ACTION_PURCHASE, ACTION_VISIT, ADS, BEHAVIOURS, CREATIVES, REQUESTS, USERS
from marketplace.state import CREATIVE_ID_BASE, WorldState, planar_km
from marketplace.synthetic import SyntheticConfig

AD_BEHAVIOUR_ID_BASE, ORGANIC_BEHAVIOUR_ID_BASE = 10**15, 2 * 10**15
"""Behaviours on ads, and on organic results, have ids from here on; visits lie below."""

_CELLS_AT_ONCE = 2**16  # temporaries stay in the cache
_CALIBRATION_REQUESTS = 4000


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class WorldConfig:
    """Which world, and the market in it."""

    kind: Literal["synthetic", "checkins"] = "synthetic"
    """`synthetic`, or `checkins` for real people and places from a folder given with --data."""
    slots: int = 5
    """K, ads shown on one page."""
    unlogged_days: int = 0
    """First log days that are answered but not written: their clicks are in the histories and the logging policy has learned from them,
    as on a platform that has been running. Without them the share of clicks in a history grows all through the logs."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Used by kind `synthetic`."""
    checkins: CheckinsConfig = field(default_factory=CheckinsConfig)
    """Used by kind `checkins`."""
    clicks: ClickConfig = field(default_factory=ClickConfig)
    """How users answer pages."""
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    """The policy that writes the logs."""
    creatives: CreativeConfig = field(default_factory=CreativeConfig)
    """Several creatives an ad; none by default."""
    organic: OrganicConfig = field(default_factory=OrganicConfig)
    """Organic results on the pages; none by default."""

    @model_validator(mode="after")
    def _check(self) -> WorldConfig:
        if not 1 <= self.slots <= 50:
            raise ValueError(f"slots must lie in [1, 50], got {self.slots}")
        if self.unlogged_days < 0:
            raise ValueError(f"unlogged_days must not be negative, got {self.unlogged_days}")
        return self


class Truth(NamedTuple):
    """The market's truth about R requests and N ads."""

    click_probability: np.ndarray
    """p [R, N]: probability of a click if the user reads the ad; 0 for an ad of another city."""
    continuation: np.ndarray
    """c [R, N]: probability that the user reads on past the ad."""
    value: np.ndarray
    """[N], the advertiser's value of a click, currency."""


class UserResponse(NamedTuple):
    """What the user did with a page; [K'] (or [R, K] for many pages) but for organic items."""

    click: np.ndarray
    click_delay_seconds: np.ndarray
    """Seconds from the page to the click; NaN without one."""
    purchase: np.ndarray
    purchase_delay_seconds: np.ndarray
    """Seconds from the click to the order; NaN without one."""
    order_value: np.ndarray
    """Currency; 0 without an order."""
    creative_click: np.ndarray
    """Whether the user opened the creative itself."""
    organic_click: np.ndarray
    """Clicks on the page's organic items in their order, [O] (or [R, O]); O may be 0."""
    organic_click_delay_seconds: np.ndarray
    """Seconds from the page to that click; NaN without one."""


class _Page(NamedTuple):
    """R pages by rows of the world's tables; -1 pads. All [R, K]."""

    ads: np.ndarray
    creatives: np.ndarray
    above: np.ndarray
    """Organic items above each ad."""


def build_world(config: WorldConfig, seed: int, data: Path | None = None) -> World:
    """Draw the world of a config; the same config, seed and data give the same world.

    Args: data, the folder with checkins.parquet and pois.parquet; needed by kind `checkins`, refused by `synthetic`.
    """
    if config.kind == "checkins":
        if data is None:
            raise ValueError("a world of kind 'checkins' needs a data folder with checkins.parquet and pois.parquet: give --data DIR")
        state = checkins.generate(config.checkins, config.clicks, Path(data), seed)
    else:
        if data is not None:
            raise ValueError("a world of kind 'synthetic' takes no data folder; drop --data or set world.kind to 'checkins'")
        state = synthetic.generate(config.synthetic, config.clicks, seed)
    if config.creatives.per_ad > 1:
        state.ads["creative_id"] = CREATIVE_ID_BASE + np.arange(len(state.ads), dtype=np.int64) * config.creatives.per_ad
        state.creative_embedding_MF, state.creative_appeal_M, state.visual_taste_UF = draw_creatives(config.creatives, state.ads, state.users, seed)
    world = World(config, seed, state, base=0.0)
    world.base = world._calibrated_base()
    return world


class World:
    """A market with hidden truth; see the module's text. Build with `build_world` or `World.load`."""

    def __init__(self, config: WorldConfig, seed: int, state: WorldState, base: float) -> None:
        self.config, self.seed, self.state, self.base = config, seed, state, base
        self._ad = {name: state.ads[name].to_numpy() for name in state.ads}
        self._poi = {name: state.pois[name].to_numpy() for name in state.pois}
        self._user = {name: state.users[name].to_numpy() for name in state.users}
        self._request = {name: state.requests[name].to_numpy() for name in state.requests if name != "event_timestamp"}
        self._active_DA = np.isfinite(state.bid_DA)
        known = state.substitute_AS >= 0
        self._substitute_AS = np.where(known, state.substitute_AS, 0)
        self._weight_AS = np.where(known, state.substitute_weight_AS, 0.0).astype(np.float64)
        self._ads_of_city = {int(city): np.flatnonzero(self._ad["city_id"] == city) for city in np.unique(self._ad["city_id"])}
        self._ad["first_creative"] = np.arange(len(self._ad["ad_id"])) * config.creatives.per_ad
        visits = np.bincount(state.habit_key % len(self._poi["poi_id"]), np.expm1(state.habit_value), len(self._poi["poi_id"]))
        advertised = np.isin(np.arange(len(visits)), self._ad["poi_row"])
        self._organic_places = {int(city): np.flatnonzero((self._poi["city_id"] == city) & ~advertised) for city in np.unique(self._poi["city_id"])}
        self._log_popularity = np.log1p(visits)

    # ---- files

    def save(self, folder: Path) -> None:
        """Write the world, hidden truth and all, as Parquet, npy and JSON."""
        folder = Path(folder)
        self.state.save(folder)
        config = TypeAdapter(WorldConfig).dump_python(self.config, mode="json")
        write_bytes(folder / "world.json", (json.dumps({"seed": self.seed, "base": self.base, "config": config}, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> World:
        """The world that `save` wrote."""
        folder = Path(folder)
        if not (folder / "world.json").exists():
            raise FileNotFoundError(f"{folder} holds no world.json; it is not a saved world (they are written by `ega simulate` and `ega run`)")
        record = json.loads((folder / "world.json").read_text())
        return cls(TypeAdapter(WorldConfig).validate_python(record["config"]), record["seed"], WorldState.load(folder), record["base"])

    # ---- the truth

    def request_rows(self, request_ids: Any) -> np.ndarray:
        """Rows of request ids in the world's own table; ValueError for an id that the world does not know."""
        return _rows_of(self._request["request_id"], np.asarray(request_ids, np.int64), "request")

    def ad_rows(self, ad_ids: Any) -> np.ndarray:
        """Rows of ad ids in the world's own table; ValueError for an id that the world does not know."""
        return _rows_of(self._ad["ad_id"], np.asarray(ad_ids, np.int64), "ad")

    def values_per_click(self, ad_ids: Any) -> np.ndarray:
        """The advertisers' true value of a click, currency, for ad ids of any shape."""
        return self._ad["value"][self.ad_rows(ad_ids)]

    def user_ids(self, request_ids: Any) -> np.ndarray:
        """The users of request ids."""
        return self._user["user_id"][self._request["user_row"][self.request_rows(request_ids)]]

    def active_ads(self, request_ids: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Groups of the given requests [R] that share a city and a day: (positions in the argument, ids of the ads active there and then)."""
        rows = self.request_rows(request_ids)
        city, day = self._request["city_id"][rows], self._request["day_row"][rows]
        for key in np.unique(np.stack([city, day], axis=1), axis=0):
            active = self._active_DA[key[1]] & (self._ad["city_id"] == key[0])
            yield np.flatnonzero((city == key[0]) & (day == key[1])), self._ad["ad_id"][active]

    def truth(self, requests: pd.DataFrame, ad_ids: np.ndarray) -> Truth:
        """p, c and values for requests of this world (by their request_id) and ads of this world, each with its first creative.

        Memory: two float64 arrays [R, N]; ask in pieces where that is too much. p holds for the ads that are active on
        the request's day; under the stress model (`substitution_below`) it is p before substitution on the page.
        """
        rows, ads = self.request_rows(requests["request_id"]), self.ad_rows(ad_ids)
        p, c = np.zeros((len(rows), len(ads))), np.ones((len(rows), len(ads)))
        for city, members in self._ads_of_city.items():
            columns = np.flatnonzero(self._ad["city_id"][ads] == city)
            mine = np.flatnonzero(self._request["city_id"][rows] == city)
            local = np.searchsorted(members, ads[columns])
            column = np.searchsorted(members, self._substitute_AS[members]).clip(max=len(members) - 1)
            pointer = np.arange(0, column.size + 1, column.shape[1])
            substitutes = csr_matrix((self._weight_AS[members].ravel(), column.ravel(), pointer), shape=(len(members), len(members)))
            step = max(1, _CELLS_AT_ONCE // max(1, len(members)))
            for start in range(0, len(mine), step) if len(columns) else ():
                part = mine[start : start + step]
                utility = self._utility(rows[part, None], members[None, :])
                strength = np.exp(0.5 * utility) * self._active_DA[self._request["day_row"][rows[part]]][:, members]
                pressure = (substitutes @ strength.T).T[:, local]
                shown = utility[:, local] + self._creative_utility(rows[part, None], self._ad["first_creative"][members[None, local]])
                p[np.ix_(part, columns)] = attraction(shown, pressure, self.base, self.config.clicks)
                c[np.ix_(part, columns)] = self._continuation(rows[part, None], members[None, local])
        return Truth(p, c, self._ad["value"][ads])

    def page_truth(self, request_ids: Any, ad_ids: np.ndarray, creative_ids: np.ndarray | None = None, above: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """p and c [R, K] of pages [R, K] of ad ids; -1 pads and has p 0, c 1. Under the stress model p is as on this page.

        Args: creative_ids [R, K], default each ad's first; above [R, K], organic items above each ad, default alternating. p holds for a user
        who read all ads above: where organic items stand above too, it is the chance of reading past them times that of a click then.
        """
        rows, page = self.request_rows(request_ids), self._page(ad_ids, creative_ids, above)
        p, c = self._page_truth(rows, page.ads, page.creatives)
        if self.config.organic.items:
            p = p * organic.reach(c, self._organic_truth(rows)[1], page.above)[0]
        return p, c

    def organic_clicks(self, request_ids: Any, ad_ids: np.ndarray, above: np.ndarray | None = None) -> np.ndarray:
        """Probability of a click on every organic item [R, O] of these pages of ads."""
        rows, page = self.request_rows(request_ids), self._page(ad_ids, None, above)
        p, c = self._organic_truth(rows)
        return p * reading_probability(c) * organic.reach(self._page_truth(rows, page.ads, page.creatives)[1], c, page.above)[1]

    def _page(self, ad_ids: np.ndarray, creative_ids: np.ndarray | None, above: np.ndarray | None) -> _Page:
        """Rows and layout of pages [R, K] of ids; ValueError for a creative of another ad and for a layout that is none."""
        ad_ids = np.asarray(ad_ids, np.int64)
        shown = ad_ids >= 0
        ads = np.full(ad_ids.shape, -1, np.int64)
        ads[shown] = self.ad_rows(ad_ids[shown])
        creatives = np.where(shown, self._ad["first_creative"][ads], -1)
        if creative_ids is not None:
            own = np.asarray(creative_ids, np.int64) - self._ad["creative_id"][ads]  # an ad's creatives are numbered from its first
            foreign = shown & ((own < 0) | (own >= self.config.creatives.per_ad))
            if foreign.any():
                raise ValueError(f"creative {np.asarray(creative_ids)[foreign][0]} is not one of ad {ad_ids[foreign][0]}")
            creatives = np.where(shown, creatives + own, -1)
        items = self.config.organic.items
        layout = organic.alternating(*ad_ids.shape, items) if above is None else organic.checked(above, items)
        return _Page(ads, creatives, layout)

    def organic_items(self, request_ids: Any) -> pd.DataFrame:
        """The organic results of requests, in their order: request_id, rank, poi_id, category_id, latitude, longitude."""
        rows = self.request_rows(request_ids)
        items = self._organic_rows(rows)
        request, rank = np.nonzero(items >= 0)
        poi = items[request, rank]
        frame = {"request_id": self._request["request_id"][rows[request]], "rank": (rank + 1).astype(np.int32), "poi_id": self._poi["poi_id"][poi]}
        return pd.DataFrame(frame | {name: self._poi[name][poi] for name in ("category_id", "latitude", "longitude")})

    def _organic_rows(self, rows: np.ndarray) -> np.ndarray:
        """Places [R, O] that the organic ranking shows: popular ones nearby that nobody advertises; -1 where a city has no more."""
        config = self.config.organic
        found = np.full((len(rows), config.items), -1, np.int64)
        for city, places in self._organic_places.items():
            mine = np.flatnonzero(self._request["city_id"][rows] == city)
            count = min(config.items, len(places))
            step = max(1, _CELLS_AT_ONCE // max(1, len(places)))
            for start in range(0, len(mine), step) if count else ():
                part = mine[start : start + step]
                latitude, longitude = self._place(rows[part, None])
                km = planar_km(latitude, longitude, self._poi["latitude"][places], self._poi["longitude"][places])
                score = self._log_popularity[places] - km / config.distance_scale_km
                best = np.argpartition(-score, count - 1, axis=1)[:, :count]
                order = np.argsort(-np.take_along_axis(score, best, axis=1), axis=1, kind="stable")
                found[part, :count] = places[np.take_along_axis(best, order, axis=1)]
        return found

    def _organic_truth(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p and c [R, O] of the organic items of requests; 0 and 1 where there is none."""
        poi = self._organic_rows(rows)
        shown, poi = poi >= 0, np.maximum(poi, 0)
        weights = self.config.clicks
        p = weights.max_probability * sigmoid(self.base + self._place_utility(rows[:, None], poi))
        taste = self.state.taste_UC[self._request["user_row"][rows[:, None]], self._poi["category_id"][poi]]
        return np.where(shown, p, 0.0), np.where(shown, continuation(np.zeros(poi.shape), taste, weights), 1.0)

    def _page_truth(self, rows: np.ndarray, ads: np.ndarray, creatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p and c of pages of ad rows, past no organic item."""
        p, c = np.zeros(ads.shape), np.ones(ads.shape)
        step = max(1, _CELLS_AT_ONCE // (max(1, ads.shape[1]) * (1 + self._weight_AS.shape[1])))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            shown = ads[part] >= 0
            utility, pressure = self._page_utility(rows[part], np.maximum(ads[part], 0))
            utility = utility + self._creative_utility(rows[part, None], np.maximum(creatives[part], 0))
            page_p = attraction(utility, pressure, self.base, self.config.clicks)
            same_city = self._ad["city_id"][ads[part]] == self._request["city_id"][rows[part], None]
            page_p = np.where(shown & same_city, page_p, 0.0)
            category = np.where(shown, self._ad["category_id"][ads[part]], -1 - np.arange(ads.shape[1]))
            p[part] = substitution_from_below(page_p, category, self.config.clicks.substitution_below)
            c[part] = np.where(shown, self._continuation(rows[part, None], ads[part]), 1.0)
        return p, c

    def _page_utility(self, rows: np.ndarray, ads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Utility and substitutes' pressure of pages [R, K] of ad rows."""
        near = self._substitute_AS[ads]
        strength = np.exp(0.5 * self._utility(rows[:, None, None], near))
        active = self._active_DA[self._request["day_row"][rows][:, None, None], near]
        return self._utility(rows[:, None], ads), (self._weight_AS[ads] * strength * active).sum(axis=-1)

    def _utility(self, rows: np.ndarray, ads: np.ndarray) -> np.ndarray:
        """The user's utility for ads in logits, whatever their creatives, by rows of requests and ads that broadcast against each other."""
        utility = self._place_utility(rows, self._ad["poi_row"][ads], self._ad["appeal"][ads])
        if self.config.clicks.day_drift:
            utility += self.state.drift_DA[self._request["day_row"][rows], ads]
        return utility

    def _place_utility(self, rows: np.ndarray, poi: np.ndarray, appeal: np.ndarray | float = 0.0) -> np.ndarray:
        """The user's utility for places in logits, by rows of requests and places that broadcast against each other."""
        weights, state = self.config.clicks, self.state
        user, category = self._request["user_row"][rows], self._poi["category_id"][poi]
        utility = weights.taste * state.taste_UC[user, category].astype(np.float64)
        utility += weights.hour * state.hour_affinity_C24[category, self._request["local_hour"][rows]]
        utility += weights.quality * self._poi["quality"][poi] + appeal
        utility -= weights.price * self._user["price_sensitivity"][user] * (self._poi["price_band"][poi] - 2.5)
        km = planar_km(self._request["latitude"][rows], self._request["longitude"][rows], self._poi["latitude"][poi], self._poi["longitude"][poi])
        utility -= weights.distance * self._user["distance_sensitivity"][user] * np.log1p(km)
        utility += weights.habit * self._habit(user, poi)
        intent = self._request["intent_poi_row"][rows]
        wanted = np.maximum(intent, 0)
        apart = planar_km(self._poi["latitude"][wanted], self._poi["longitude"][wanted], self._poi["latitude"][poi], self._poi["longitude"][poi])
        same_category = (intent >= 0) & (self._poi["category_id"][wanted] == category)
        utility += np.where(same_category, weights.intent_category * np.exp(-0.5 * apart), 0.0)
        utility += weights.intent_place * (intent == poi)
        return utility

    def _creative_affinity(self, rows: np.ndarray, creatives: np.ndarray) -> np.ndarray:
        """How much creatives agree with users' visual tastes (unit variance over users), by rows that broadcast against each other."""
        taste = self.state.visual_taste_UF[self._request["user_row"][rows]]
        return np.einsum("...f,...f->...", taste.astype(np.float64), self.state.creative_embedding_MF[creatives])

    def _creative_utility(self, rows: np.ndarray, creatives: np.ndarray) -> np.ndarray | float:
        """What a creative adds to the user's utility for its ad, logits; 0 in a world without creatives."""
        if self.config.creatives.per_ad == 1:
            return 0.0
        return self.config.creatives.taste * self._creative_affinity(rows, creatives) + self.state.creative_appeal_M[creatives]

    def _habit(self, user: np.ndarray, poi: np.ndarray) -> np.ndarray:
        """log(1 + visits before the log days) of users to places."""
        keys = self.state.habit_key
        if not len(keys):
            return np.zeros(np.broadcast_shapes(user.shape, poi.shape))
        wanted = user * len(self._poi["poi_id"]) + poi
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where(keys[at] == wanted, self.state.habit_value[at], 0.0)

    def _continuation(self, rows: np.ndarray, ads: np.ndarray) -> np.ndarray:
        taste = self.state.taste_UC[self._request["user_row"][rows], self._ad["category_id"][ads]]
        return continuation(self._ad["satisfaction"][ads], taste, self.config.clicks)

    def _calibrated_base(self) -> float:
        """The base level at which the bootstrap policy's pages have the configured mean CTR over the log days.

        A sample of requests is answered with expected clicks instead of drawn ones: first by a policy that knows nothing,
        then by one that learns overnight, as in the logs.
        """
        rows = np.flatnonzero(self._request["day_row"] < len(self.state.log_days))
        weight = max(1.0, len(rows) / _CALIBRATION_REQUESTS)
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _CALIBRATION_REQUESTS)).astype(np.int64)]
        base = None
        for counts in (None, np.zeros((2, len(self._ad["ad_id"])))):
            seen: list[tuple[np.ndarray, ...]] = []
            for day, _, mine, ads, policy, uniforms in self._policies(rows, counts):
                page = policy.rank_batch(*self._place(mine), self.state.bid_DA[day, ads], None, uniforms, self._ad["reserve"][ads]).rows
                full = (page >= 0).all(axis=1)
                mine, page = mine[full], ads[page[full]] if len(ads) else page[full]
                shown = self._logged_page(mine, page, None)
                utility, pressure = self._page_utility(mine, page)
                reading = self._continuation(mine[:, None], page)
                past_organic = organic.reach(reading, self._organic_truth(mine)[1], shown.above)[0]
                seen.append((utility + self._creative_utility(mine[:, None], shown.creatives), pressure, reading, past_organic))
                if counts is not None and base is not None:
                    utility, pressure, reading, past_organic = seen[-1]
                    clicks = page_click_probability(attraction(utility, pressure, base, self.config.clicks), reading) * past_organic
                    np.add.at(counts[0], page, weight)
                    np.add.at(counts[1], page, weight * clicks)
            parts = [np.concatenate(part) for part in zip(*seen, strict=True)]
            if not parts or not len(parts[0]):
                raise ValueError(f"no request finds {self.config.slots} active ads in its city; give the world more ads or fewer slots")
            base = calibrate_base(*parts, self.config.clicks)
        return float(base)

    # ---- traffic

    def _place(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._request["latitude"][rows], self._request["longitude"][rows]

    def _policies(self, rows: np.ndarray, counts: np.ndarray | None) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, BootstrapPolicy, np.ndarray]]:
        """(day, city, request rows, ad rows, policy, uniforms) for each day and city; `counts` [2, A] is read when the day begins."""
        for day in np.unique(self._request["day_row"][rows]):
            today = rows[self._request["day_row"][rows] == day]
            for city in np.unique(self._request["city_id"][today]):
                ads = self._ads_of_city.get(int(city), np.empty(0, np.int64))
                ads = ads[self._active_DA[day, ads]]
                mine = today[self._request["city_id"][today] == city]
                shown, clicked = (np.zeros(len(ads)), np.zeros(len(ads))) if counts is None else counts[:, ads]
                policy = BootstrapPolicy(self._ad["ad_id"][ads], self._ad["latitude"][ads], self._ad["longitude"][ads], shown, clicked, self.config.bootstrap)
                ids, slot = self._request["request_id"][mine, None], np.arange(self.config.slots)
                uniforms = np.stack([keyed.keyed_uniform(self.seed, purpose, ids, slot) for purpose in (keyed.EXPLORE, keyed.EXPLORE_WHICH)], axis=-1)
                yield int(day), int(city), mine, ads, policy, uniforms

    def write_logs(self, out: Path, progress: bool = False) -> dict[str, Any]:
        """Let the bootstrap policy answer the log days, and write the logs (but for `unlogged_days`) with their manifest.

        The policy learns overnight: each day it ranks with the impressions and clicks of the days before. Behaviours hold
        the organic visits up to the last log day (history too) and the clicks and orders on ads.
        Args: progress, a bar over days on stderr. Returns the manifest's `extra`: rows, days, CTR, bid level.
        """
        final = Path(out)
        if final.exists() and any(final.iterdir()):
            raise FileExistsError(f"{final} is not empty; logs are written into a new folder: give another one or delete it")
        out = final.with_name(f".{final.name}.part")  # renamed when complete, so that a killed run leaves no half folder
        shutil.rmtree(out, ignore_errors=True)
        logged = np.flatnonzero(self._request["day_row"] < len(self.state.log_days))
        counts = np.zeros((2, len(self._ad["ad_id"])))
        creative_counts = np.zeros((2, len(self._ad["ad_id"]) * self.config.creatives.per_ad))
        clicked_parts, organic_clicks = [], []
        shown_total = clicks_total = 0
        days = sorted(set(self._request["day_row"][logged].tolist()))
        written = [day for day in days if day >= self.config.unlogged_days]
        if not written:
            raise ValueError(f"unlogged_days {self.config.unlogged_days} leaves nothing of {len(days)} log days; give fewer")
        for day in tqdm(days, desc="simulate logs", unit="day", disable=not progress):
            today = logged[self._request["day_row"][logged] == day]
            parts, organic_parts, gained, creatives_gained = [], [], np.zeros_like(counts), np.zeros_like(creative_counts)
            for _, _, mine, ads, policy, uniforms in self._policies(today, counts):
                page = policy.rank_batch(*self._place(mine), self.state.bid_DA[day, ads], None, uniforms, self._ad["reserve"][ads])
                page_ads = np.where(page.rows >= 0, ads[page.rows], -1) if len(ads) else page.rows
                logged_page = self._logged_page(mine, page_ads, creative_counts)
                response = self._respond(mine, logged_page)
                parts.append(self._impressions(mine, logged_page, page, response, day))
                if self.config.organic.items:
                    organic_parts.append(self._organic_impressions(mine, logged_page, response))
                shown = page_ads >= 0
                for total, which in ((gained, page_ads), (creatives_gained, logged_page.creatives)):
                    np.add.at(total[0], which[shown], 1)
                    np.add.at(total[1], which[shown], response.click[shown])
            impressions = pd.concat(parts, ignore_index=True)
            counts += gained
            creative_counts += creatives_gained
            clicked_parts.append(impressions[impressions["click"] == 1])
            if organic_parts:
                results = pd.concat(organic_parts, ignore_index=True)
                organic_clicks.append(results[results["click"] == 1])
            if day < self.config.unlogged_days:
                continue
            if organic_parts:
                write_table(out, "organic", results)
            shown_total, clicks_total = shown_total + len(impressions), clicks_total + int(impressions["click"].sum())
            write_table(out, "impressions", impressions)
            write_table(out, "requests", self._requests(today, arm="none", version=BootstrapPolicy.version))
            write_table(out, "ads", self.ad_table(self.state.log_days[day]))
        write_table(out, "users", self._users())
        if self.config.creatives.per_ad > 1:
            write_table(out, "creatives", self.creative_table())
        write_table(out, "behaviours", self._behaviours(pd.concat(clicked_parts, ignore_index=True), organic_clicks))
        extra = {
            "world": self.config.kind,
            "seed": self.seed,
            "days": len(written),
            "requests": int((self._request["day_row"][logged] >= self.config.unlogged_days).sum()),
            "impressions": shown_total,
            "ctr": round(clicks_total / max(1, shown_total), 6),
            "policy": BootstrapPolicy.version,
        }
        write_manifest(out, extra)
        os.replace(out, final)
        return extra

    def ad_table(self, day: date | None = None) -> pd.DataFrame:
        """ADS rows of a UTC day: the active ads with that day's bids. Default: the first live day (or the last log day)."""
        days = [*self.state.log_days, *self.state.live_days]
        if day is None:
            day = days[min(len(self.state.log_days), len(days) - 1)]
        if day not in days:
            raise ValueError(f"{day} is not a day of this world, which has {days[0]} to {days[-1]}")
        bids = self.state.bid_DA[min(days.index(day), len(self.state.log_days))]
        active = np.isfinite(bids)
        frame = self.state.ads.loc[active].reset_index(drop=True)
        frame["event_timestamp"] = pd.Series(pd.Timestamp(day, tz="UTC"), index=frame.index).astype("datetime64[us, UTC]")
        frame["bid"] = bids[active]
        return frame[ADS.names]

    def creative_table(self) -> pd.DataFrame:
        """CREATIVES rows of all ads, from the first log day on."""
        per_ad = self.config.creatives.per_ad
        ids = self._ad["creative_id"][:, None] + np.arange(per_ad)
        frame = pd.DataFrame({"creative_id": ids.ravel(), "ad_id": np.repeat(self._ad["ad_id"], per_ad), "embedding": list(self.state.creative_embedding_MF)})
        first = self.state.log_days[self.config.unlogged_days] if self.config.unlogged_days < len(self.state.log_days) else self.state.log_days[0]
        frame["event_timestamp"] = pd.Series(pd.Timestamp(first, tz="UTC"), index=frame.index).astype("datetime64[us, UTC]")
        return frame[CREATIVES.names]

    def _logged_page(self, rows: np.ndarray, ads: np.ndarray, counts: np.ndarray | None) -> _Page:
        """The bootstrap policy's pages of ads with the creatives and the layout that it logs: explored, so that models can learn from both.

        Args: counts [2, M], impressions and clicks of every creative so far; None: none yet.
        """
        request = self._request["request_id"][rows, None]
        creatives = np.where(ads >= 0, self._ad["first_creative"][ads], -1)
        config = self.config.creatives
        if config.per_ad > 1:
            total = len(self._ad["ad_id"]) * config.per_ad
            shown, clicks = np.zeros((2, 1, total)) if counts is None else counts[:, None]
            best = best_creatives(shown, clicks, np.arange(total) // config.per_ad, len(self._ad["ad_id"]), config.prior_impressions)[0]
            explore = keyed.keyed_uniform(self.seed, keyed.CREATIVE_EXPLORE, request, self._ad["ad_id"][ads]) < config.exploration
            any_of = (keyed.keyed_uniform(self.seed, keyed.CREATIVE_WHICH, request, self._ad["ad_id"][ads]) * config.per_ad).astype(np.int64)
            creatives = np.where(ads >= 0, np.where(explore, creatives + any_of, best[ads]), -1)
        items = self.config.organic.items
        above = organic.alternating(*ads.shape, items)
        if items:
            uniforms = keyed.keyed_uniform(self.seed, keyed.LAYOUT, request, np.arange(ads.shape[1] + items))
            explore = keyed.keyed_uniform(self.seed, keyed.LAYOUT_EXPLORE, request) < self.config.organic.exploration
            above = np.where(explore, organic.drawn(uniforms, ads.shape[1]), above)
        return _Page(ads, creatives, above)

    def _organic_impressions(self, rows: np.ndarray, page: _Page, response: UserResponse) -> pd.DataFrame:
        """ORGANIC rows of pages, with when a click came."""
        poi = self._organic_rows(rows)
        request, rank = np.nonzero(poi >= 0)
        places = organic.positions(np.where(page.ads >= 0, page.above, poi.shape[1]), poi.shape[1])[1]  # ads that are not there stand above nothing
        time = self.state.requests["event_timestamp"].iloc[rows[request]].reset_index(drop=True)
        shown = poi[request, rank]
        frame = {
            "request_id": self._request["request_id"][rows[request]],
            "rank": (rank + 1).astype(np.int32),
            "position": places[request, rank].astype(np.int32),
            "event_timestamp": time,
            "user_id": self._user["user_id"][self._request["user_row"][rows[request]]],
            "click": response.organic_click[request, rank].astype(np.int32),
            "session_id": self._request["session_id"][rows[request]],
        }
        end_us = (time.dt.floor("D") + pd.Timedelta(days=1)).astype("int64").to_numpy()
        frame["click_timestamp"] = _timestamps(_later(time.astype("int64").to_numpy(), response.organic_click_delay_seconds[request, rank], end_us))
        return pd.DataFrame(frame | {name: self._poi[name][shown] for name in ("poi_id", "category_id", "latitude", "longitude")})

    def live_requests(self) -> pd.DataFrame:
        """REQUESTS of the live days, in time order; arm and model_version 'none' until somebody answers them."""
        return self._requests(np.flatnonzero(self._request["day_row"] >= len(self.state.log_days)), arm="none", version="none")

    def live_behaviours(self) -> pd.DataFrame:
        """BEHAVIOURS of the live days: organic visits only, in time order."""
        visits = self.state.visits
        return self._visit_behaviours(np.flatnonzero(visits["event_timestamp"] >= self._end_of_logs()))

    def _end_of_logs(self) -> pd.Timestamp:
        return pd.Timestamp(self.state.log_days[-1], tz="UTC") + pd.Timedelta(days=1)

    def _requests(self, rows: np.ndarray, arm: str, version: str) -> pd.DataFrame:
        frame = self.state.requests.iloc[rows].reset_index(drop=True)
        frame["user_id"] = self._user["user_id"][frame["user_row"]]
        frame["slots"], frame["arm"], frame["model_version"] = np.int32(self.config.slots), arm, version
        return frame[REQUESTS.names]

    def _users(self) -> pd.DataFrame:
        frame = self.state.users.copy()
        frame["event_timestamp"] = pd.Series(pd.Timestamp(self.state.log_days[0], tz="UTC"), index=frame.index).astype("datetime64[us, UTC]")
        return frame[USERS.names]

    def _impressions(self, rows: np.ndarray, logged: _Page, page: Any, response: UserResponse, day: int) -> pd.DataFrame:
        shown = logged.ads >= 0
        request, slot = np.nonzero(shown)
        ads, rows = logged.ads[shown], rows[request]
        time = self.state.requests["event_timestamp"].iloc[rows].reset_index(drop=True)
        click, purchase = response.click[shown], response.purchase[shown]
        end_us = (pd.Timestamp(self.state.log_days[day], tz="UTC") + pd.Timedelta(days=1)).value // 1000
        time_us = time.astype("int64").to_numpy()
        click_us = _later(time_us, response.click_delay_seconds[shown], end_us)
        order_us = _later(click_us, response.purchase_delay_seconds[shown], end_us)
        return pd.DataFrame(
            {
                "request_id": self._request["request_id"][rows],
                "slot": (slot + 1).astype(np.int32),
                "event_timestamp": time,
                "user_id": self._user["user_id"][self._request["user_row"][rows]],
                "ad_id": self._ad["ad_id"][ads],
                "creative_id": self._ad["creative_id"][ads] + logged.creatives[shown] - self._ad["first_creative"][ads],
                "bid": self.state.bid_DA[day, ads],
                "payment": page.price[shown],
                "pctr": page.pctr[shown].astype(np.float32),
                "propensity": page.propensity[shown].astype(np.float32),
                "click": click.astype(np.int32),
                "click_timestamp": _timestamps(click_us).where(click),
                "purchase": purchase.astype(np.int32),
                "order_value": response.order_value[shown],
                "creative_click": response.creative_click[shown].astype(np.int32),
                "order_timestamp": _timestamps(order_us).where(purchase),
                "session_id": self._request["session_id"][rows],
            }
        )

    def _behaviours(self, clicked: pd.DataFrame, organic_clicks: list[pd.DataFrame]) -> pd.DataFrame:
        """Organic visits up to the end of the logs, and a behaviour for every click on an ad or organic result and every order."""
        visits = self._visit_behaviours(np.flatnonzero(self.state.visits["event_timestamp"] < self._end_of_logs()))
        bought = clicked[clicked["purchase"] == 1]
        parts = [visits]
        for action, source, time in ((ACTION_CLICK, clicked, "click_timestamp"), (ACTION_PURCHASE, bought, "order_timestamp")):
            ads = self.ad_rows(source["ad_id"])
            number = (source["request_id"].to_numpy() - self._request["request_id"][0]) * 100 + source["slot"].to_numpy()
            parts.append(
                pd.DataFrame(
                    {
                        "behaviour_id": AD_BEHAVIOUR_ID_BASE + 2 * number + (action == ACTION_PURCHASE),
                        "event_timestamp": source[time].to_numpy(),
                        "user_id": source["user_id"].to_numpy(),
                        "session_id": source["session_id"].to_numpy(),
                        "poi_id": self._ad["poi_id"][ads],
                        "category_id": self._ad["category_id"][ads],
                        "action": np.full(len(source), action, np.int32),
                        "latitude": self._ad["latitude"][ads],
                        "longitude": self._ad["longitude"][ads],
                        "creative_id": source["creative_id"].to_numpy(),
                    }
                ).assign(event_timestamp=source[time].reset_index(drop=True))
            )
        if organic_clicks:
            found = pd.concat(organic_clicks, ignore_index=True)
            number = (found["request_id"] - self._request["request_id"][0]) * 100 + found["rank"]
            parts.append(found.assign(behaviour_id=ORGANIC_BEHAVIOUR_ID_BASE + number, event_timestamp=found["click_timestamp"], action=np.int32(ACTION_CLICK), creative_id=0))
        return pd.concat([part[BEHAVIOURS.names] for part in parts if len(part)], ignore_index=True)

    def _visit_behaviours(self, rows: np.ndarray) -> pd.DataFrame:
        visits = self.state.visits.iloc[rows]
        poi = visits["poi_row"].to_numpy()
        return pd.DataFrame(
            {
                "behaviour_id": 1 + rows.astype(np.int64),
                "event_timestamp": visits["event_timestamp"].reset_index(drop=True),
                "user_id": self._user["user_id"][visits["user_row"].to_numpy()],
                "session_id": visits["session_id"].to_numpy(np.int64),
                "poi_id": self._poi["poi_id"][poi],
                "category_id": self._poi["category_id"][poi],
                "action": np.full(len(rows), ACTION_VISIT, np.int32),
                "latitude": self._poi["latitude"][poi],
                "longitude": self._poi["longitude"][poi],
                "creative_id": np.zeros(len(rows), np.int64),
            }
        )

    # ---- users answer

    def respond(self, request_row: Any, page_ad_ids: Any, creative_ids: Any = None, above: Any = None) -> UserResponse:
        """What the user of one request does with a page of ad ids [K'], top slot first; creatives and layout as in `page_truth`.

        Args: request_row, anything with `request_id` (a row of `live_requests()`, a named tuple, a mapping).
        The draw depends on (seed, request, ad) only: two policies that show the same page get the same answer, and an ad
        that both show meets the same luck.
        """
        request_id = request_row["request_id"] if hasattr(request_row, "__getitem__") and not isinstance(request_row, tuple) else request_row.request_id
        ads = np.asarray(page_ad_ids, np.int64).reshape(1, -1)
        if len(np.unique(ads)) != ads.size:
            raise ValueError(f"page of request {request_id} shows an ad twice: {list(page_ad_ids)}")
        creative_ids, above = (None if values is None else np.asarray(values, np.int64).reshape(1, -1) for values in (creative_ids, above))
        return UserResponse(*(values[0] for values in self.respond_pages([request_id], ads, creative_ids, above)))

    def respond_pages(self, request_ids: Any, ad_ids: np.ndarray, creative_ids: np.ndarray | None = None, above: np.ndarray | None = None) -> UserResponse:
        """`respond` for R pages [R, K] of ad ids at once; -1 pads."""
        return self._respond(self.request_rows(request_ids), self._page(ad_ids, creative_ids, above))

    def _respond(self, rows: np.ndarray, page: _Page) -> UserResponse:
        ads = page.ads
        request, ad = self._request["request_id"][rows, None], self._ad["ad_id"][ads]

        def uniform(purpose: int) -> np.ndarray:
            return keyed.keyed_uniform(self.seed, purpose, request, ad)

        p, c = self._page_truth(rows, ads, page.creatives)
        goes_on = (uniform(keyed.CONTINUE) < c).astype(np.float64)
        reads = reading_probability(goes_on) > 0.5
        on_organic = np.zeros((len(rows), 0), bool), np.zeros((len(rows), 0))
        if self.config.organic.items:
            on_organic, past_organic = self._respond_organic(rows, page, goes_on)
            reads &= past_organic
        click = reads & (uniform(keyed.CLICK) < p) & (ads >= 0)
        delay = np.maximum(2.0, np.exp(2.7 + 0.7 * ndtri(np.maximum(uniform(keyed.CLICK_DELAY), 1e-12))))
        poi = self._ad["poi_row"][ads]
        rate = self.config.clicks.purchase_rate
        buys = sigmoid(np.log(rate / (1 - rate)) + 0.5 * self._poi["quality"][poi])
        purchase = click & (uniform(keyed.PURCHASE) < buys)
        wait = np.maximum(30.0, np.exp(5.5 + 0.8 * ndtri(np.maximum(uniform(keyed.PURCHASE_DELAY), 1e-12))))
        worth = 8.0 * np.maximum(self._poi["price_band"][poi], 1) * np.exp(0.4 * ndtri(np.maximum(uniform(keyed.ORDER_VALUE), 1e-12)))
        opens = np.zeros(ads.shape, bool)
        creatives = self.config.creatives
        if creatives.per_ad > 1:
            agrees = self._creative_affinity(rows[:, None], np.maximum(page.creatives, 0)) + self.state.creative_appeal_M[np.maximum(page.creatives, 0)]
            chance = sigmoid(np.log(creatives.open_rate / (1 - creatives.open_rate)) + agrees)
            opens = reads & (ads >= 0) & (keyed.keyed_uniform(self.seed, keyed.CREATIVE_CLICK, request, page.creatives) < chance)
        return UserResponse(click, np.where(click, delay, np.nan), purchase, np.where(purchase, wait, np.nan), np.where(purchase, worth.round(2), 0.0), opens, *on_organic)

    def _respond_organic(self, rows: np.ndarray, page: _Page, goes_on: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Clicks on organic items with their delays [R, O], and whether the user got past those above each ad [R, K]. Args: goes_on [R, K], 1 where the user reads past an ad."""
        request, poi = self._request["request_id"][rows, None], self._organic_rows(rows)
        p, c = self._organic_truth(rows)
        stays = (keyed.keyed_uniform(self.seed, keyed.ORGANIC_CONTINUE, request, poi) < c).astype(np.float64)
        past_organic, past_ads = organic.reach(goes_on, stays, page.above)
        reads = (reading_probability(stays) * past_ads) > 0.5
        click = reads & (poi >= 0) & (keyed.keyed_uniform(self.seed, keyed.ORGANIC_CLICK, request, poi) < p)
        delay = np.maximum(2.0, np.exp(2.7 + 0.7 * ndtri(np.maximum(keyed.keyed_uniform(self.seed, keyed.ORGANIC_DELAY, request, poi), 1e-12))))
        return (click, np.where(click, delay, np.nan)), past_organic > 0.5


def _timestamps(microseconds: np.ndarray) -> pd.Series:
    return pd.Series(microseconds.astype("datetime64[us]")).dt.tz_localize("UTC")


def _later(time_us: np.ndarray, delay_seconds: np.ndarray, end_us: int) -> np.ndarray:
    """Microseconds of an event after a delay (NaN as 0), kept before the end of the day and in order: at most half of what is left of it."""
    delay_us = (np.nan_to_num(delay_seconds) * 1e6).astype(np.int64)
    return time_us + np.minimum(delay_us, (end_us - time_us) // 2)


def _rows_of(sorted_ids: np.ndarray, wanted: np.ndarray, what: str) -> np.ndarray:
    rows = np.searchsorted(sorted_ids, wanted).clip(max=len(sorted_ids) - 1)
    unknown = sorted_ids[rows] != wanted
    if unknown.any():
        raise ValueError(f"{what} {wanted[unknown].ravel()[0]} is not of this world ({int(unknown.sum())} unknown); its ids run from {sorted_ids[0]} to {sorted_ids[-1]}")
    return rows
