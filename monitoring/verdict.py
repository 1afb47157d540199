"""From facts to a decision: the plan of an experiment, its numbers by arm, and the verdict in plain words.

Only what was observed counts: impressions, clicks, purchases and charges of the log. The simulator's hidden truth, which a real platform
does not have, is neither read nor importable from here (it scores policies offline, in the evaluation step).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from scipy.stats import norm

from monitoring import ab_designs, ab_stats, integrity, segments
from monitoring.facts import SUMS, Facts, per_user

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@plain_dataclass(frozen=True)
class Metric:
    """A ratio of per-user sums."""

    label: str
    numerator: str
    denominator: str
    scale: float = 1.0
    unit: str = ""
    up_is_good: bool | None = True
    """None: neither way is better by itself."""


METRICS: dict[str, Metric] = {
    "ctr": Metric("CTR per impression", "clicks", "imps", 100.0, "%"),
    "rpm": Metric("RPM per 1000 impressions", "revenue", "imps", 1000.0),
    "roi": Metric("ROI, order value per ad spend", "gmv", "revenue"),
    "ppc": Metric("PPC, price per click", "revenue", "clicks", up_is_good=None),
    "clicks_per_request": Metric("Clicks per request", "clicks", "requests"),
    "rpm_request": Metric("RPM per 1000 requests", "revenue", "requests", 1000.0),
    "response_ms": Metric("Response time, ms (mean)", "response_ms", "answered", up_is_good=False),
}
"""RPM per request and per impression differ by the page length, so both stand in the table under their own names."""

HEADLINE = ("ctr", "rpm", "roi", "ppc")

Primary = Literal["rpm", "ctr", "roi", "rpm_request"]


@dataclass(frozen=True, config=_STRICT)
class ExperimentPlan:
    """What was decided before the first user came."""

    control: str = "control"
    """Arm A."""
    treatment: str = "ega"
    """Arm B."""
    treatment_share: float = Field(0.5, gt=0, lt=1)
    """Planned share of arm B among the users of both arms."""
    others: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=dict)
    """Further treatments, each judged against the control like arm B, with their planned shares of all users; A and B share the rest. p of the deciding
    metric is then Holm's over all treatments."""
    primary: Primary = "rpm"
    """The metric that decides."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Two-sided error of the decision."""
    rule: Literal["fixed", "always_valid"] = "fixed"
    """fixed: one look at the planned size, Welch's test; always_valid: confidence sequence, any look may decide."""
    planned_users: int | None = Field(None, ge=2)
    """Users of both arms at which the test ends; null: all the traffic given is the whole test."""
    worth: float = Field(0.02, gt=0)
    """Least relative lift of the primary metric that is worth acting on."""
    guardrails: dict[Literal["ctr", "roi", "clicks_per_request", "rpm"], float] = Field(default_factory=lambda: {"ctr": 0.02, "roi": 0.05})
    """Greatest relative loss that is tolerated, by metric; passed if the lower bound of the lift is above minus this margin."""
    slow_answer_ms: float = Field(250.0, gt=0)
    """An answer is slow beyond this many milliseconds, as the client saw it."""
    service_margin: float = Field(0.01, gt=0)
    """Greatest tolerated rise of the share of slow or of degraded answers, absolute."""
    overcharge_margin: float = Field(0.01, gt=0)
    """Greatest tolerated excess of the treatment's charges over the critical (truthful) prices, relative."""
    calibration_margin: float = Field(0.10, gt=0)
    """Predicted over observed clicks may be off by this share before an alarm."""
    window_hours: float = Field(24.0, gt=0)
    """A click or purchase later than this after its impression does not count."""
    least_completeness: float = Field(0.999, gt=0, le=1)
    """Least share of what the clients saw that must be in the log."""
    most_crossed_users: float = Field(0.001, ge=0, lt=1)
    """Greatest share of users seen in two arms; beyond it the assignment is broken."""

    @model_validator(mode="after")
    def _check(self) -> ExperimentPlan:
        if self.control == self.treatment:
            raise ValueError(f"control and treatment must be two arms, got {self.control!r} twice")
        if {self.control, self.treatment} & set(self.others) or sum(self.others.values()) >= 1:
            raise ValueError(f"others must name further arms whose shares leave something for control and treatment, got {dict(self.others)}")
        if any(not 0 < margin < 1 for margin in self.guardrails.values()):
            raise ValueError(f"guardrail margins must lie in (0, 1), got {dict(self.guardrails)}")
        return self

    @property
    def treatments(self) -> tuple[str, ...]:
        """Arm B and the others."""
        return (self.treatment, *self.others)

    @property
    def shares(self) -> dict[str, float]:
        """Planned share of every arm among the users of all arms, control first."""
        rest = 1 - sum(self.others.values())
        return {self.control: rest * (1 - self.treatment_share), self.treatment: rest * self.treatment_share, **self.others}


@plain_dataclass(frozen=True)
class Verdict:
    """The first rule that applied."""

    code: Literal["invalid", "stop", "ship", "win_not_safe", "keep_running", "no_difference"]
    headline: str
    sentence: str
    reasons: list[str]


@plain_dataclass(frozen=True)
class Analysis:
    """Everything that the report shows and `ab_result.json` keeps. `users` is the per-user table of both arms, `days` sums by arm and day."""

    verdict: Verdict
    result: dict[str, Any]
    users: pd.DataFrame
    days: pd.DataFrame


def arm_estimate(users: pd.DataFrame, arm: str, numerator: str, denominator: str) -> ab_stats.Estimate:
    """A ratio of sums over the users of one arm; NaN for an arm or a column that is not there."""
    if numerator not in users or denominator not in users:
        return ab_stats.ratio_from_sums(0, 0, 0, 0, 0, 0)
    rows = users.loc[users["arm"] == arm]
    return ab_stats.ratio_per_user(rows[numerator].to_numpy(), rows[denominator].to_numpy())


def users_with_responses(users: pd.DataFrame, responses: pd.DataFrame | None, slow_answer_ms: float) -> pd.DataFrame:
    """Adds per-user sums of what the clients saw: answered, response_ms, slow, degraded (responses: one row an answered request)."""
    if responses is None or responses.empty:
        return users
    seen = responses.drop_duplicates("request_id").assign(answered=1.0, slow=lambda r: (r["response_ms"] > slow_answer_ms).astype(float))
    sums = seen.assign(degraded=seen["degraded"].astype(float)).groupby("user_id")[["answered", "response_ms", "slow", "degraded"]].sum().reset_index()
    joined = users.merge(sums, on="user_id", how="left")
    extra = ["answered", "response_ms", "slow", "degraded"]
    joined[extra] = joined[extra].fillna(0.0)
    return joined


def users_with_prices(users: pd.DataFrame, facts: Facts, prices: pd.DataFrame | None) -> pd.DataFrame:
    """Adds per-user sums of what shown ads were to pay for a click and of their critical prices, where both are known: charged, critical."""
    if prices is None or not prices["critical"].notna().any():
        return users
    known = prices[prices["critical"].notna()].drop_duplicates(["request_id", "slot"])
    rows = known.merge(facts.requests[["request_id", "user_id"]], on="request_id")
    sums = rows.groupby("user_id")[["charged", "critical"]].sum().reset_index()
    joined = users.merge(sums, on="user_id", how="left")
    joined[["charged", "critical"]] = joined[["charged", "critical"]].fillna(0.0)
    return joined


def _guardrail(
    name: str, label: str, value: float, low: float, high: float, limit: float, harmed: bool, relative: bool = False, users_needed: float = math.nan, unit: str = "%", exact_p: float | None = None
) -> dict[str, Any]:  # fmt: skip
    """One guardrail as the report shows it (F11). `relative`: a lift that must stay above `limit`; else a rise that must stay below it.
    `unit`: "%" for relative changes, "pp" (percentage points) for differences of shares."""
    passed = low > limit if relative else high < limit
    return {
        "name": name, "label": label, "value": value, "low": low, "high": high, "limit": limit, "passed": bool(passed), "harmed": bool(harmed), "relative": relative,
        "unit": unit, "users_needed": users_needed, "exact_p": exact_p,
    }  # fmt: skip


def _overcharge(users: pd.DataFrame, plan: ExperimentPlan) -> dict[str, Any] | None:
    """Guardrail of honest prices: charged over critical price of the treatment, upper bound below 1 + margin (F11)."""
    if "critical" not in users:
        return None
    estimate = arm_estimate(users, plan.treatment, "charged", "critical")
    if not (estimate.value > 0 and estimate.users > 1):
        return None
    off = ab_stats.lift(ab_stats.Estimate(1.0, 0.0, 10**9), estimate, plan.alpha)
    return _guardrail("charged_over_critical", "Charged over critical price", off.value, off.low, off.high, plan.overcharge_margin, off.low > plan.overcharge_margin)


def _lift_record(users: pd.DataFrame, name: str, plan: ExperimentPlan, planned: int) -> dict[str, Any]:
    metric = METRICS[name]
    a, b = (arm_estimate(users, arm, metric.numerator, metric.denominator) for arm in (plan.control, plan.treatment))
    shown, absolute, delta = ab_stats.lift(a, b, plan.alpha), ab_stats.difference(a, b, plan.alpha), ab_stats.lift_delta(a, b, plan.alpha)
    total = a.users + b.users
    sequence = ab_stats.always_valid(delta.value, delta.standard_error**2, total, planned, plan.alpha) if total else shown
    spread = np.nanmean([ab_stats.relative_spread(e) if e.value > 0 else math.nan for e in (a, b)]) if a.value > 0 or b.value > 0 else math.nan
    detectable = ab_stats.least_detectable_lift(spread, a.users, b.users) if spread > 0 and a.users and b.users else math.nan
    return {
        "metric": name,
        "label": metric.label,
        "control": a.value * metric.scale,
        "treatment": b.value * metric.scale,
        "lift": shown.value,
        "lift_low": shown.low,
        "lift_high": shown.high,
        "p": absolute.p_value,
        "difference": absolute.value * metric.scale,
        "difference_low": absolute.low * metric.scale,
        "difference_high": absolute.high * metric.scale,
        "always_valid_low": sequence.low,
        "always_valid_high": sequence.high,
        "always_valid_p": sequence.p_value,
        "relative_is_safe": bool(ab_stats.denominator_weakness(a, b, plan.alpha) <= ab_stats.WEAK_DENOMINATOR),
        "spread": float(spread),
        "least_detectable_lift": detectable,
    }


def _cuped_record(users: pd.DataFrame, before: pd.DataFrame | None, plan: ExperimentPlan) -> dict[str, Any] | None:
    """The primary lift with the users' own pre-period taken out: shown beside the plain one, which decides."""
    if before is None or before.empty:
        return None
    metric = METRICS[plan.primary]
    history = before.groupby("user_id")[SUMS].sum()
    arrays = []
    for arm in (plan.control, plan.treatment):
        rows = users.loc[users["arm"] == arm]
        past = history.reindex(rows["user_id"]).fillna(0.0)
        arrays += [tuple(frame[column].to_numpy() for column in (metric.numerator, metric.denominator)) for frame in (rows, past)]
    if min(len(pair[0]) for pair in arrays) < 2:
        return None
    adjusted = ab_stats.cuped(*arrays)
    shown = ab_stats.lift(adjusted.a, adjusted.b, plan.alpha)
    return {"metric": plan.primary, "lift": shown.value, "lift_low": shown.low, "lift_high": shown.high, "p": shown.p_value, "theta": adjusted.theta, "correlation": adjusted.correlation}


def _guardrails(users: pd.DataFrame, lifts: dict[str, dict[str, Any]], plan: ExperimentPlan, planned: int) -> list[dict[str, Any]]:
    """Proven by the plan's own interval, harmed only by the always-valid one: a guardrail may stop the test at any look."""
    records = []
    share = plan.treatment_share / (1 - plan.treatment_share)
    for name, margin in plan.guardrails.items():
        record = lifts[name]
        low, high = (record["always_valid_low"], record["always_valid_high"]) if plan.rule == "always_valid" else (record["lift_low"], record["lift_high"])
        needed = ab_stats.users_needed(record["spread"], -margin, share) * (1 + share) if record["spread"] > 0 else math.nan
        harmed = record["always_valid_high"] < -margin
        records.append(_guardrail(name, METRICS[name].label, record["lift"], low, high, -margin, harmed, relative=True, users_needed=needed))
    for name, label in (("slow", f"Answers slower than {plan.slow_answer_ms:g} ms"), ("degraded", "Degraded answers")):
        if name not in users:
            continue
        a, b = (arm_estimate(users, arm, name, "answered") for arm in (plan.control, plan.treatment))
        change = ab_stats.difference(a, b, plan.alpha)
        sequence = ab_stats.always_valid(change.value, change.standard_error**2, max(1, a.users + b.users), planned, plan.alpha)
        harmed = sequence.low > plan.service_margin
        records.append(_guardrail(name, label, change.value, change.low, change.high, plan.service_margin, harmed, unit="pp", exact_p=_exact_p(users, plan, name)))
    overcharge = _overcharge(users, plan)
    if overcharge is not None:
        records.append(overcharge)
    return records


def _exact_p(users: pd.DataFrame, plan: ExperimentPlan, name: str) -> float | None:
    """p that equally many users of both arms had such an answer, where the cases are too few for the normal law; None where they are not."""
    sides = [users[users["arm"] == arm] for arm in (plan.control, plan.treatment)]
    cases = [int((side[name] > 0).sum()) for side in sides]
    sizes = [len(side) for side in sides]
    if min(sizes) < 1 or min(cases) >= FEW_CASES or sum(cases) == 0:
        return None
    return ab_designs.exact_shares_p(cases[0], sizes[0], cases[1], sizes[1], "boschloo" if sum(sizes) <= MOST_FOR_BOSCHLOO else "fisher")


FEW_CASES = 10
"""Cases in an arm below which the normal law is not trusted."""
MOST_FOR_BOSCHLOO = 400
"""Users beyond which Fisher's test stands in for Boschloo's, which takes quadratic time; there the two hardly differ."""

EXACT_CALIBRATION = ab_stats.Estimate(1.0, 0.0, 10**9)


def _expected_calibration(before: pd.DataFrame | None, day_variance: float) -> ab_stats.Estimate:
    """Predicted over observed clicks of the reference period's last days; 1 where there is none."""
    if before is None or not before["clicks"].sum() > 0:
        return EXACT_CALIBRATION
    return integrity.with_day_variance(ab_stats.ratio_per_user(before["predicted"].to_numpy(), before["clicks"].to_numpy()), day_variance, CALIBRATION_DAYS)


def _calibration(users: pd.DataFrame, expected: dict[str, ab_stats.Estimate], plan: ExperimentPlan, day_variance: float, days: int) -> list[dict[str, Any]]:
    """Predicted over observed clicks of each arm. Expected is 1; of an arm whose policy wrote the reference logs, what it had just before (with that figure's own error)."""
    records = []
    for arm, wanted in expected.items():
        estimate = integrity.with_day_variance(arm_estimate(users, arm, "predicted", "clicks"), day_variance, days)
        own, off = ab_stats.lift(EXACT_CALIBRATION, estimate, plan.alpha), ab_stats.lift(wanted, estimate, plan.alpha)
        alarm = off.low > plan.calibration_margin or off.high < -plan.calibration_margin
        records.append({"arm": arm, "predicted_over_observed": estimate.value, "low": 1 + own.low, "high": 1 + own.high, "expected": wanted.value, "alarm": bool(alarm)})
    return records


def _percent(value: float, digits: int = 1, unit: str = "%") -> str:
    return "unknown" if not math.isfinite(value) else f"{100 * value:+.{digits}f} {unit}".replace("-", "\N{MINUS SIGN}")


def _interval(low: float, high: float, unit: str = "%") -> str:
    return f"{_percent(low, unit=unit)} to {_percent(high, unit=unit)}"


def _guardrail_text(record: dict[str, Any]) -> str:
    return f"{record['label']}: {_percent(record['value'], unit=record['unit'])} ({_interval(record['low'], record['high'], record['unit'])})"


def _broken(facts: Facts, users: pd.DataFrame, plan: ExperimentPlan, responses: pd.DataFrame | None, completeness: float | None) -> list[str]:
    """Rule 1: why the numbers must not be read."""
    counts, arms = facts.counts, tuple(plan.shares)
    reasons = integrity.split_problems(users, facts.requests, arms, list(plan.shares.values()))
    per_arm = {arm: int((users["arm"] == arm).sum()) for arm in arms}
    if min(per_arm.values()) < 2:
        reasons.append(f"An arm has fewer than two users ({', '.join(f'{arm} {n}' for arm, n in per_arm.items())}).")
    if completeness is not None and completeness < plan.least_completeness:
        reasons.append(f"The log holds {100 * completeness:.2f} % of what the clients saw; at least {100 * plan.least_completeness:g} % is needed.")
    reasons += integrity.lost_records(facts, arms, responses, plan.least_completeness)
    if counts.conflicting_impressions:
        reasons.append(f"{counts.conflicting_impressions} impressions name another ad for a slot that is already taken.")
    crossed = counts.users_in_two_arms / max(1, len(users) + counts.users_in_two_arms)
    if crossed > plan.most_crossed_users:
        reasons.append(f"{counts.users_in_two_arms} users were seen in two arms ({100 * crossed:.2f} %).")
    return reasons


def decide(
    plan: ExperimentPlan, lifts: dict[str, dict[str, Any]], guardrails: list[dict[str, Any]], broken: list[str], prices_above_bid: int, users: int, planned: int
) -> Verdict:
    """The verdict: the first rule that applies. Stopping for harm may use the always-valid bound at any time, and at the planned size also the plan's own."""
    main = lifts[plan.primary]  # p_decides: of the plan's rule, adjusted for the number of treatments
    name = METRICS[plan.primary].label.split(",")[0]
    arm = plan.treatment
    finished = users >= planned
    fixed = plan.rule == "fixed"
    low, high = (main["lift_low"], main["lift_high"]) if fixed else (main["always_valid_low"], main["always_valid_high"])
    p = main["p_decides"]
    sized = users >= ab_stats.SEQUENTIAL_LEAST_USERS
    may_decide = finished if fixed else sized
    result = f"{name} {_percent(main['lift'])} ({_interval(low, high)})"
    if broken:
        return Verdict("invalid", "Invalid: do not read the numbers", "The experiment is broken, so its lifts mean nothing. Mend the cause and start again with a new salt.", broken)
    if prices_above_bid:
        return Verdict("stop", "Stop: an advertiser was charged above the bid", f"{prices_above_bid} impressions carry a price above their bid. One such case ends a test.", [])
    harmed = [g for g in guardrails if g["harmed"] and sized]
    sequence_harm = sized and main["always_valid_high"] < 0
    if sequence_harm or (may_decide and high < 0):
        worst = main["always_valid_high"] if sequence_harm and not may_decide else high
        return Verdict("stop", f"Stop: {arm} loses {name}", f"{arm} loses at least {_percent(-worst).lstrip('+')} of {name}: {result}.", [])
    if harmed:
        reasons = [f"{_guardrail_text(g)}, limit {_percent(g['limit'], unit=g['unit'])}." for g in harmed]
        return Verdict("stop", f"Stop: {arm} breaks a guardrail", f"{harmed[0]['label']} is beyond its limit. {result}.", reasons)
    unproven = [g for g in guardrails if not g["passed"]]
    if may_decide and main["lift"] > 0 and p < plan.alpha:
        if not unproven:
            safe = "; ".join(f"{METRICS[n].label.split(',')[0]} not worse than {_percent(-m, 0)}" for n, m in plan.guardrails.items())
            return Verdict("ship", f"Ship {arm}: {name} {_percent(main['lift'])}", f"{result}{'; ' + safe if safe else ''}.", [])
        reasons = []
        for g in unproven:
            text = f"{_guardrail_text(g)}, must be shown to stay {'above' if g['relative'] else 'below'} {_percent(g['limit'], unit=g['unit'])}"
            more = f"; about {max(0, math.ceil(g['users_needed']) - users):,} more users" if math.isfinite(g["users_needed"]) and g["users_needed"] > users else ""
            reasons.append(f"{text}{more}.")
        return Verdict("win_not_safe", f"A win, not yet safe: {name} {_percent(main['lift'])}", f"{result}, but not every guardrail is proven.", reasons)
    if not finished:
        return Verdict(
            "keep_running",
            "Keep running",
            f"{users:,} of {planned:,} planned users. So far {result}; a test of this size finds lifts from {_percent(main['least_detectable_lift'])} on.",
            [],
        )
    return Verdict(
        "no_difference",
        f"No difference shown in {name}",
        f"The true lift is between {_percent(low)} and {_percent(high)}; worth acting on is {_percent(plan.worth, 0)}.",
        ["This is not proof of no effect: the interval holds every lift that the data allow."],
    )


def _by_day(facts: Facts, arms: tuple[str, str], alpha: float) -> pd.DataFrame:
    """CTR and RPM by arm and day with user-clustered intervals."""
    users = per_user(facts, by=["day"])
    records = []
    for (arm, day), rows in users[users["arm"].isin(arms)].groupby(["arm", "day"], observed=True):
        record = {"arm": arm, "day": day.strftime("%Y-%m-%d"), "users": len(rows), "imps": rows["imps"].sum(), "clicks": rows["clicks"].sum()}
        for name in ("ctr", "rpm"):
            metric = METRICS[name]
            estimate = ab_stats.ratio_per_user(rows[metric.numerator].to_numpy(), rows[metric.denominator].to_numpy())
            half = 1.96 * math.sqrt(estimate.variance) * metric.scale if estimate.variance >= 0 else math.nan
            value = estimate.value * metric.scale
            record |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
        records.append(record)
    columns = ["arm", "day", "users", "imps", "clicks", *[f"{m}{s}" for m in ("ctr", "rpm") for s in ("", "_low", "_high")]]
    return pd.DataFrame(records, columns=columns)


def analyse(
    facts: Facts,
    plan: ExperimentPlan,
    responses: pd.DataFrame | None = None,
    completeness: float | None = None,
    before: Facts | None = None,
    false_alarm_rate: float = 0.001,
    prices: pd.DataFrame | None = None,
) -> Analysis:
    """Numbers by arm, lifts, guardrails, calibration, segments and the verdict.

    Args: facts of the experiment; responses, one row an answered request as clients saw it (request_id, user_id, arm, response_ms, degraded); completeness,
    share of the clients' impressions, clicks and purchases that the log holds; before, facts of the reference period (for CUPED and the calibration of an
    arm with the same policy); false_alarm_rate, of the calibration of a clean day; prices, (request_id, slot, charged, critical) of the ads shown.
    Raises ValueError if the facts hold neither arm.
    """
    arms = tuple(plan.shares)
    found = sorted(facts.requests["arm"].unique())
    if not {plan.control, plan.treatment} & set(found):
        raise ValueError(f"the logs hold no request of arm {arms[0]!r} or {arms[1]!r}; arms found: {', '.join(found) or 'none'}; name them in the plan (control, treatment)")
    users = per_user(facts)
    users = users_with_responses(users[users["arm"].isin(arms)].reset_index(drop=True), responses, plan.slow_answer_ms)
    users = users_with_prices(users, facts, prices)
    past, recent = (None, None) if before is None else (per_user(before), per_user(_last_days(before)))
    broken = _broken(facts, users, plan, responses, completeness)
    pairs = [dataclasses.replace(plan, treatment=arm, others={}) for arm in plan.treatments]
    judged = _judge(facts, users, pairs, broken, plan.planned_users)
    main = judged[plan.treatment]
    day_variance = 0.0 if before is None else integrity.calibration_day_variance(before)
    expected = {arm: _expected_calibration(recent, day_variance) if before is not None and policies(facts, arm) <= policies(before) else EXACT_CALIBRATION for arm in arms}
    counts = [int((users["arm"] == arm).sum()) for arm in arms]
    shares = list(plan.shares.values())
    known_users = None if past is None else set(past["user_id"])
    shown = {name: (METRICS[name].label, METRICS[name].numerator, METRICS[name].denominator) for name in dict.fromkeys(("ctr", plan.primary))}
    groups = [(f"arm {arm}", (arm,), expected[arm]) for arm in arms]
    same = [arm for arm in arms if expected[arm] is not EXACT_CALIBRATION]
    if len(same) > 1:
        groups.append((f"arms {', '.join(same)}", tuple(same), expected[same[0]]))
    result = {
        **main,
        "treatment": plan.treatment,
        "all_users": len(users),
        "arms": {arm: _arm_record(users, facts, arm, n) for arm, n in zip(arms, counts, strict=True)},
        "treatments": {arm: {**record, "verdict": record["verdict"].__dict__} for arm, record in judged.items()},
        "verdict": main["verdict"].__dict__,
        "primary": plan.primary,
        "alpha": plan.alpha,
        "rule": plan.rule,
        "calibration": _calibration(users, expected, plan, day_variance, facts.requests["day"].nunique()),
        "calibration_alarms": integrity.calibration_by_day(facts, groups, plan.calibration_margin, false_alarm_rate, day_variance),
        "traffic_alarms": integrity.short_traffic(users, past, arms),
        "segments": segments.segment_lifts(facts, plan.control, plan.treatment, shown, plan.alpha, known_users),
        "novelty": novelty(facts, plan),
        "cuped": _cuped_record(users, past, plan),
        "sample_ratio": {
            "p": ab_stats.sample_ratio_p(counts, shares),
            "log_bayes": ab_stats.sample_ratio_log_bayes(counts, shares),
            "passed": ab_stats.sample_ratio_p(counts, shares) >= ab_stats.SRM_ALARM,
        },
        "completeness": completeness,
        "counts": facts.counts.__dict__,
    }
    return Analysis(main["verdict"], result, users, _by_day(facts, arms, plan.alpha))


def _judge(facts: Facts, users: pd.DataFrame, pairs: list[ExperimentPlan], broken: list[str], planned_users: int | None) -> dict[str, dict[str, Any]]:
    """Lifts, guardrails and verdict of every treatment against the control; p of the deciding metric is Holm's over the treatments."""
    records: dict[str, dict[str, Any]] = {}
    for plan in pairs:
        mine = users[users["arm"].isin((plan.control, plan.treatment))]
        planned = planned_users or max(2, len(mine))
        names = [name for name, metric in METRICS.items() if metric.numerator in users]
        lifts = {name: _lift_record(mine, name, plan, planned) for name in names}
        secondary = [name for name in names if name != plan.primary and math.isfinite(lifts[name]["p"])]
        for name, adjusted in zip(secondary, ab_stats.adjust_p_values([lifts[n]["p"] for n in secondary], "bh"), strict=True):
            lifts[name]["p_adjusted"] = float(adjusted)
        by_days = _with_day_shocks(facts, plan)
        records[plan.treatment] = {"users": len(mine), "planned_users": planned, "lifts": lifts, "guardrails": _guardrails(mine, lifts, plan, planned), "day_shocks": by_days}
    raw = {arm: record["lifts"][pairs[0].primary]["p" if pairs[0].rule == "fixed" else "always_valid_p"] for arm, record in records.items()}
    known = [arm for arm, p in raw.items() if math.isfinite(p)]
    holm = dict(zip(known, ab_stats.adjust_p_values([raw[arm] for arm in known], "holm"), strict=True)) if known else {}
    for plan in pairs:
        record = records[plan.treatment]
        record["lifts"][plan.primary]["p_decides"] = float(holm.get(plan.treatment, math.nan))
        record["verdict"] = decide(plan, record["lifts"], record["guardrails"], broken, facts.counts.prices_above_bid, record["users"], record["planned_users"])
    return records


def _with_day_shocks(facts: Facts, plan: ExperimentPlan) -> dict[str, Any] | None:
    """The deciding lift with its days as draws (F9): what may be said about days that were not in the test. None below `LEAST_SHOCK_DAYS` days."""
    metric = METRICS[plan.primary]
    users = per_user(facts, by=["day"])
    rows = users[users["arm"].isin((plan.control, plan.treatment))]
    if rows["day"].nunique() < LEAST_SHOCK_DAYS or metric.numerator not in rows:
        return None
    treated = (rows["arm"] == plan.treatment).to_numpy()
    got = ab_designs.lift_with_day_shocks(rows[metric.numerator].to_numpy(), rows[metric.denominator].to_numpy(), treated, rows["user_id"].to_numpy(), rows["day"].to_numpy(), plan.alpha)
    return {"lift": got.value, "lift_low": got.low, "lift_high": got.high, "p": got.p_value, "days": rows["day"].nunique()}


LEAST_SHOCK_DAYS = 5
"""Days below which an interval over days is not shown: Student's t with two degrees says nothing useful."""


def novelty(facts: Facts, plan: ExperimentPlan) -> dict[str, Any] | None:
    """CTR lift on each user's first day against the same users' later days: a lift that fades is a novelty, not a gain.

    Users who came on two days or more only; the difference of the two log lifts, with the user as unit (delta method on both). None for a single day.
    """
    users = per_user(facts, by=["day"])
    users = users[users["arm"].isin((plan.control, plan.treatment))]
    first = users["day"] == users.groupby("user_id")["day"].transform("min")
    returning = users["user_id"].isin(users.loc[~first, "user_id"])
    if not returning.any():
        return None
    sums = {side: users[returning & mask].groupby(["arm", "user_id"])[["clicks", "imps"]].sum() for side, mask in (("first", first), ("later", ~first))}
    both = sums["first"].join(sums["later"], lsuffix="_first", rsuffix="_later", how="inner")
    lifts, residuals = {}, {}
    for arm in (plan.control, plan.treatment):
        if arm not in both.index.get_level_values(0) or len(both.loc[arm]) < 2:
            return None
        rows = both.loc[arm]
        logs, linear = {}, {}
        for side in ("first", "later"):
            x, y = rows[f"clicks_{side}"].to_numpy(), rows[f"imps_{side}"].to_numpy()
            if x.sum() <= 0 or y.sum() <= 0:
                return None
            logs[side], linear[side] = math.log(x.sum() / y.sum()), x / x.mean() - y / y.mean()
        lifts[arm] = logs
        residuals[arm] = np.var(linear["first"] - linear["later"], ddof=1) / len(rows)
    change = {side: lifts[plan.treatment][side] - lifts[plan.control][side] for side in ("first", "later")}
    z = (change["first"] - change["later"]) / math.sqrt(sum(residuals.values())) if sum(residuals.values()) > 0 else 0.0
    return {"first_day_lift": math.expm1(change["first"]), "later_lift": math.expm1(change["later"]), "p": 2 * float(norm.sf(abs(z))), "users": len(both)}


CALIBRATION_DAYS = 3
"""Last reference days that give the control's calibration target: a policy that learns overnight is compared with its recent self."""


def _last_days(facts: Facts) -> Facts:
    days = sorted(facts.requests["day"].unique())[-CALIBRATION_DAYS:]
    return Facts(facts.requests[facts.requests["day"].isin(days)], facts.impressions[facts.impressions["day"].isin(days)], facts.counts)


def policies(facts: Facts, arm: str | None = None) -> set[str]:
    """Policies (model_version) that answered, of one arm or of all."""
    rows = facts.requests if arm is None else facts.requests[facts.requests["arm"] == arm]
    return set(rows["model_version"].unique())


def _arm_record(users: pd.DataFrame, facts: Facts, arm: str, count: int) -> dict[str, Any]:
    rows = users.loc[users["arm"] == arm]
    sums = rows[[column for column in [*SUMS, "answered", "response_ms", "slow", "degraded"] if column in rows]].sum()
    values = {name: arm_estimate(users, arm, metric.numerator, metric.denominator).value * metric.scale for name, metric in METRICS.items() if metric.numerator in users}
    return {"users": count, "policies": sorted(policies(facts, arm)), **{k: float(v) for k, v in sums.items()}, **values}
