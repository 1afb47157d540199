"""Price receipts: what a charge rests on, one JSON object per displayed ad, and the charge recomputed from it alone.

The service charges what `charge` says, and `replay` calls the same function on the stored receipt: a charge can be checked by
anyone who has the receipt, without the model, the catalogue or the bids of the day. Money in currency per click.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from auction.checks import round_down
from auction.classic import position_prices, second_price
from auction.critical import reachable_slots, step_prices
from auction.implicit import implicit_price

MODES = ("critical", "learned", "implicit", "gsp", "vcg", "first_price")


class ReceiptError(ValueError):
    """A receipt that does not say what its charge rests on; the text names the field."""


@dataclass(frozen=True)
class Charge:
    """What one displayed ad pays for a click."""

    price: float
    """Charged: the rule's exact price rounded down to the currency step, within [reserve, paced bid]."""
    exact: float
    """The rule's price before rounding."""
    critical: float | None
    """Exact truthful price, whatever rule charges; None where the policy knows no thresholds."""


def truthful_price(theta: Sequence[float | None], ctr: Sequence[float], slot: int, reserve: float, paced_bid: float) -> float:
    """Myerson's price (auction.critical.step_prices) of the ad in `slot`, counted from 1.

    theta [K]: critical bids, None where a slot is never reached; ctr [K]: the ad's CTR in every slot from its own downwards.
    """
    bids = np.array([math.inf if value is None else value for value in theta], dtype=np.float64)
    own = np.array(slot - 1)
    reachable = reachable_slots(bids, np.array(reserve), own)
    price, _ = step_prices(bids, np.asarray(ctr, dtype=np.float64), reachable, own, np.array(reserve))
    return min(float(price), paced_bid)


def charge(
    mode: str,
    slot: int,
    paced_bid: float,
    reserve: float,
    theta: Sequence[float | None] | None,
    slot_ctr: Sequence[float] | None,
    rank_ctr: float,
    next_score: float,
    network_price: float | None,
    currency_step: float,
    scores_below: Sequence[float] | None = None,
    slot_clicks: Sequence[float] | None = None,
    probe_ctr: Sequence[float] | None = None,
) -> Charge:
    """The charge of a displayed ad under a pricing mode.

    Args: theta, slot_ctr as `truthful_price` (None: the policy has none); rank_ctr and next_score, own pCTR and the next ad's
    pCTR * bid, for `gsp`; network_price, the payment network's price, for `learned`; for `vcg` scores_below [K - slot + 1], pCTR * bid
    of the ads further down and of the first that is not shown, and slot_clicks [K], what a slot's clicks are worth in any unit; for `implicit`
    probe_ctr, the own pCTR at drawn bids. Raises ReceiptError for what the mode needs and lacks.
    """
    critical = None if theta is None or slot_ctr is None else truthful_price(theta, slot_ctr, slot, reserve, paced_bid)
    if mode == "critical" and critical is not None:
        exact = critical
    elif mode == "gsp":
        exact = float(second_price(np.array(next_score), np.array(rank_ctr), np.array(paced_bid), np.array(reserve)))
    elif mode == "vcg" and scores_below is not None and slot_clicks is not None:
        owed = position_prices(np.asarray(scores_below, dtype=np.float64), np.asarray(slot_clicks, dtype=np.float64)[slot - 1 :])[0]
        exact = float(second_price(owed, np.array(rank_ctr), np.array(paced_bid), np.array(reserve)))
    elif mode == "first_price":
        exact = paced_bid
    elif mode == "learned" and network_price is not None:
        exact = network_price
    elif mode == "implicit" and probe_ctr and rank_ctr > 0:
        exact = float(implicit_price(paced_bid, reserve, rank_ctr, probe_ctr))
    else:
        raise ReceiptError(f"mode {mode!r}: " + ("use one of " + ", ".join(MODES) if mode not in MODES else "the receipt lacks what this price rests on"))
    price = float(round_down(np.array(exact), currency_step, reserve, paced_bid))
    return Charge(price, exact, critical)


NEEDED = ("request_id", "slot", "ad_id", "mode", "paced_bid", "bid", "reserve", "rank_ctr", "next_score", "currency_step", "price", "critical_price")
"""Fields that every receipt has; `theta`, `slot_ctr`, `network_price`, `scores_below`, `slot_clicks` and `probe_ctr` may be null."""


def replay(receipt: Mapping[str, Any]) -> Charge:
    """The charge recomputed from a receipt; compare `price` with the receipt's. Raises ReceiptError naming a missing or bad field."""
    missing = [name for name in NEEDED if name not in receipt]
    if missing:
        raise ReceiptError(f"receipt lacks {missing[0]!r}; a receipt has {', '.join(NEEDED)}")
    numbers = {}
    for name in ("paced_bid", "bid", "reserve", "rank_ctr", "next_score", "currency_step"):
        value = receipt[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ReceiptError(f"{name} must be a finite number >= 0, got {value!r}")
        numbers[name] = float(value)
    slot, theta, slot_ctr = receipt["slot"], receipt.get("theta"), receipt.get("slot_ctr")
    if isinstance(slot, bool) or not isinstance(slot, int) or slot < 1:
        raise ReceiptError(f"slot must be a whole number from 1 on, got {slot!r}")
    if not numbers["reserve"] <= numbers["paced_bid"] <= numbers["bid"]:
        raise ReceiptError(f"reserve <= paced_bid <= bid must hold, got {numbers['reserve']}, {numbers['paced_bid']}, {numbers['bid']}")
    for name, values in (("theta", theta), ("slot_ctr", slot_ctr)):
        if values is not None and (not isinstance(values, list) or len(values) < slot or not all(_number(value, name == "theta") for value in values)):
            raise ReceiptError(f"{name} must be a list of at least {slot} numbers, got {values!r}")
    if theta is not None and slot_ctr is not None and len(theta) != len(slot_ctr):
        raise ReceiptError(f"theta and slot_ctr must be equally long, got {len(theta)} and {len(slot_ctr)}")
    network_price = receipt.get("network_price")
    if network_price is not None and not _number(network_price, False):
        raise ReceiptError(f"network_price must be a finite number or null, got {network_price!r}")
    below, clicks, probes = receipt.get("scores_below"), receipt.get("slot_clicks"), receipt.get("probe_ctr")
    for name, values in (("scores_below", below), ("slot_clicks", clicks), ("probe_ctr", probes)):
        if values is not None and (not isinstance(values, list) or not all(_number(value, False) and value >= 0 for value in values)):
            raise ReceiptError(f"{name} must be a list of numbers >= 0, got {values!r}")
    if below is not None and clicks is not None and (len(below) < 1 or len(clicks) - slot + 1 != len(below) or sorted(clicks, reverse=True) != clicks):
        raise ReceiptError(f"slot_clicks must not rise and scores_below hold one number for each slot from {slot} on, got {clicks!r} and {below!r}")
    return charge(
        str(receipt["mode"]), slot, numbers["paced_bid"], numbers["reserve"], theta, slot_ctr, numbers["rank_ctr"], numbers["next_score"],
        network_price, numbers["currency_step"], below, clicks, probes,
    )  # fmt: skip


def _number(value: Any, may_be_none: bool) -> bool:
    return (value is None and may_be_none) or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def difference(receipt: Mapping[str, Any]) -> str | None:
    """None if the receipt's charge and truthful price are what it rests on, else what differs, in words. Raises ReceiptError as `replay`."""
    again = replay(receipt)
    if again.price != receipt["price"]:
        return f"charged {receipt['price']!r}, recomputed {again.price!r} ({receipt['mode']})"
    if again.critical != receipt["critical_price"]:
        return f"truthful price {receipt['critical_price']!r}, recomputed {again.critical!r}"
    return None
