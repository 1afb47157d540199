"""One read of a user's features a request, under our own deadline: late or failing features degrade an answer, never break it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

logger = logging.getLogger("ega.serving")

UserT = TypeVar("UserT")

UNKNOWN, LATE, FAILED = "user_features_default", "user_features_timeout", "user_features_error"
"""Reasons in `degraded`: the store does not know the user; it did not answer in time; it failed. Each time the default user ranks."""


class UserReader(Generic[UserT]):
    """Reads through `read(user_id) -> features or None`, waiting at most `deadline_seconds`.

    Reads run one after the other on one thread (the stores behind Feast are not promised to be thread-safe). A read that outlives
    its deadline opens the circuit: until it returns, requests get the default user at once instead of queueing behind it.
    """

    def __init__(self, read: Callable[[int], UserT | None], deadline_seconds: float) -> None:
        self._read = read
        self._deadline = deadline_seconds
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._lock = threading.Lock()
        self._stuck: Future[UserT | None] | None = None

    def __call__(self, user_id: int) -> tuple[UserT | None, str | None]:
        """The features and None, or None and the reason for the default user."""
        with self._lock:
            if self._stuck is not None and not self._stuck.done():
                return None, LATE
            future = self._pool.submit(self._read, user_id)
        try:
            features = future.result(timeout=self._deadline)
        except FutureTimeout:
            if not future.cancel():  # it runs and cannot be stopped
                with self._lock:
                    self._stuck = future
            return None, LATE
        except Exception:
            logger.exception("reading user features failed")
            return None, FAILED
        return (features, None) if features is not None else (None, UNKNOWN)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
