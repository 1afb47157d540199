"""Gates: positive decisions with a reason. Their record is signed by serving.store, which approval and serving check again.

A gate says "good enough", never "not bad": a missing, NaN or infinite measurement does not pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass

from model.evaluation.metrics import mean_and_interval


@config_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class GateConfig:
    """Thresholds. A candidate needs every gate."""

    psi_limit: float = 0.03
    """Largest psi_exact (regret over utility of displayed ads) of the prices that will be charged, under the evaluator that prices."""
    psi_limit_independent: float = 0.15
    """The same under the evaluation evaluator, which knows other days. Two honest estimates of CTR from few clicks differ, so
    even exact prices show some; the limit is there to catch what is broken, the one above to keep prices truthful."""
    psi_loser_limit: float = Field(0.001, ge=0)
    """Largest gain of the nearest ads that are not displayed, over the utility of those that are, under either evaluator."""
    learned_revenue_share: float = Field(0.95, ge=0)
    """Learned payments are chosen only with at least this share of the truthful prices' revenue (critical, or implicit), and within the psi limits."""
    minimum_lift: float = -0.01
    """Lower 95 % bound of the paired relative eRPM lift over the incumbent must exceed this; a little below 0, so that a fresh
    model that is as good as its predecessor may replace it."""
    dev_limit: float = Field(0.1, gt=0)
    """Largest calibration deviation |1 - mean pCTR / CTR| on exposed test ads."""


@dataclass(frozen=True)
class Gate:
    """One decision: what was measured, against which limit, and why it passed or did not."""

    name: str
    approved: bool
    value: float | None
    limit: float
    reason: str


def ic_gate(psi: dict[str, Any], mode: str, config: GateConfig) -> Gate:
    """Incentive compatibility of the prices that will be charged: displayed ads and losers, under both evaluators.

    psi: the metrics' entry of one price mode (model.evaluation.replay).
    """
    limits = {
        "psi_exact_model": config.psi_limit, "psi_exact": config.psi_limit_independent,
        "psi_loser_model": config.psi_loser_limit, "psi_loser": config.psi_loser_limit,
    }  # fmt: skip
    values = {name: psi.get(name) for name in limits}
    bad = [name for name, value in values.items() if not (isinstance(value, float) and math.isfinite(value))]
    if bad:
        return Gate("incentive_compatibility", False, None, config.psi_limit, f"psi of {mode} prices could not be measured ({', '.join(f'{name} {values[name]}' for name in bad)})")
    approved = all(0.0 <= values[name] <= limit for name, limit in limits.items())
    shown, losers = (
        f"{100 * values[f'{name}_model']:.2f} % (limit {100 * limits[f'{name}_model']:.2f} %), judged by the independent evaluator {100 * values[name]:.2f} % (limit {100 * limits[name]:.2f} %)"
        for name in ("psi_exact", "psi_loser")
    )
    reason = f"under {mode} prices displayed ads could gain {shown} of their utility by lying about their bid{_how(psi)}; ads not displayed, by overbidding: {losers}"
    return Gate("incentive_compatibility", bool(approved), values["psi_exact_model"], config.psi_limit, reason)


def _how(psi: dict[str, Any]) -> str:
    """In words, how an advertiser would gain: by shading or overbidding, and the largest gain found."""
    share, worst = psi.get("shading_share"), psi.get("worst")
    if share is None or not worst:
        return ""
    way = f"{100 * share:.0f} % of it by shading" if share >= 0.5 else f"{100 * (1 - share):.0f} % of it by overbidding"
    return (
        f", {way} (most: ad {worst['ad_id']} in slot {worst['slot']} of request {worst['request_id']}, worth {worst['value']:.4g} a click to its owner, "
        f"would bid {worst['best_bid']:.4g} and gain {worst['gain']:.2g})"
    )


def revenue_gate(per_request: pd.DataFrame, candidate: str, incumbent: str, config: GateConfig) -> Gate:
    """eRPM against the incumbent on the same requests: lower 95 % bound of the relative lift, clustered by user."""
    mine = per_request[per_request["policy"] == candidate].set_index("request_id")
    theirs = per_request[per_request["policy"] == incumbent].set_index("request_id")
    if len(mine) == 0 or len(mine) != len(theirs) or not mine.index.sort_values().equals(theirs.index.sort_values()):
        return Gate("revenue", False, None, config.minimum_lift, f"{candidate} and {incumbent} were not replayed on the same requests")
    theirs = theirs.loc[mine.index]
    base = float(theirs["revenue"].mean())
    mean, low, high = mean_and_interval((mine["revenue"] - theirs["revenue"]).to_numpy(), mine["user_id"].to_numpy())
    if base <= 0 or not all(math.isfinite(x) for x in (mean, low, high)):
        return Gate("revenue", False, None, config.minimum_lift, f"revenue of {incumbent} is {base:.4g} per request: no lift can be computed")
    lift, low, high = (float(x) / base for x in (mean, low, high))
    reason = (
        f"eRPM {1000 * float(mine['revenue'].mean()):.4g} against {1000 * base:.4g} of {incumbent}: lift {100 * lift:+.1f} % "
        f"({100 * low:+.1f} to {100 * high:+.1f}); the lower bound must exceed {100 * config.minimum_lift:+.1f} %"
    )
    return Gate("revenue", bool(low > config.minimum_lift), low, config.minimum_lift, reason)


def calibration_gate(dev: float, config: GateConfig) -> Gate:
    """Calibration of the served pCTR on exposed test ads: prices multiply it."""
    measured = isinstance(dev, float) and math.isfinite(dev)
    approved = measured and 0.0 <= dev <= config.dev_limit
    reason = f"|1 - mean pCTR / CTR| = {dev:.3f} on exposed test ads; limit {config.dev_limit:.3f}" if measured else "Dev could not be measured"
    return Gate("calibration", bool(approved), dev if measured else None, config.dev_limit, reason)


def choose_price_mode(metrics: dict[str, Any], config: GateConfig) -> str:
    """`learned` when the payment network earned it (psi within the limit, enough revenue), else the rule that is truthful by construction: `critical`, or `implicit`
    of pages that have no thresholds (EGA V2).
    """
    truthful = "implicit" if "implicit" in metrics["psi"] else "critical"
    if "learned" not in metrics["psi"]:
        return truthful
    honest = ic_gate(metrics["psi"]["learned"], "learned", config).approved
    learned, revenue = (metrics["policies"][f"{metrics['policy']}/{mode}"]["erpm"] for mode in ("learned", truthful))
    earned = honest and revenue > 0 and learned >= config.learned_revenue_share * revenue
    return "learned" if earned else truthful


def judge(metrics: dict[str, Any], per_request: pd.DataFrame, mode: str, incumbent: str, config: GateConfig) -> list[Gate]:
    """All gates of a candidate that charges by `mode`."""
    return [
        ic_gate(metrics["psi"][mode], mode, config),
        revenue_gate(per_request, f"{metrics['policy']}/{mode}", incumbent, config),
        calibration_gate(metrics["ranking"]["dev"], config),
    ]
