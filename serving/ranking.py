"""What happens to a request, from parsed body to stored answer: no HTTP and no framework in here."""

from __future__ import annotations

import hashlib
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from marketplace import organic
from serving import metrics
from serving.assignment import assign_arm
from serving.catalogue import CityAds
from serving.errors import Refusal
from serving.event_log import DuplicateRequest, EventLog, EventRecord, PageRecord, StoredAnswer
from serving.invariants import PAGE_LAWS, PricedPage, broken_invariant, broken_layout, gsp_of_page
from serving.messages import EventsRequest, EventsResponse, RankedAd, RankRequest, RankResponse, RejectedEvent
from serving.pacing import Pacer
from serving.policies import Bootstrap, Organic, Policy, Query
from serving.pushes import Pusher
from serving.settings import ServingConfig
from serving.users import UserReader

logger = logging.getLogger("ega.serving")

PAGE_FALLBACK, PRICE_FALLBACK = "page_fallback_bootstrap", "price_fallback_gsp"
"""Reasons in `degraded`: an auction invariant failed, so the page (or only its prices) was replaced. Alarm at 1."""

_ID_BITS = 53
"""Fresh request ids stay exact in clients whose numbers are doubles."""


@contextmanager
def _stage(name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        metrics.STAGE_SECONDS.labels(stage=name).observe(time.perf_counter() - start)


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Live:
    """Who answers now; immutable and replaced whole. A request keeps the one that it began with, so a policy lives until its last request ends."""

    arms: Mapping[str, Policy]
    shadow: Policy | None = None

    def policies(self) -> list[Policy]:
        """Each once."""
        return list({id(policy): policy for policy in (*self.arms.values(), self.shadow) if policy is not None}.values())


class Ranking:
    """Ranks pages and takes events. Safe to call from several threads; what it holds is read-only but the event log and who is live."""

    def __init__(
        self,
        config: ServingConfig,
        cities: Mapping[int, CityAds],
        policies: Mapping[str, Policy],
        users: UserReader[Any],
        log: EventLog,
        clock: Callable[[], datetime] = utc_now,
        pusher: Pusher | None = None,
    ) -> None:
        """`policies` by name in Arm.policy ('model', 'bootstrap'), see also `install`; the pages that replace broken ones come from an own
        bootstrap policy."""
        self._config = config
        self._cities = cities
        self._live = Live({arm.name: policies[arm.policy] for arm in config.arms})
        self._pusher = pusher
        self._shadow_pool = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._shadow_busy = threading.Semaphore(1)
        self._renewing = threading.Lock()
        self._fallback = Bootstrap(exploration=0.0, seed=config.seed, currency_step=config.currency_step)
        self._users = users
        self._log = log
        self._pacer = Pacer(log.budgets, log.spent_since, config.pacing_interval_seconds) if log.budgets else None
        self._clock = clock

    def warm_up(self) -> None:
        """Prepare every city for every policy and answer golden requests; raises RuntimeError where an answer breaks a law."""
        if not self._cities:
            raise RuntimeError("the catalogue holds no active ads; build the features first")
        for ads in self._cities.values():
            self._fallback.prepare(ads)
        live = self._live
        for policy in {id(policy): policy for policy in live.arms.values()}.values():
            self.check(policy)
        if live.shadow is not None:
            try:
                self.check(live.shadow)
            except RuntimeError:
                logger.exception("the shadow model is left out")
                self.install(Live(live.arms))

    def check(self, policy: Policy) -> None:
        """Prepare a policy for every city and ask it golden requests; raises RuntimeError where an answer breaks a law."""
        for ads in self._cities.values():
            policy.prepare(ads)
        for ads in self._cities.values():
            self._golden(policy, ads)

    def install(self, live: Live) -> None:
        """From the next request on these policies answer; each was checked. One assignment: no request sees half of it."""
        with self._renewing:
            for policy in live.policies():
                for ads in self._cities.values():  # nothing to do unless the ads changed since the check
                    policy.prepare(ads)
            self._live = live

    def _golden(self, policy: Policy, ads: CityAds) -> None:
        slots = min(self._config.default_slots, len(ads.ad_id))
        eligible = ads.bid >= ads.reserve
        query = Query(
            request_id=0, user_id=0, time=datetime(2026, 1, 1, 12, tzinfo=UTC), utc_offset_minutes=0, latitude=float(ads.latitude[0]),
            longitude=float(ads.longitude[0]), user=None, bids=ads.bid, reserves=ads.reserve, eligible=eligible, slots=slots, price_mode=None,
        )  # fmt: skip
        first, second = policy.rank(ads, query), policy.rank(ads, query)
        broken = broken_invariant(first, ads.bid, ads.reserve, eligible, slots) or broken_layout(first, ads.ad_id, ads.owners, 0)
        if broken or not np.array_equal(first.rows, second.rows) or not np.array_equal(first.price, second.price):
            raise RuntimeError(f"golden request: {policy.version} in city {ads.city_id}: {broken or 'not deterministic'}")

    def renew(self, cities: Mapping[int, CityAds]) -> None:
        """Answer from these snapshots from the next request on, once every policy is prepared for what changed and answers golden requests.
        Raises RuntimeError, and nothing changes, where an answer breaks a law."""
        if not cities:
            raise RuntimeError("the catalogue holds no active ads any more")
        with self._renewing:
            changed = [ads for city, ads in cities.items() if city not in self._cities or self._cities[city].version != ads.version]
            for ads in changed:
                for policy in (self._fallback, *self._live.policies()):
                    policy.prepare(ads)
                for policy in self._live.policies():
                    self._golden(policy, ads)
            self._cities = dict(cities)
        if changed:
            logger.info("catalogue: %s", ", ".join(f"city {ads.city_id} has {len(ads.ad_id)} ads ({ads.version})" for ads in changed))

    # -----------------------------------------------------------------------------------------------------------------

    def rank(self, request: RankRequest) -> dict[str, Any]:
        """The JSON answer of a page, stored before it is returned; a repeated request id gets the stored one. Raises Refusal."""
        started = time.perf_counter()
        self._check_sizes(request)
        identity = _identity(request)
        if request.request_id is not None:
            stored = self._log_call(lambda: self._log.stored(int(request.request_id or 0)))
            if stored is not None:
                return _repeat(stored, identity)
        while True:
            request_id = request.request_id if request.request_id is not None else secrets.randbits(_ID_BITS)
            record = self._answer(request, request_id, identity, started)
            try:
                with _stage("event_log"):
                    self._log_call(lambda record=record: self._log.write_page(record))
            except DuplicateRequest as duplicate:
                if request.request_id is None:  # a fresh id that chance had given before
                    continue
                return _repeat(duplicate.stored, identity)
            metrics.PAGES.labels(arm=record.arm, model_version=record.model_version).inc()
            for reason in record.degraded:
                metrics.DEGRADED.labels(reason=reason).inc()
            return record.answer

    def _shadow(self, policy: Policy, ads: CityAds, query: Query, shown: np.ndarray) -> None:
        """Let another model rank the answered query, beside the next requests and one page at a time; pages that find it busy are left out."""
        if np.random.default_rng([self._config.seed, query.request_id]).random() >= self._config.shadow_share:
            return
        if not self._shadow_busy.acquire(blocking=False):
            metrics.SHADOW_PAGES.labels(model_version=policy.version, outcome="dropped").inc()
            return

        def work() -> None:
            outcome = "failed"
            try:
                started = time.perf_counter()
                page = policy.rank(ads, query)
                took = time.perf_counter() - started
                listed = [
                    {"ad_id": int(ads.ad_id[row]), "pctr": float(pctr), "price": float(price)}
                    for row, pctr, price in zip(page.rows, page.pctr, page.price, strict=True)
                ]
                self._log.write_shadow(query.request_id, policy.version, took * 1e3, listed)
                metrics.STAGE_SECONDS.labels(stage="shadow").observe(took)
                if len(page.rows):
                    metrics.SHADOW_OVERLAP.observe(float(np.isin(page.rows, shown).mean()))
                outcome = "ranked"
            except Exception:
                logger.exception("shadow model %s failed on request %d", policy.version, query.request_id)
            finally:
                metrics.SHADOW_PAGES.labels(model_version=policy.version, outcome=outcome).inc()
                self._shadow_busy.release()

        self._shadow_pool.submit(work)

    def _check_sizes(self, request: RankRequest) -> None:
        for field in ("candidates", "exclude", "bids"):
            if len(getattr(request, field) or ()) > self._config.max_candidates:
                raise Refusal(422, "too_many_ids", f"{field} may hold at most {self._config.max_candidates} ids", field)
        for field in ("alpha", "beta"):
            value, (least, most) = getattr(request, field), getattr(self._config, f"{field}_limits")
            if value is not None and not least <= value <= most:
                raise Refusal(422, "out_of_limits", f"{field} may be {least:g} to {most:g} here, got {value:g}", field)

    def _answer(self, request: RankRequest, request_id: int, identity: str, started: float) -> PageRecord:
        received = self._clock()
        ads = self._cities.get(request.city_id)
        if ads is None:
            raise Refusal(422, "unknown_city", f"city {request.city_id} has no active ads here", "city_id")
        arm = assign_arm(request.user_id, self._config.salt, self._config.arms)
        live = self._live
        policy = live.arms[arm]
        time = _moment(request, received)
        bids, offered, eligible = self._market(ads, request, time)
        user, degraded = None, []
        if policy.reads_user:
            with _stage("features"):
                user, reason = self._users(request.user_id)
            degraded += [reason] if reason else []
        query = Query(
            request_id=request_id, user_id=request.user_id, time=time, utc_offset_minutes=request.utc_offset_minutes,
            latitude=request.latitude, longitude=request.longitude, user=user, bids=bids, reserves=ads.reserve, eligible=eligible,
            slots=request.slots or self._config.default_slots, price_mode=request.price_mode, offered=offered,
            organic=Organic.of([item.model_dump() for item in request.organic]), alpha=request.alpha, beta=request.beta,
        )  # fmt: skip
        with _stage("rank"):
            page, replaced = self._lawful_page(policy, ads, query)
        degraded += [replaced] if replaced else []
        version = self._fallback.version if replaced == PAGE_FALLBACK else policy.version
        if live.shadow is not None and policy.reads_user:
            self._shadow(live.shadow, ads, query, page.rows)
        return _record(request, query, ads, page, arm, version, degraded, received, identity, started)

    def _market(self, ads: CityAds, request: RankRequest, time: datetime) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Paced bids, bids with the overrides, and who may be shown: in `candidates`, not in `exclude`, money left, paced bid at least the
        reserve. All [A]."""
        offered = ads.bid
        if request.bids:
            offered = ads.bid.copy()
            offered[ads.rows_of([override.ad_id for override in request.bids], "bids")] = [override.bid for override in request.bids]
        bids, eligible = offered, np.ones(len(offered), bool)
        if self._pacer is not None:
            multiplier, eligible = self._log_call(lambda: self._pacer.at(time, ads))  # type: ignore[union-attr]
            bids = offered * multiplier
        eligible &= bids >= ads.reserve
        if request.candidates is not None:
            named = np.zeros(len(bids), bool)
            named[ads.rows_of(request.candidates, "candidates")] = True
            eligible &= named
        if request.exclude:
            eligible[ads.rows_of(request.exclude, "exclude")] = False
        return bids, offered, eligible

    def _lawful_page(self, policy: Policy, ads: CityAds, query: Query) -> tuple[PricedPage, str | None]:
        """The policy's page if it keeps every law; else its page at GSP prices, else the bootstrap page; and what was replaced."""
        try:
            page = policy.rank(ads, query)
            broken = broken_invariant(page, query.bids, query.reserves, query.eligible, query.slots, query.offered) or broken_layout(page, ads.ad_id, ads.owners, len(query.organic))
        except Refusal:
            raise
        except Exception:
            logger.exception("%s failed on request %d", policy.version, query.request_id)
            page, broken = None, "policy_failed"
        if broken is None and page is not None:
            return page, None
        metrics.PRICE_FALLBACKS.labels(invariant=str(broken)).inc()
        logger.error("request %d: %s broke the law %s; falling back to GSP", query.request_id, policy.version, broken)
        if page is not None and broken not in PAGE_LAWS:
            return gsp_of_page(page, query.bids, query.reserves, self._config.currency_step), PRICE_FALLBACK
        return self._fallback.rank(ads, query), PAGE_FALLBACK

    def events(self, request: EventsRequest) -> EventsResponse:
        """Store what users did, each event once; unknown impressions are listed, never an error. Raises Refusal."""
        if len(request.events) > self._config.max_events:
            raise Refusal(422, "too_many_events", f"events may hold at most {self._config.max_events}", "events")
        records = [
            EventRecord(event.type, event.request_id, event.slot, event.ad_id, event.timestamp, event.order_value, event.rank)  # type: ignore[arg-type]
            for event in request.events
        ]
        outcomes = self._log_call(lambda: self._log.write_events(records, self._clock()))
        if self._pusher is not None and "accepted" in outcomes:
            self._pusher.flush(self._config.push_wait_ms / 1e3)
        rejected = []
        for index, (event, outcome) in enumerate(zip(records, outcomes, strict=True)):
            metrics.EVENTS.labels(type=event.type, outcome=outcome).inc()
            if outcome not in ("accepted", "duplicate"):
                rejected.append(RejectedEvent(index=index, request_id=event.request_id, slot=event.slot, rank=event.rank, reason=outcome))
        return EventsResponse(accepted=outcomes.count("accepted"), duplicates=outcomes.count("duplicate"), rejected=rejected)

    def close(self) -> None:
        """End the threads and close the event log; no request may be running."""
        self._shadow_pool.shutdown()
        if self._pusher is not None:
            self._pusher.close()
        self._users.close()
        self._log.close()

    def _log_call(self, call: Callable[[], Any]) -> Any:
        """No record, no answer: a log that cannot be written is a designed 503, not a page without its impression."""
        try:
            return call()
        except (sqlite3.Error, OSError) as error:
            logger.error("event log failed: %s: %s", type(error).__name__, error)
            raise Refusal(503, "event_log_unavailable", "the page cannot be recorded now and is therefore not answered; try again") from error


def _identity(request: RankRequest) -> str:
    """sha256 over everything but the request id."""
    return hashlib.sha256(request.model_dump_json(exclude={"request_id"}).encode()).hexdigest()


def _repeat(stored: StoredAnswer, identity: str) -> dict[str, Any]:
    if stored.body_sha256 != identity:
        raise Refusal(409, "request_id_conflict", "this request_id was answered for another body; use a fresh id", "request_id")
    return stored.answer


def _moment(request: RankRequest, received: datetime) -> datetime:
    return received if request.timestamp is None else request.timestamp  # type: ignore[return-value]


def _record(
    request: RankRequest, query: Query, ads: CityAds, page: PricedPage, arm: str, version: str, degraded: list[str], received: datetime, identity: str, started: float
) -> PageRecord:
    rows = page.rows
    offered = query.bids if query.offered is None else query.offered
    creative = ads.creative_id[rows] if page.creative_id is None else page.creative_id
    above = np.minimum(np.arange(len(rows)), len(query.organic)) if page.above is None else page.above
    shown = [
        RankedAd(slot=slot, ad_id=int(ads.ad_id[row]), creative_id=int(image), price=float(price), pctr=float(pctr), bid=float(offered[row]), above=int(before))
        for slot, (row, image, price, pctr, before) in enumerate(zip(rows, creative, page.price, page.pctr, above, strict=True), start=1)
    ]
    answer = RankResponse(
        request_id=query.request_id, model_version=version, arm=arm, city_id=ads.city_id, price_mode=page.price_mode, ads=shown, degraded=degraded
    )
    places = organic.positions(np.asarray(above, np.int64)[None, :], len(request.organic))[1][0]
    listed = [(int(place), item.poi_id, item.category_id, item.latitude, item.longitude) for place, item in zip(places, request.organic, strict=True)]
    return PageRecord(
        request_id=query.request_id, body_sha256=identity, time=query.time, received=received, user_id=query.user_id, session_id=request.session_id,
        city_id=ads.city_id, latitude=query.latitude, longitude=query.longitude, utc_offset_minutes=query.utc_offset_minutes, slots=query.slots,
        arm=arm, model_version=version, price_mode=page.price_mode, degraded=tuple(degraded), latency_ms=(time.perf_counter() - started) * 1e3,
        answer=answer.model_dump(mode="json"), ad_id=ads.ad_id[rows], creative_id=creative, poi_id=ads.poi_id[rows],
        category_id=ads.category_id[rows], ad_latitude=ads.latitude[rows], ad_longitude=ads.longitude[rows], bid=offered[rows],
        payment=page.price, pctr=page.pctr, propensity=page.propensity, receipts=_receipts(query, offered, ads, page, version),
        organic=listed,
    )  # fmt: skip


def _receipts(query: Query, offered: np.ndarray, ads: CityAds, page: PricedPage, version: str) -> list[dict[str, Any]]:
    """Price receipt of every ad shown; `auction.receipt.replay` recomputes the charge from it alone."""
    return [
        {
            "request_id": query.request_id, "model_version": version, "catalogue_version": ads.version, "city_id": ads.city_id, "slot": slot,
            "ad_id": int(ads.ad_id[row]), "bid": float(offered[row]), "paced_bid": float(query.bids[row]), "reserve": float(query.reserves[row]), "pctr": float(page.pctr[slot - 1]),
            "propensity": float(page.propensity[slot - 1]), "mode": page.price_mode,
            "critical_price": float(page.critical_price[slot - 1]) if np.isfinite(page.critical_price[slot - 1]) else None,
            "price": float(page.price[slot - 1]), **(page.basis[slot - 1] if page.basis else {}),
        }
        for slot, row in enumerate(page.rows, start=1)
    ]  # fmt: skip
