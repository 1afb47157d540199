"""Fresh behaviours: what the event log holds and the online feature store does not is written there, in the background.

The event log remembers what was pushed, so neither a failing store nor a killed process loses a click; a push that is repeated
changes nothing (a behaviour id counts once).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pandas as pd

from serving import metrics
from serving.event_log import EventLog

logger = logging.getLogger("ega.serving")

_RETRY_SECONDS = 1.0


class Pusher:
    """One thread that empties `log.unpushed()` into `push(behaviours)`; starts with what an earlier process left."""

    def __init__(self, log: EventLog, push: Callable[[pd.DataFrame], object]) -> None:
        self._log, self._push = log, push
        self._changed = threading.Condition()
        self._wanted = self._done = 0
        self._ended = self._failing = False
        self._thread = threading.Thread(target=self._run, name="pusher", daemon=True)
        self._thread.start()

    def flush(self, wait_seconds: float) -> bool:
        """Push what is in the log now; True once it is done, False if that takes longer than the wait or the store is failing: it goes on by itself."""
        with self._changed:
            self._wanted += 1
            mine = self._wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= mine or self._failing, wait_seconds)
            return self._done >= mine

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                target = self._wanted
            try:
                self._empty()
            except Exception as error:  # the store is down: the log keeps the events until it is back
                logger.error("pushing behaviours failed, next try in %g s: %s: %s", _RETRY_SECONDS, type(error).__name__, error)
                with self._changed:
                    self._failing = True
                    self._changed.notify_all()
                    if self._changed.wait_for(lambda: self._ended, _RETRY_SECONDS):
                        return
                continue
            with self._changed:
                self._done, self._failing = target, False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._ended or self._wanted > self._done)
                if self._ended:
                    return

    def _empty(self) -> None:
        while True:
            behaviours, keys = self._log.unpushed()
            metrics.UNPUSHED.set(len(keys))
            if not keys:
                return
            started = time.perf_counter()
            self._push(behaviours)
            self._log.mark_pushed(keys)
            metrics.PUSHED.inc(len(keys))
            metrics.STAGE_SECONDS.labels(stage="push").observe(time.perf_counter() - started)
