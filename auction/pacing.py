"""Budget pacing: a multiplier in (0, 1] on every bid, moved by past spend only, so that a budget lasts the day.

An advertiser bids b; the auction sees lambda * b. lambda depends on what was spent *before*, never on the bid in hand, so within one auction
truthful prices stay truthful in the paced bid, and price <= lambda * b <= b. Over a day an advertiser with a binding budget can still
profit from planning; no rule of this kind is proof against that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from auction.checks import AuctionInputError, Floats, as_floats

LOWEST = 0.05
"""Least multiplier: an ad that is paced to nothing would never be seen again."""


def pace(multiplier: Any, spent: Any, budget: Any, elapsed: float, step: float = 0.2) -> Floats:
    """The next multipliers [N]: lower for ads that spend faster than their day passes, higher for the others.

    lambda <- clip(lambda * exp(step * (1 - spent / (budget * elapsed))), LOWEST, 1), the exponent within [-step, step].

    Args: multiplier [N] in (0, 1]; spent [N] today and budget [N] a day in currency, inf: no budget (its multiplier is 1); elapsed, share
    of the day gone, in [0, 1]; at 0 nothing moves.
    """
    spent_N = as_floats("spent", spent, (None,), 0.0)
    now = as_floats("multiplier", multiplier, spent_N.shape, 0.0, 1.0)
    budget_N = np.asarray(budget, dtype=np.float64)
    if budget_N.shape != spent_N.shape or not (budget_N > 0.0).all():
        raise AuctionInputError(f"budget must hold {len(spent_N)} amounts above 0 (inf: none), got {budget!r}")
    if not 0.0 <= elapsed <= 1.0 or not 0.0 < step < float("inf"):
        raise AuctionInputError(f"elapsed must lie in [0, 1] and step be above 0, got {elapsed} and {step}")
    if elapsed == 0.0:
        return np.where(np.isfinite(budget_N), now, 1.0)
    push = np.clip(step * (1.0 - spent_N / (budget_N * elapsed)), -step, step)
    return np.where(np.isfinite(budget_N), np.clip(now * np.exp(push), LOWEST, 1.0), 1.0)
