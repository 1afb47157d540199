"""Puts the service together from its settings: catalogue, features, policies, event log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from features.store import UserFeatures, check_store, load_catalogue, load_creatives, open_store, push_behaviours, read_snapshot, read_user, source_path
from model.bundle import signing_key
from serving.catalogue import CityAds, Feed, split_by_city
from serving.event_log import EventLog
from serving.live import LiveModels
from serving.pacing import read_budgets
from serving.policies import Bootstrap, Policy, load_model
from serving.pushes import Pusher
from serving.ranking import Ranking
from serving.settings import ServingConfig
from serving.store import ARM, LIVE, Approved, placed
from serving.users import Breaker, UserReader

if TYPE_CHECKING:
    from feast import FeatureStore

logger = logging.getLogger("ega.serving")

ResultT = TypeVar("ResultT")

_PUSH_PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class Assembled:
    """A service without its HTTP side."""

    ranking: Ranking
    models: LiveModels | None
    """None where no arm serves a model."""
    feed: Feed
    """Keeps ads and bids those of the catalogue; started once the service is warm."""

    def close(self) -> None:
        self.feed.close()
        if self.models is not None:
            self.models.close()
        self.ranking.close()


def assemble(config: ServingConfig) -> Assembled:
    """The Ranking over the real stores of `config.home`; not warm yet. Raises where a model is not approved or features were never built.

    A feature store that is damaged or down is no reason not to start: pages are degraded until it answers.
    """
    bootstrap = Bootstrap(config.bootstrap_epsilon, config.seed, config.currency_step)
    budgets = read_budgets(config.budgets) if config.budgets else {}
    if not any(arm.policy == "model" for arm in config.arms):
        cities = load_cities(config.home)
        log = EventLog(config.event_log, config.events_synchronous, budgets)
        ranking = Ranking(config, cities, {"bootstrap": bootstrap}, UserReader(lambda user_id: None, 1.0), log)
        return Assembled(ranking, None, catalogue_feed(config, ranking))
    key = signing_key(config.key_home)
    length = int(read_snapshot(config.home)["behaviours"])
    cities = load_cities(config.home)

    def load(entry: Approved) -> Policy:
        default = entry.price_mode if config.price_mode == "auto" else config.price_mode
        return load_model(entry.folder, key, default, entry.price_mode == "learned", length, config.torch_threads, config.currency_step, config.quality_floor, config.device, config.dtype)

    by_version: dict[str, Policy] = {}
    loaded: dict[str, Policy] = {}
    for place, entry in placed(config, key).items():
        if entry.version not in by_version:
            by_version[entry.version] = load(entry)
        loaded[place] = by_version[entry.version]
    log = EventLog(config.event_log, config.events_synchronous, budgets)
    pusher = Pusher(log, _pushing(config.home, length)) if config.push_events else None
    any_model = loaded.get(LIVE) or next(policy for place, policy in loaded.items() if place.startswith(ARM))
    ranking = Ranking(config, cities, {"bootstrap": bootstrap, "model": any_model}, _reading(config, length), log, pusher=pusher)
    return Assembled(ranking, LiveModels(config, key, ranking, load, loaded), catalogue_feed(config, ranking))


def load_cities(home: Path) -> dict[int, CityAds]:
    """Snapshots of the home's catalogue with the creatives of its ads."""
    return split_by_city(load_catalogue(home), load_creatives(home))


def catalogue_feed(config: ServingConfig, ranking: Ranking) -> Feed:
    """What renews the snapshots of a Ranking when the `ad_catalog` view changes; not started yet."""
    return Feed(source_path(config.home, "ad_catalog"), lambda: load_cities(config.home), ranking.renew, config.catalogue_seconds)


class _Store:
    """A feature store that is opened on its first use and again after a failure: what was damaged or down may be mended by then."""

    def __init__(self, home: Path, patience_seconds: float) -> None:
        self._home, self._patience = home, patience_seconds
        self._store: FeatureStore | None = None

    def __call__(self, use: Callable[[FeatureStore], ResultT]) -> ResultT:
        try:
            if self._store is None:
                store = open_store(self._home, self._patience)
                store.config.registry.cache_ttl_seconds = 0  # definitions change with a deployment; re-reading them every 2 s costs a request 10 to 50 ms
                check_store(store)
                self._store = store
            return use(self._store)
        except Exception:
            self._store = None
            raise


def _reading(config: ServingConfig, length: int) -> UserReader[UserFeatures]:
    deadline = config.feature_deadline_ms / 1e3
    store = _Store(config.home, deadline)

    def read(user_id: int) -> UserFeatures | None:
        return store(lambda opened: read_user(opened, user_id, length))

    try:
        read(0)  # the first read opens connections and caches; it may take longer than the deadline
    except Exception as error:
        logger.error("the feature store cannot be read, pages are degraded until it can: %s: %s", type(error).__name__, error)
    breaker = Breaker(config.feature_failures, config.feature_cooldown_seconds)
    return UserReader(read, deadline, breaker, config.feature_cache_users, config.feature_cache_seconds)


def _pushing(home: Path, length: int) -> Callable[[pd.DataFrame], Any]:
    store = _Store(home, _PUSH_PATIENCE_SECONDS)
    return lambda behaviours: store(lambda opened: push_behaviours(opened, behaviours, length))
