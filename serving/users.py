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

    A read that hangs keeps its thread; once all threads hang, further requests degrade at once instead of queueing behind them.
    """

    def __init__(self, read: Callable[[int], UserT | None], deadline_seconds: float, threads: int = 2) -> None:
        self._read = read
        self._deadline = deadline_seconds
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="features")
        self._free = threading.Semaphore(threads)

    def __call__(self, user_id: int) -> tuple[UserT | None, str | None]:
        """The features and None, or None and the reason for the default user."""
        if not self._free.acquire(blocking=False):
            return None, LATE
        future: Future[UserT | None] = self._pool.submit(self._read, user_id)
        future.add_done_callback(lambda _: self._free.release())
        try:
            features = future.result(timeout=self._deadline)
        except FutureTimeout:
            return None, LATE
        except Exception:
            logger.exception("reading user features failed")
            return None, FAILED
        return (features, None) if features is not None else (None, UNKNOWN)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
