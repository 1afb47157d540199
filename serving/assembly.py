"""Puts the service together from its settings: catalogue, features, policies, event log."""

from __future__ import annotations

from typing import Any

from features.store import check_store, load_catalogue, open_store, read_snapshot, read_user
from model.bundle import signing_key
from serving.catalogue import split_by_city
from serving.event_log import EventLog
from serving.pacing import read_budgets
from serving.policies import Bootstrap, Model, Policy
from serving.ranking import Ranking
from serving.settings import ServingConfig
from serving.store import approved, newest_approved
from serving.users import UserReader


def assemble(config: ServingConfig) -> Ranking:
    """A Ranking over the real stores of `config.home`; not warm yet. Raises where a model is not approved or a store is missing."""
    kinds = {arm.policy for arm in config.arms}
    policies: dict[str, Policy] = {"bootstrap": Bootstrap(config.bootstrap_epsilon, config.seed, config.currency_step)}
    users: UserReader[Any] = UserReader(lambda user_id: None, config.feature_deadline_ms / 1e3)
    if "model" in kinds:
        length = int(read_snapshot(config.home)["behaviours"])
        policies["model"] = _model(config, length)
        store = open_store(config.home)
        store.config.registry.cache_ttl_seconds = 0  # definitions change with a deployment; re-reading them every 2 s costs a request 10 to 50 ms
        check_store(store)
        read_user(store, 0, length)  # the first read opens connections and caches; it may take longer than the deadline
        users = UserReader(lambda user_id: read_user(store, user_id, length), config.feature_deadline_ms / 1e3)
    cities = split_by_city(load_catalogue(config.home))
    budgets = read_budgets(config.budgets) if config.budgets else {}
    return Ranking(config, cities, policies, users, EventLog(config.event_log, config.events_synchronous, budgets))


def _model(config: ServingConfig, behaviours: int) -> Model:
    key = signing_key(config.key_home)
    entry = approved(config.home, config.model_tag, key) if config.model_tag else newest_approved(config.home, key)
    default = entry.price_mode if config.price_mode == "auto" else config.price_mode
    return Model(entry.folder, key, default, entry.price_mode == "learned", behaviours, config.torch_threads, config.currency_step, config.quality_floor)
