"""The models in their places, and how another one takes a place while requests go on.

A change verifies the entry (signatures, hashes, finite weights), prepares every city and asks golden requests, all on one background
thread of low priority; then the decision is signed and written, then one assignment makes it live. Whatever fails before that leaves
the old model live. The old model is freed when the last request that began with it ends.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from model.bundle import BundleError
from serving import metrics
from serving.policies import Bootstrap, Policy
from serving.ranking import Live, Ranking
from serving.settings import ServingConfig
from serving.store import (
    ARM,
    LIVE,
    NO_MODEL,
    SHADOW,
    ApprovalError,
    Approved,
    all_approved,
    approved,
    decide,
    live_model,
    places,
    previous_tag,
)

logger = logging.getLogger("ega.serving")

_NICENESS = 10
"""Of the thread that loads and warms up: the ones that answer go first."""


class Refused(ValueError):
    """A change that was not made; the old model is live. The text says why."""


class Busy(RuntimeError):
    """Another change is under way."""


class LiveModels:
    """Loads, checks and swaps the models of a Ranking; one change at a time."""

    def __init__(self, config: ServingConfig, key: bytes, ranking: Ranking, load: Callable[[Approved], Policy], loaded: dict[str, Policy]) -> None:
        """`loaded`: the policies of `placed(config, key)`, by place; they become live at once, `ranking.warm_up` checks them."""
        self._config, self._key, self._ranking, self._load = config, key, ranking, load
        self.tell: Callable[[bool], None] = lambda under_way: None
        """Called when a change begins and when it is over: requests are slower between the two."""
        self._bootstrap = Bootstrap(config.bootstrap_epsilon, config.seed, config.currency_step)
        self._places = dict(loaded)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="models", initializer=lambda: os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS))
        self._changing = threading.Lock()
        self._shown: set[tuple[str, str]] = set()
        self._install()

    def _install(self) -> None:
        arms = {
            arm.name: (self._places.get(ARM + arm.name) or self._places[LIVE]) if arm.policy == "model" else self._bootstrap for arm in self._config.arms
        }
        shadow = self._places.get(SHADOW)
        self._ranking.install(Live(arms, shadow))
        live = {(arm, policy.version) for arm, policy in arms.items()} | ({(SHADOW, shadow.version)} if shadow else set())
        for place, version in self._shown | live:  # over several processes a label cannot be taken back, only set to 0
            metrics.MODEL_LIVE.labels(place=place, model_version=version).set(int((place, version) in live))
        self._shown |= live

    def models(self) -> list[dict[str, Any]]:
        """Every approved entry, newest first: tag, version, approval, gates, places; `error` for one that must not be served."""
        return describe(self._config, self._key, {place: policy.version for place, policy in self._places.items()})

    def activate(self, tag: str, place: str = LIVE) -> dict[str, Any]:
        """Make a model live in a place; NO_MODEL clears one of its own. Returns what changed, with `seconds`. Raises Refused, Busy."""
        return self._change(place, lambda: tag, rollback=False)

    def rollback(self, place: str = LIVE) -> dict[str, Any]:
        """Back to the model before: a new signed decision. Raises Refused, Busy."""
        return self._change(place, lambda: previous_tag(self._config.home, self._key, place), rollback=True)

    def close(self) -> None:
        self._worker.shutdown()

    def _change(self, place: str, target: Callable[[], str], rollback: bool) -> dict[str, Any]:
        if not self._changing.acquire(blocking=False):
            raise Busy("another change of models is under way; try again when it is done")
        self.tell(True)
        try:
            done = self._worker.submit(self._make, place, target, rollback).result()
            metrics.MODEL_SWAPS.labels(outcome="activated").inc()
            logger.info("place %s: model %s is live after %.2f s (decision %d)", place, done["tag"] or "none", done["seconds"], done["sequence"])
            return done
        except (ApprovalError, BundleError, RuntimeError, OSError) as error:
            metrics.MODEL_SWAPS.labels(outcome="refused").inc()
            logger.error("place %s: change refused, the old model stays: %s", place, error)
            raise Refused(str(error)) from error
        finally:
            self.tell(False)
            self._changing.release()

    def _make(self, place: str, target: Callable[[], str], rollback: bool) -> dict[str, Any]:
        started = time.perf_counter()
        if place not in places(self._config):
            raise ApprovalError(f"refused: no place {place!r}; there are {', '.join(places(self._config))}")
        if place == LIVE and self._config.model_tag:
            raise ApprovalError("refused: the settings pin model_tag; take it out to choose models while the service runs")
        tag = target()
        changed = {name: policy for name, policy in self._places.items() if name != place}
        if tag != NO_MODEL:
            changed[place] = self._checked(approved(self._config.home, tag, self._key))
        elif place.startswith(ARM) and LIVE not in changed:
            changed[LIVE] = self._checked(live_model(self._config.home, self._key))
        decision = decide(self._config.home, self._key, tag, place, rollback)
        self._places = changed
        self._install()
        return {"place": place, "tag": tag, "sequence": decision.sequence, "seconds": round(time.perf_counter() - started, 3)}

    def _checked(self, entry: Approved) -> Policy:
        """The policy of a verified entry, warm and lawful; one that is live elsewhere is shared."""
        policy = next((policy for policy in self._places.values() if policy.version == entry.version), None)
        if policy is None:
            policy = self._load(entry)
            self._ranking.check(policy)
        return policy


def describe(config: ServingConfig, key: bytes, live: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of `LiveModels.models`. `live`: version by place, as it is served or, without a service, as decided."""
    rows: list[dict[str, Any]] = []
    for entry in all_approved(config.home, key):
        if isinstance(entry, ApprovalError):
            rows.append({"error": str(entry)})
        else:
            mine = [place for place, version in live.items() if version == entry.version]
            gates = {name: gate.get("reason", "") for name, gate in entry.gates["gates"].items()}
            rows.append({"tag": entry.tag, "approved_at": entry.approved_at, "sequence": entry.sequence, "price_mode": entry.price_mode, "places": mine, "gates": gates})
    return rows
