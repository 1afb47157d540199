"""Worlds: hidden truth that writes logs, sends live traffic, answers pages and scores them.

A world knows everything; what leaves it is a folder of logs in the schema, requests, and the answers of users. The same
request meets the same user with the same luck under every policy: draws are keyed by (seed, request, ad, purpose).

Shapes: R requests, N ads asked about, A ads of a city, K slots, S substitutes.
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

from marketplace import checkins, keyed, synthetic
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
from marketplace.logs import write_bytes, write_manifest, write_table
from marketplace.schema import ACTION_CLICK, ACTION_PURCHASE, ACTION_VISIT, ADS, BEHAVIOURS, REQUESTS, USERS
from marketplace.state import WorldState, planar_km
from marketplace.synthetic import SyntheticConfig

AD_BEHAVIOUR_ID_BASE = 10**15
"""Behaviours on ads have ids from here on; organic visits lie below."""

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
    """What the user did with a page; all [K'] (or [R, K] for many pages)."""

    click: np.ndarray
    click_delay_seconds: np.ndarray
    """Seconds from the page to the click; NaN without one."""
    purchase: np.ndarray
    purchase_delay_seconds: np.ndarray
    """Seconds from the click to the order; NaN without one."""
    order_value: np.ndarray
    """Currency; 0 without an order."""


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
        """p, c and values for requests of this world (by their request_id) and ads of this world.

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
                p[np.ix_(part, columns)] = attraction(utility[:, local], pressure, self.base, self.config.clicks)
                c[np.ix_(part, columns)] = self._continuation(rows[part, None], members[None, local])
        return Truth(p, c, self._ad["value"][ads])

    def page_truth(self, request_ids: Any, ad_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p and c [R, K] of pages [R, K] of ad ids; -1 pads and has p 0, c 1. Under the stress model p is as on this page."""
        ad_ids = np.asarray(ad_ids, np.int64)
        shown = ad_ids >= 0
        ads = np.zeros(ad_ids.shape, np.int64)
        ads[shown] = self.ad_rows(ad_ids[shown])
        return self._page_truth(self.request_rows(request_ids), np.where(shown, ads, -1))

    def _page_truth(self, rows: np.ndarray, ads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, c = np.zeros(ads.shape), np.ones(ads.shape)
        step = max(1, _CELLS_AT_ONCE // (max(1, ads.shape[1]) * (1 + self._weight_AS.shape[1])))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            shown = ads[part] >= 0
            utility, pressure = self._page_utility(rows[part], np.maximum(ads[part], 0))
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
        """The user's utility for ads in logits, by rows of requests and ads that broadcast against each other."""
        weights, state = self.config.clicks, self.state
        user, poi, category = self._request["user_row"][rows], self._ad["poi_row"][ads], self._ad["category_id"][ads]
        utility = weights.taste * state.taste_UC[user, category].astype(np.float64)
        utility += weights.hour * state.hour_affinity_C24[category, self._request["local_hour"][rows]]
        utility += weights.quality * self._poi["quality"][poi] + self._ad["appeal"][ads]
        utility -= weights.price * self._user["price_sensitivity"][user] * (self._ad["price_band"][ads] - 2.5)
        km = planar_km(self._request["latitude"][rows], self._request["longitude"][rows], self._ad["latitude"][ads], self._ad["longitude"][ads])
        utility -= weights.distance * self._user["distance_sensitivity"][user] * np.log1p(km)
        utility += weights.habit * self._habit(user, poi)
        intent = self._request["intent_poi_row"][rows]
        wanted = np.maximum(intent, 0)
        apart = planar_km(self._poi["latitude"][wanted], self._poi["longitude"][wanted], self._ad["latitude"][ads], self._ad["longitude"][ads])
        same_category = (intent >= 0) & (self._poi["category_id"][wanted] == category)
        utility += np.where(same_category, weights.intent_category * np.exp(-0.5 * apart), 0.0)
        utility += weights.intent_place * (intent == poi)
        if weights.day_drift:
            utility += state.drift_DA[self._request["day_row"][rows], ads]
        return utility

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
                seen.append((*self._page_utility(mine, page), self._continuation(mine[:, None], page)))
                if counts is not None and base is not None:
                    utility, pressure, reading = seen[-1]
                    clicks = page_click_probability(attraction(utility, pressure, base, self.config.clicks), reading)
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
        clicked_parts = []
        shown_total = clicks_total = 0
        days = sorted(set(self._request["day_row"][logged].tolist()))
        written = [day for day in days if day >= self.config.unlogged_days]
        if not written:
            raise ValueError(f"unlogged_days {self.config.unlogged_days} leaves nothing of {len(days)} log days; give fewer")
        for day in tqdm(days, desc="simulate logs", unit="day", disable=not progress):
            today = logged[self._request["day_row"][logged] == day]
            parts, gained = [], np.zeros_like(counts)
            for _, _, mine, ads, policy, uniforms in self._policies(today, counts):
                page = policy.rank_batch(*self._place(mine), self.state.bid_DA[day, ads], None, uniforms, self._ad["reserve"][ads])
                page_ads = np.where(page.rows >= 0, ads[page.rows], -1) if len(ads) else page.rows
                response = self._respond(mine, page_ads)
                parts.append(self._impressions(mine, page_ads, page, response, day))
                np.add.at(gained[0], page_ads[page_ads >= 0], 1)
                np.add.at(gained[1], page_ads[page_ads >= 0], response.click[page_ads >= 0])
            impressions = pd.concat(parts, ignore_index=True)
            counts += gained
            clicked_parts.append(impressions[impressions["click"] == 1])
            if day < self.config.unlogged_days:
                continue
            shown_total, clicks_total = shown_total + len(impressions), clicks_total + int(impressions["click"].sum())
            write_table(out, "impressions", impressions)
            write_table(out, "requests", self._requests(today, arm="none", version=BootstrapPolicy.version))
            write_table(out, "ads", self.ad_table(self.state.log_days[day]))
        write_table(out, "users", self._users())
        write_table(out, "behaviours", self._behaviours(pd.concat(clicked_parts, ignore_index=True)))
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

    def _impressions(self, rows: np.ndarray, page_ads: np.ndarray, page: Any, response: UserResponse, day: int) -> pd.DataFrame:
        shown = page_ads >= 0
        request, slot = np.nonzero(shown)
        ads, rows = page_ads[shown], rows[request]
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
                "creative_id": self._ad["creative_id"][ads],
                "bid": self.state.bid_DA[day, ads],
                "payment": page.price[shown],
                "pctr": page.pctr[shown].astype(np.float32),
                "propensity": page.propensity[shown].astype(np.float32),
                "click": click.astype(np.int32),
                "click_timestamp": _timestamps(click_us).where(click),
                "purchase": purchase.astype(np.int32),
                "order_value": response.order_value[shown],
                "order_timestamp": _timestamps(order_us).where(purchase),
                "session_id": self._request["session_id"][rows],
            }
        )

    def _behaviours(self, clicked: pd.DataFrame) -> pd.DataFrame:
        """Organic visits up to the end of the logs, and a behaviour for every click on an ad and every order."""
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
                    }
                ).assign(event_timestamp=source[time].reset_index(drop=True))
            )
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
            }
        )

    # ---- users answer

    def respond(self, request_row: Any, page_ad_ids: Any) -> UserResponse:
        """What the user of one request does with a page of ad ids [K'], top slot first.

        Args: request_row, anything with `request_id` (a row of `live_requests()`, a named tuple, a mapping).
        The draw depends on (seed, request, ad) only: two policies that show the same page get the same answer, and an ad
        that both show meets the same luck.
        """
        request_id = request_row["request_id"] if hasattr(request_row, "__getitem__") and not isinstance(request_row, tuple) else request_row.request_id
        ads = self.ad_rows(np.asarray(page_ad_ids, np.int64).reshape(-1))
        if len(np.unique(ads)) != len(ads):
            raise ValueError(f"page of request {request_id} shows an ad twice: {list(page_ad_ids)}")
        return UserResponse(*(values[0] for values in self._respond(self.request_rows([request_id]), ads[None, :])))

    def respond_pages(self, request_ids: Any, ad_ids: np.ndarray) -> UserResponse:
        """`respond` for R pages [R, K] of ad ids at once; -1 pads."""
        ad_ids = np.asarray(ad_ids, np.int64)
        shown = ad_ids >= 0
        ads = np.full(ad_ids.shape, -1, np.int64)
        ads[shown] = self.ad_rows(ad_ids[shown])
        return self._respond(self.request_rows(request_ids), ads)

    def _respond(self, rows: np.ndarray, ads: np.ndarray) -> UserResponse:
        request, ad = self._request["request_id"][rows, None], self._ad["ad_id"][ads]

        def uniform(purpose: int) -> np.ndarray:
            return keyed.keyed_uniform(self.seed, purpose, request, ad)

        p, c = self._page_truth(rows, ads)
        reads = reading_probability((uniform(keyed.CONTINUE) < c).astype(np.float64)) > 0.5
        click = reads & (uniform(keyed.CLICK) < p) & (ads >= 0)
        delay = np.maximum(2.0, np.exp(2.7 + 0.7 * ndtri(np.maximum(uniform(keyed.CLICK_DELAY), 1e-12))))
        poi = self._ad["poi_row"][ads]
        rate = self.config.clicks.purchase_rate
        buys = sigmoid(np.log(rate / (1 - rate)) + 0.5 * self._poi["quality"][poi])
        purchase = click & (uniform(keyed.PURCHASE) < buys)
        wait = np.maximum(30.0, np.exp(5.5 + 0.8 * ndtri(np.maximum(uniform(keyed.PURCHASE_DELAY), 1e-12))))
        worth = 8.0 * np.maximum(self._poi["price_band"][poi], 1) * np.exp(0.4 * ndtri(np.maximum(uniform(keyed.ORDER_VALUE), 1e-12)))
        return UserResponse(click, np.where(click, delay, np.nan), purchase, np.where(purchase, wait, np.nan), np.where(purchase, worth.round(2), 0.0))


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
