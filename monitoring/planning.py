"""Before the start: how many users an experiment needs, and what the users there are can find (F10, F11)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from monitoring import ab_stats
from monitoring.verdict import METRICS, ExperimentPlan


@dataclass(frozen=True)
class Plan:
    """A plan from the reference period's users, of as many days as the test will have."""

    metric: str
    worth: float
    """Relative lift worth acting on."""
    users_needed: int
    """Of both arms, to find it four times out of five; `ab_stats.PLAN_RESERVE` included."""
    users: int
    """That the test will have."""
    days: int
    least_detectable_lift: float
    guardrails: dict[str, int]
    """Users of both arms to prove each guardrail if nothing changes, all of them together four times out of five."""

    def text(self) -> str:
        """For the terminal."""
        label = METRICS[self.metric].label
        lines = [
            f"plan: {label} decides; a lift of {100 * self.worth:+.1f} % needs {self.users_needed:,} users over {self.days} day(s)",
            f"      {self.users:,} users will come: they find lifts from {100 * self.least_detectable_lift:+.1f} % on, four times out of five",
        ]
        for name, users in self.guardrails.items():
            lines.append(f"      guardrail {METRICS[name].label.split(',')[0]}: {users:,} users to prove it{'' if users <= self.users else '; expect it unproven'}")
        return "\n".join(lines)


def plan(pilot: pd.DataFrame, wanted: ExperimentPlan, users: int, days: int) -> Plan:
    """Plan from a pilot: one row a user with the sums of a period as long as the test. Raises ValueError if the pilot has none of the deciding metric."""

    def estimate(name: str) -> ab_stats.Estimate:
        metric = METRICS[name]
        return ab_stats.ratio_per_user(pilot[metric.numerator].to_numpy(), pilot[metric.denominator].to_numpy())

    main = estimate(wanted.primary)
    if not main.value > 0:
        raise ValueError(f"the reference period has no {METRICS[wanted.primary].label}; a plan needs a period with some")
    ratio = wanted.treatment_share / (1 - wanted.treatment_share)
    users_a = round(users * wanted.shares[wanted.control])
    guardrails = {}
    for name, margin in wanted.guardrails.items():
        one = estimate(name)
        if one.value > 0:
            power = 1 - 0.2 / len(wanted.guardrails)
            guardrails[name] = math.ceil((1 + ratio) * ab_stats.plan_users(one, -margin, ratio, power, wanted.alpha))
    return Plan(
        wanted.primary,
        wanted.worth,
        math.ceil((1 + ratio) * ab_stats.plan_users(main, wanted.worth, ratio, alpha=wanted.alpha)),
        users,
        days,
        ab_stats.least_detectable_lift(ab_stats.relative_spread(main), max(2, users_a), max(2, round(users_a * ratio)), alpha=wanted.alpha),
        guardrails,
    )
