"""One read of a user's features a request, under our own deadline: late or failing features degrade an answer, never break it.

What replaces features that did not come, in this order: the last ones read for this user (not older than the cache's age limit), then
the default user. After several failures in a row the store is left alone (the circuit is open) but for one trial a cool-down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

from serving import metrics

logger = logging.getLogger("ega.serving")

UserT = TypeVar("UserT")

UNKNOWN, STALE = "user_features_default", "user_features_stale"
LATE, FAILED, SKIPPED = "user_features_timeout", "user_features_error", "user_features_skipped"
"""Reasons in `degraded`. UNKNOWN: the store does not know the user. STALE: features of an earlier request, because the store is late,
fails, or forgot the user. LATE, FAILED, SKIPPED (circuit open): none either, the default user ranks."""


class Breaker:
    """Closed until `failures` calls in a row failed; then open, with one trial call each `cooldown_seconds`. Safe over threads."""

    def __init__(self, failures: int, cooldown_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._cooldown, self._clock = failures, cooldown_seconds, clock
        self._lock = threading.Lock()
        self._failed = 0
        self._next_trial = 0.0

    def allows(self) -> bool:
        """Whether to call now. While open, True once a cool-down: the trial."""
        with self._lock:
            if self._failed < self._limit:
                return True
            now = self._clock()
            if now < self._next_trial:
                return False
            self._next_trial = now + self._cooldown
            return True

    def succeeded(self) -> None:
        with self._lock:
            if self._failed >= self._limit:
                logger.warning("user features: the store answers again, the circuit is closed")
            self._failed = 0
            metrics.CIRCUIT_OPEN.set(0)

    def failed(self) -> None:
        with self._lock:
            self._failed += 1
            if self._failed == self._limit:
                self._next_trial = self._clock() + self._cooldown
                metrics.CIRCUIT_OPEN.set(1)
                logger.error("user features: %d failures in a row, the circuit is open; a trial every %g s", self._limit, self._cooldown)


class _Recent(Generic[UserT]):
    """The last features of the users seen last, with the time they were read."""

    def __init__(self, users: int, seconds: float, clock: Callable[[], float]) -> None:
        self._users, self._seconds, self._clock = users, seconds, clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[float, UserT]] = OrderedDict()

    def put(self, user_id: int, features: UserT) -> None:
        with self._lock:
            self._kept[user_id] = (self._clock(), features)
            self._kept.move_to_end(user_id)
            while len(self._kept) > self._users:
                self._kept.popitem(last=False)

    def get(self, user_id: int) -> tuple[UserT, float] | None:
        """Features and their age in seconds, unless there are none young enough."""
        with self._lock:
            if user_id not in self._kept:
                return None
            read_at, features = self._kept[user_id]
            age = self._clock() - read_at
            if age > self._seconds:
                del self._kept[user_id]
                return None
            return features, age


class UserReader(Generic[UserT]):
    """Reads through `read(user_id) -> features or None`, waiting at most `deadline_seconds`.

    Reads run one after the other on one thread (the stores behind Feast are not promised to be thread-safe). A read that outlives
    its deadline blocks that thread: until it returns, requests do not queue behind it.
    """

    def __init__(
        self,
        read: Callable[[int], UserT | None],
        deadline_seconds: float,
        breaker: Breaker | None = None,
        cache_users: int = 5_000,
        cache_seconds: float = 3_600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cache_users`: most users whose last features are kept; `cache_seconds`: how old these may be when they are used."""
        self._read = read
        self._deadline = deadline_seconds
        self._breaker = breaker or Breaker(5, 1.0)
        self._recent: _Recent[UserT] = _Recent(cache_users, cache_seconds, clock)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._lock = threading.Lock()
        self._stuck: Future[UserT | None] | None = None

    def __call__(self, user_id: int) -> tuple[UserT | None, str | None]:
        """The features and None; or older features, or None for the default user, and the reason."""
        features, problem = self._fresh(user_id)
        if features is not None:
            self._recent.put(user_id, features)
            return features, None
        kept = self._recent.get(user_id)
        if kept is None:
            return None, problem
        metrics.STALE_AGE_SECONDS.observe(kept[1])
        return kept[0], STALE

    def _fresh(self, user_id: int) -> tuple[UserT | None, str]:
        with self._lock:
            if self._stuck is not None and not self._stuck.done():
                return None, LATE
            if not self._breaker.allows():
                return None, SKIPPED
            future = self._pool.submit(self._read, user_id)
        try:
            features = future.result(timeout=self._deadline)
        except FutureTimeout:
            if not future.cancel():  # it runs and cannot be stopped
                with self._lock:
                    self._stuck = future
            self._breaker.failed()
            return None, LATE
        except Exception as error:
            logger.error("reading user features failed: %s: %s", type(error).__name__, error)
            self._breaker.failed()
            return None, FAILED
        self._breaker.succeeded()
        return features, UNKNOWN

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
