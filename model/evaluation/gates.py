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
    learned_revenue_share: float = Field(0.95, ge=0)
    """Learned payments are chosen only with at least this share of the critical prices' revenue, and within psi_limit."""
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


def ic_gate(psi_model: float, psi_independent: float, mode: str, config: GateConfig) -> Gate:
    """Incentive compatibility of the prices that will be charged, under both evaluators."""
    values = (psi_model, psi_independent)
    measured = all(isinstance(value, float) and math.isfinite(value) for value in values)
    approved = measured and 0.0 <= psi_model <= config.psi_limit and 0.0 <= psi_independent <= config.psi_limit_independent
    if not measured:
        reason = f"psi of {mode} prices could not be measured ({psi_model}, {psi_independent})"
    else:
        reason = (
            f"by lying about its bid a displayed ad could gain {100 * psi_model:.2f} % of its utility under {mode} prices (limit {100 * config.psi_limit:.2f} %); "
            f"judged by the independent evaluator {100 * psi_independent:.2f} % (limit {100 * config.psi_limit_independent:.2f} %)"
        )
    return Gate("incentive_compatibility", bool(approved), psi_model if measured else None, config.psi_limit, reason)


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
    """`learned` when the payment network earned it (psi within the limit, enough revenue), else `critical`."""
    psi = metrics["psi"]["learned"]["psi_exact_model"]
    learned, critical = (metrics["policies"][f"ega_v1/{mode}"]["erpm"] for mode in ("learned", "critical"))
    earned = math.isfinite(psi) and 0.0 <= psi <= config.psi_limit and critical > 0 and learned >= config.learned_revenue_share * critical
    return "learned" if earned else "critical"


def judge(metrics: dict[str, Any], per_request: pd.DataFrame, mode: str, incumbent: str, config: GateConfig) -> list[Gate]:
    """All gates of a candidate that charges by `mode`."""
    return [
        ic_gate(metrics["psi"][mode]["psi_exact_model"], metrics["psi"][mode]["psi_exact"], mode, config),
        revenue_gate(per_request, f"ega_v1/{mode}", incumbent, config),
        calibration_gate(metrics["ranking"]["dev"], config),
    ]
