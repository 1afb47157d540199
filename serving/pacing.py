"""Daily budgets in the service: who may still be shown, and how far bids are lowered so that a budget lasts the day.

Money that was spent is read from the event log, at most once an interval; the multipliers of a page therefore rest on the past alone.
The day is the UTC day of the request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from auction.pacing import pace
from serving.catalogue import CityAds


class BudgetError(ValueError):
    """A budget file that cannot be used; the text says which row and why."""


def read_budgets(path: Path) -> dict[int, float]:
    """Daily budgets in currency by ad id, from a CSV file with the columns ad_id and daily_budget."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise BudgetError(f"budgets {path} cannot be read: {error}") from error
    if list(table.columns) != ["ad_id", "daily_budget"]:
        raise BudgetError(f"budgets {path}: columns must be ad_id, daily_budget, got {', '.join(map(str, table.columns))}")
    for row, (ad, budget) in enumerate(zip(table["ad_id"], pd.to_numeric(table["daily_budget"], errors="coerce"), strict=True), start=2):
        if isinstance(ad, bool) or not isinstance(ad, int | np.integer) or not np.isfinite(budget) or budget <= 0:
            raise BudgetError(f"budgets {path}, line {row}: ad_id must be whole and daily_budget a finite amount above 0, got {ad} and {table['daily_budget'].iloc[row - 2]}")
    if table["ad_id"].duplicated().any():
        raise BudgetError(f"budgets {path}: ad {int(table.loc[table['ad_id'].duplicated(), 'ad_id'].iloc[0])} is named twice")
    return dict(zip(table["ad_id"].astype(int).tolist(), table["daily_budget"].astype(float).tolist(), strict=True))


def day_of(time: datetime) -> datetime:
    """Midnight (UTC) before."""
    return time.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


class Pacer:
    """Multipliers and open budgets of all ads; safe to call from several threads."""

    def __init__(self, budgets: Mapping[int, float], spent_since: Callable[[datetime], Mapping[int, float]], interval_seconds: float) -> None:
        """`spent_since(midnight)`: what each ad was charged for clicks from then on."""
        self._ids = np.array(sorted(budgets), np.int64)
        self._budget = np.array([budgets[int(ad)] for ad in self._ids])
        self._spent_since, self._interval = spent_since, timedelta(seconds=interval_seconds)
        self._lock = threading.Lock()
        self._updated: datetime | None = None
        self._multiplier, self._spent = np.ones(len(self._ids)), np.zeros(len(self._ids))

    def at(self, time: datetime, ads: CityAds) -> tuple[np.ndarray, np.ndarray]:
        """(multiplier in (0, 1], whether money is left) of a city's ads at a request's time, [A] each."""
        with self._lock:
            if self._updated is None or time - self._updated >= self._interval or day_of(time) > day_of(self._updated):
                self._update(time)
            multiplier, spent = self._multiplier, self._spent
        factor, left = np.ones(len(ads.ad_id)), np.ones(len(ads.ad_id), bool)
        place = np.searchsorted(self._ids, ads.ad_id).clip(max=max(len(self._ids) - 1, 0))
        if len(self._ids):
            mine = self._ids[place] == ads.ad_id
            factor[mine], left[mine] = multiplier[place[mine]], (spent < self._budget)[place[mine]]
        return factor, left

    def _update(self, time: datetime) -> None:
        midnight = day_of(time)
        if self._updated is None or midnight > day_of(self._updated):
            self._multiplier = np.ones(len(self._ids))
        spent = self._spent_since(midnight)
        self._spent = np.array([spent.get(int(ad), 0.0) for ad in self._ids])
        self._multiplier = pace(self._multiplier, self._spent, self._budget, (time - midnight) / timedelta(days=1))
        self._updated = time
