"""The report as one static HTML page: no script, no external asset, readable in light and dark, on paper and on a phone.

Plots are drawn with CSS and inline SVG in the page's own colours. Every text from the logs (arm names, policies) is escaped.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

import pandas as pd

from monitoring.drift import METHOD_NAMES, DriftRow
from monitoring.verdict import HEADLINE, METRICS, ExperimentPlan

_TONE = {"ship": "good", "win_not_safe": "warn", "keep_running": "calm", "no_difference": "calm", "stop": "bad", "invalid": "bad"}

_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#16191d;--soft:#5b6470;--line:#dde1e6;--a:#7a8594;--b:#1f5fd0;--good:#137a3f;--warn:#a15c00;--bad:#b3261e;--calm:#46515e;--band:#eef1f5}
@media (prefers-color-scheme:dark){:root{--page:#111418;--card:#1a1e24;--ink:#e8eaed;--soft:#9aa4b1;--line:#2c333c;--a:#8f9aa8;--b:#79a8ff;--good:#58c487;--warn:#e2a54a;--bad:#ff8a80;--calm:#a9b4c1;--band:#20262e}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1240px;margin:0 auto;padding:14px 20px 56px}
header{display:flex;flex-wrap:wrap;gap:2px 16px;justify-content:space-between;color:var(--soft);font-size:13px;margin-bottom:10px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em;text-wrap:balance}
h2{font-size:17px;margin:0 0 8px}
p{margin:0 0 8px;max-width:78ch}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 20px;margin-bottom:14px}
.first{display:grid;grid-template-columns:minmax(0,7fr) minmax(0,4fr);gap:14px}
.verdict{border-left:6px solid var(--tone)}.verdict h1{color:var(--tone)}.verdict p{font-size:16px;margin:0;max-width:none}.verdict li{max-width:none}
.good{--tone:var(--good)}.warn{--tone:var(--warn)}.bad{--tone:var(--bad)}.calm{--tone:var(--calm)}
ul{margin:8px 0 0;padding-left:20px}li{margin:2px 0;max-width:90ch}
.soft,small{color:var(--soft);font-size:13px}
table{border-collapse:collapse;width:100%}
th{font-weight:600;font-size:13px;color:var(--soft);text-align:right;padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:bottom}
td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right;vertical-align:middle}
tbody tr:last-child td{border-bottom:0}
th:first-child,td:first-child,.left{text-align:left}
td:first-child{font-weight:500}
.primary td{background:var(--band)}
.arms td:not(:first-child),.arms th{white-space:nowrap}
.arms td:first-child b{font-weight:600;font-size:16px}.arms td:first-child small,.lift b{display:block;line-height:1.3}.lift small,.arms td:first-child b{white-space:nowrap}
.arms td:first-child{width:23%}.plot{width:27%}
.sure{margin:10px 0 0;max-width:none}
.track{position:relative;height:26px}
.track i{position:absolute;top:0;bottom:0;width:1px;background:var(--line)}
.track i.zero{background:var(--soft)}
.track s{position:absolute;top:11px;height:4px;border-radius:2px;background:var(--b);opacity:.55}
.track u{position:absolute;top:8px;width:10px;height:10px;margin-left:-5px;border-radius:50%;background:var(--b);box-shadow:0 0 0 2px var(--card)}
.primary .track u{box-shadow:0 0 0 2px var(--band)}
.axis{position:relative;height:18px;font-size:12px;color:var(--soft)}.axis span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.key{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px}.key.a{background:var(--a)}.key.b{background:var(--b)}
.trends{display:grid;gap:6px}.trends svg{max-height:168px}
li.more{color:var(--soft)}
.whole{white-space:nowrap}
figure{margin:0}figcaption{font-weight:600;margin-bottom:6px}
svg{display:block;width:100%;height:auto}svg text{font-size:12px;fill:var(--soft)}
svg .grid{stroke:var(--line)}svg .a{stroke:var(--a);fill:var(--a)}svg .b{stroke:var(--b);fill:var(--b)}svg path{fill:none!important;stroke-width:2}svg .band{stroke-width:1.5;opacity:.6}
.state{font-weight:600;color:var(--tone)}
dl{display:grid;grid-template-columns:auto 1fr;gap:4px 16px;margin:0}dt{color:var(--soft)}dd{margin:0}
footer{color:var(--soft);font-size:13px}
a{color:var(--b)}
@media (max-width:760px){
 main{padding:12px 12px 40px}.card{padding:12px 14px;margin-bottom:10px}h1{font-size:20px}.verdict p{font-size:15px}.verdict li{font-size:14px}.first{grid-template-columns:1fr;gap:0}
 .arms thead,.arms td.p{display:none}
 .arms tr{display:grid;grid-template-columns:minmax(0,19fr) minmax(0,19fr) minmax(0,60fr);padding:5px 0;border-bottom:1px solid var(--line)}
 .arms tr:last-child{border-bottom:0}
 .arms td{border:0;padding:0 4px;text-align:left}
 .arms td:first-child{grid-column:1/3;width:auto}.arms td:first-child b{font-size:15px}.arms td:first-child small{font-size:12px;line-height:1.2}
 .arms td[data-arm]{grid-row:2;align-self:end}.arms td[data-arm]::before{content:attr(data-arm);display:block;font-size:12px;line-height:1.2;color:var(--soft);overflow:hidden;text-overflow:ellipsis}
 .arms td.lift{grid-area:1/3;text-align:right}.arms td.lift b{display:inline;margin-right:4px}.arms td.lift small{font-size:12px}
 .arms td.plot{grid-area:2/3;width:auto;align-self:center;text-align:right}
 .primary{background:var(--band)}
 .stack thead{display:none}.stack tr{display:block;padding:8px 0;border-bottom:1px solid var(--line)}.stack tr:last-child{border:0}
 .stack .whole{white-space:normal}
 .stack td{display:flex;justify-content:space-between;gap:16px;border:0;padding:1px 0;text-align:right}
 .stack td:first-child{font-weight:600}.stack td[data-name]::before{content:attr(data-name);color:var(--soft);font-weight:400;text-align:left}
}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""


def percent(value: float | None, digits: int = 1) -> str:
    """+1.2 % with a true minus sign; a dash for what is unknown."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{100 * value:+.{digits}f} %".replace("-", "\N{MINUS SIGN}")


def number(value: float | None) -> str:
    """Four significant digits, thousands separated; a dash for what is unknown."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"


def p_text(p: float | None) -> str:
    return "\N{EN DASH}" if p is None or not math.isfinite(p) else ("< 0.001" if p < 0.001 else f"{p:.3f}")


def interval_name(result: dict[str, Any]) -> str:
    """What the intervals are, e.g. "95 % interval"."""
    return f"{100 * (1 - result['alpha']):g} % interval"


def shown_first(result: dict[str, Any]) -> list[str]:
    """Metrics of the first screen: the one that decides, then the usual ones."""
    return list(dict.fromkeys((result["primary"], *HEADLINE)))


def _axis_limit(records: list[dict[str, Any]]) -> float:
    """Half-width of the lift plots' common axis: a round share that holds the headline intervals, at most 100 %."""
    reach = [abs(record[k]) for record in records for k in ("lift_low", "lift_high") if math.isfinite(record[k])]
    wanted = max(reach, default=0.1)
    return next((limit for limit in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75) if wanted <= limit), 1.0)


def _place(value: float, limit: float) -> float:
    return 50 + 50 * max(-1.0, min(1.0, value / limit))


def _axis_text(value: float, limit: float) -> str:
    return "0" if value == 0 else percent(value, 0 if limit >= 0.1 and limit * 50 == int(limit * 50) else 1)


def _track(record: dict[str, Any], limit: float) -> str:
    if not (math.isfinite(record["lift_low"]) and math.isfinite(record["lift_high"])):
        return ""
    if abs(record["lift"]) > limit:
        return '<small>beyond this scale</small>'
    low, high, middle = (_place(record[k], limit) for k in ("lift_low", "lift_high", "lift"))
    lines = "".join(f'<i style="left:{x}%"{" class=zero" if x == 50 else ""}></i>' for x in (0, 25, 50, 75, 100))
    label = escape(f"{record['label']}: {percent(record['lift'])}, interval {percent(record['lift_low'])} to {percent(record['lift_high'])}")
    return f'<div class="track" role="img" aria-label="{label}">{lines}<s style="left:{low:.2f}%;width:{max(high - low, 0.4):.2f}%"></s><u style="left:{middle:.2f}%"></u></div>'


def _name(label: str) -> str:
    """A metric's short name, and below it what it is per."""
    short, mark, rest = label.partition(", ") if ", " in label else label.partition(" ")
    return f"<b>{escape(short)}</b> <small>{escape(rest)}</small>" if mark else f"<b>{escape(short)}</b>"


def _arms_table(result: dict[str, Any], control: str, treatment: str, names: list[str], counts: bool) -> str:
    """The named metrics of both arms with their lifts; `counts`: users, requests and impressions above them."""
    lifts, arms = result["lifts"], result["arms"]
    limit = _axis_limit([lifts[name] for name in shown_first(result)])
    a, b = escape(control), escape(treatment)

    def row(label: str, values: tuple[str, str], lift: str = "", plot: str = "", p: str = "", mark: str = "") -> str:
        return (
            f'<tr{mark}><td>{label}</td><td data-arm="{a}">{values[0]}</td><td data-arm="{b}">{values[1]}</td>'
            f'<td class="lift">{lift}</td><td class="plot">{plot}</td><td class="p">{p}</td></tr>'
        )

    def metric_row(name: str) -> str:
        record = lifts[name]
        unit = f" {METRICS[name].unit}" if METRICS[name].unit else ""
        values = tuple(f"{number(record[side])}{unit if math.isfinite(record[side]) else ''}" for side in ("control", "treatment"))
        if record["relative_is_safe"]:
            lift = f"<b>{percent(record['lift'])}</b><small>{percent(record['lift_low'])} to {percent(record['lift_high'])}</small>"
            plot = _track(record, limit)
        else:
            bounds = f"{number(record['difference_low'])} to {number(record['difference_high'])}".replace("-", "\N{MINUS SIGN}")
            lift, plot = f"<b>{number(record['difference'])}</b><small>difference, {bounds}</small>".replace("<b>-", "<b>\N{MINUS SIGN}"), ""
        mark = ' class="primary"' if name == result["primary"] else ""
        label = _name(record["label"]).replace("</small>", " \N{MIDDLE DOT} decides</small>" if name == result["primary"] else "</small>")
        return row(label, values, lift, plot, p_text(record["p_decides"] if name == result["primary"] else record.get("p_adjusted")), mark)

    sizes = "".join(row(label, tuple(number(arms[arm][key]) for arm in (control, treatment))) for label, key in (("Users", "users"), ("Requests", "requests"), ("Impressions", "imps")))
    axis = "".join(f'<span style="left:{_place(x, limit):.0f}%">{_axis_text(x, limit)}</span>' for x in (-limit / 2, 0, limit / 2))
    return (
        f'<table class="arms"><thead><tr><th></th><th><span class="key a"></span>{a}</th><th><span class="key b"></span>{b}</th><th>lift, {interval_name(result)}</th>'
        f'<th class="plot"><div class="axis">{axis}</div></th><th>p</th></tr></thead><tbody>{sizes if counts else ""}{"".join(metric_row(n) for n in names)}</tbody></table>'
    )


def _sureness(result: dict[str, Any]) -> str:
    """Below the lifts: how far the deciding one may be watched, what this size finds, what the users' past says."""
    main = result["lifts"][result["primary"]]
    texts = [f"Always valid, for daily looks: {percent(main['always_valid_low'])} to {percent(main['always_valid_high'])}"]
    if result["cuped"]:
        texts.append(f"with the users\N{RIGHT SINGLE QUOTATION MARK} own past taken out (CUPED): {percent(result['cuped']['lift'])} ({percent(result['cuped']['lift_low'])} to {percent(result['cuped']['lift_high'])})")
    texts.append(f"this size finds lifts from {percent(main['least_detectable_lift'])} on")
    return f'<p class="soft sure">{escape(_name_of(main))}. {escape("; ".join(texts))}.</p>'


def _name_of(record: dict[str, Any]) -> str:
    return str(record["label"]).split(",")[0]


def _nice_step(span: float) -> float:
    raw = span / 4 if span > 0 else 1.0
    power = 10 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if raw <= power * m)


def _trend(days: pd.DataFrame, name: str, control: str, treatment: str) -> str:
    """A metric by day and arm with 95 % intervals, as inline SVG."""
    dates = sorted(days["day"].unique())
    values = days[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)
    finite = values[~pd.isna(values)]
    if not dates or not len(finite):
        return "<p class=soft>No impressions.</p>"
    step = _nice_step(finite.max() - min(finite.min(), finite.max() * 0.98))
    low, high = math.floor(finite.min() / step) * step, math.ceil(finite.max() / step) * step
    low, high = max(low, 0.0), high if high > low else low + step
    width, height, left, top, bottom = 440, 168, 44, 8, 22

    def x(index: int, shift: float) -> float:
        return left + (width - left - 8) * (index + 0.5) / len(dates) + shift

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - (value - low) / (high - low))

    parts = []
    tick = low
    while tick <= high + step / 2:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/><text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
        tick += step
    every = math.ceil(len(dates) / 6)
    for index, day in enumerate(dates):
        if index % every == 0:
            parts.append(f'<text x="{x(index, 0):.1f}" y="{height - 6}" text-anchor="middle">{escape(day[5:])}</text>')
    for css, arm, shift in (("a", control, -4.0), ("b", treatment, 4.0)):
        rows = days[days["arm"] == arm].set_index("day")
        points = [(x(i, shift), rows.loc[d]) for i, d in enumerate(dates) if d in rows.index and math.isfinite(rows.loc[d, name])]
        if len(points) > 1:
            path = " ".join(f"{'M' if i == 0 else 'L'}{at:.1f} {y(row[name]):.1f}" for i, (at, row) in enumerate(points))
            parts.append(f'<path class="{css}" d="{path}"/>')
        for at, row in points:
            bounds = [min(max(y(row[f"{name}_{side}"]), top), height - bottom) for side in ("low", "high") if math.isfinite(row[f"{name}_{side}"])]
            if len(bounds) == 2:
                parts.append(f'<line class="{css} band" x1="{at:.1f}" x2="{at:.1f}" y1="{bounds[0]:.1f}" y2="{bounds[1]:.1f}"/>')
            parts.append(f'<circle class="{css}" cx="{at:.1f}" cy="{y(row[name]):.1f}" r="4"><title>{escape(arm)} {escape(row.name)}: {number(row[name])}</title></circle>')
    title = escape(f"{METRICS[name].label} by day")
    unit = f", {METRICS[name].unit}" if METRICS[name].unit else ""
    return f'<figure><figcaption>{title}{unit}</figcaption><svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(parts)}</svg></figure>'


def _state(good: bool, yes: str, no: str) -> str:
    tone, text = ("good", yes) if good else ("bad", no)
    return f'<span class="state {tone}">{text}</span>'


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """A table that becomes a list of cards on a narrow screen. Cells are HTML."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + f"<td>{r[0]}</td>" + "".join(f'<td data-name="{escape(h)}">{c}</td>' for h, c in zip(heads[1:], r[1:], strict=True)) + "</tr>" for r in rows)
    return f'<table class="stack"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _guardrail_card(result: dict[str, Any], plan: ExperimentPlan) -> str:
    rows = []
    for g in result["guardrails"]:
        exact = f"; exact p {p_text(g['exact_p'])}" if g["exact_p"] is not None else ""
        value, low, high, bound = (percent(g[key]).replace("%", g["unit"]) for key in ("value", "low", "high", "limit"))
        rows.append([escape(g["label"]), value, f"{low} to {high}{exact}", f"{'above' if g['relative'] else 'below'} {bound}", _state(g["passed"], "proven", "harmed") if g["passed"] or g["harmed"] else '<span class="state warn">not proven</span>'])
    for c in result["calibration"]:
        value = number(c["predicted_over_observed"])
        rows.append([f"Predicted over observed clicks, {escape(c['arm'])}", value, f"{number(c['low'])} to {number(c['high'])}", f"near {number(c['expected'])}", _state(not c["alarm"], "in range", "off")])
    ratio = result["sample_ratio"]
    rows.append(["Users split as planned", f"p = {p_text(ratio['p'])}", "", "p at least 0.0005", _state(ratio["passed"], "yes", "no: invalid")])
    if result["completeness"] is not None:
        rows.append(["Log holds what clients saw", f"{100 * result['completeness']:.2f} %", "", f"at least {100 * plan.least_completeness:g} %", _state(result["completeness"] >= plan.least_completeness, "yes", "no: invalid")])
    return f'<section class="card"><h2>Checks and guardrails</h2>{_table(["", "value", interval_name(result), "wanted", "state"], rows)}</section>'


def _drift_card(rows: list[DriftRow], note: str) -> str:
    if not rows:
        return f'<section class="card"><h2>Drift</h2><p>{escape(note)}</p></section>'
    cells = []
    for row in sorted(rows, key=lambda r: (not r.drifted, r.group, r.name)):
        state = f'<span class="state calm">{escape(row.note)}</span>' if row.note else _state(not row.drifted, "steady", "drift" + (f" ({', '.join(row.days)})" if row.days else ""))
        score = number(round(row.score, 3)) if math.isfinite(row.score) else "\N{EN DASH}"
        shown = [f'<span class="whole">{escape(text)}</span>' for text in (row.current_summary, row.reference_summary, METHOD_NAMES[row.method])]
        cells.append([escape(row.name), *shown, score, number(round(row.threshold, 3)), state])
    heads = ["median (10 to 90 %)", "experiment", "reference", "method", "score", "alarm above", "state"]
    return f'<section class="card"><h2>Drift against the reference period</h2><p class="soft">{escape(note)}</p>{_table(heads, cells)}</section>'


def _service_card(experiment: dict[str, Any] | None) -> str:
    if experiment is None:
        return ""
    rows = [
        [escape(arm), f"{number(v['answered'])}", f"{v['p50_ms']:.1f}", f"{v['p95_ms']:.1f}", f"{v['p99_ms']:.1f}", f"{number(v['degraded'])}"] for arm, v in sorted(experiment["arms"].items())
    ]
    text = f"{number(experiment['requests'])} requests sent, {number(experiment['errors'])} failed, {number(experiment['retries'])} retries after 429 or 503."
    return f'<section class="card"><h2>The service, as its clients saw it</h2><p class="soft">{text}</p>{_table(["arm", "answers", "p50 ms", "p95 ms", "p99 ms", "degraded"], rows)}</section>'


_COUNT_TEXT = {
    "duplicate_requests": "repeated requests, merged",
    "duplicate_impressions": "repeated impressions, merged",
    "duplicate_events": "repeated clicks and purchases, merged",
    "conflicting_impressions": "impressions that name another ad for a taken slot",
    "orphan_impressions": "impressions without their request, left out",
    "orphan_clicks": "clicks without their impression, left out",
    "orphan_purchases": "purchases without a counted click, left out",
    "late_events": "clicks and purchases after the window, left out",
    "skewed_events": "clicks stamped before their impression, counted",
    "impossible_events": "clicks stamped long before their impression, left out",
    "prices_above_bid": "prices above their bid",
    "users_in_two_arms": "users seen in two arms, left out",
}


def _notes_card(result: dict[str, Any], plan: ExperimentPlan) -> str:
    main, counts = result["lifts"][result["primary"]], result["counts"]
    rule = "one look at the planned size (Welch's test on per-user sums)" if result["rule"] == "fixed" else "the always-valid interval, at any look"
    rows = [
        ("Unit", "the user; ratios of sums over users, variance by the delta method, log interval for lifts"),
        ("Decided by", f"{escape(main['label'])}, {rule}, two-sided error {100 * plan.alpha:g} %; p of the other metrics is adjusted (Benjamini-Hochberg)"),
        ("May be watched daily", f"always-valid interval of the deciding lift: {percent(main['always_valid_low'])} to {percent(main['always_valid_high'])}"),
        ("This size finds", f"lifts of {escape(main['label'])} from {percent(main['least_detectable_lift'])} on, four times out of five"),
    ]
    if result["day_shocks"]:
        d = result["day_shocks"]
        rows.append(("Other days than these", f"{percent(d['lift'])} ({percent(d['lift_low'])} to {percent(d['lift_high'])}) if the {d['days']} days are draws like the users; shown, does not decide"))
    if result["novelty"]:
        n = result["novelty"]
        fades = "; the effect changes with habit: run longer before deciding" if n["p"] < 0.01 else ""
        rows.append(("Novelty", f"CTR lift {percent(n['first_day_lift'])} on a user's first day, {percent(n['later_lift'])} later (p of the difference {p_text(n['p'])}, {number(n['users'])} returning users){fades}"))
    if result["cuped"]:
        c = result["cuped"]
        text = f"{percent(c['lift'])} ({percent(c['lift_low'])} to {percent(c['lift_high'])}), correlation with the pre-period {c['correlation']:.2f}; shown, does not decide"
        rows.append(("With the users' own past taken out (CUPED)", text))
    rows.append(("Counted", f"clicks and purchases within {plan.window_hours:g} h of their impression: {number(counts['clicks'])} clicks, {number(counts['purchases'])} purchases; observed only, no simulator truth"))
    odd = "; ".join(f"{number(counts[key])} {text}" for key, text in _COUNT_TEXT.items() if counts[key]) or "nothing"
    rows.append(("Did not fit", odd))
    return '<section class="card"><h2>How this was computed</h2><dl>' + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in rows) + "</dl></section>"


def plain_page(title: str, headline: str, sentence: str, heads: list[str], rows: list[list[str]]) -> str:
    """A page with one sentence and one table, in the report's style. Cells are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(headline)}</title><style>{_STYLE}</style></head>\n<body><main><header><span>{escape(title)}</span></header>"
        f'<section class="card verdict calm"><h1>{escape(headline)}</h1><p>{escape(sentence)}</p></section><section class="card">{_table(heads, rows)}</section></main></body></html>\n'
    )


FIRST_TEXTS, SHORT_TEXT = 3, 190
"""Reasons and alarms on the first screen, and their longest text in characters; a card below has all of them."""
TRENDS = ("ctr", "rpm", "roi")


def _short(text: str) -> str:
    return text if len(text) <= SHORT_TEXT else text[:SHORT_TEXT].rsplit(" ", 1)[0] + " \N{HORIZONTAL ELLIPSIS}"


def _alarms_card(texts: list[str]) -> str:
    if len(texts) <= FIRST_TEXTS and all(_short(text) == text for text in texts):
        return ""
    return f'<section class="card" id="alarms"><h2>Reasons and alarms</h2><ul>{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul></section>'


def _treatments_card(result: dict[str, Any], control: str) -> str:
    """Every treatment against the control, if there are several."""
    if len(result["treatments"]) < 2:
        return ""
    rows = []
    for arm, record in result["treatments"].items():
        cells = []
        for name in dict.fromkeys((result["primary"], "ctr", "roi")):
            lift = record["lifts"][name]
            cells.append(f"<b>{percent(lift['lift'])}</b> <small>{percent(lift['lift_low'])} to {percent(lift['lift_high'])}</small>")
        rows.append([escape(arm), number(record["users"]), *cells, p_text(record["lifts"][result["primary"]]["p_decides"]), escape(record["verdict"]["headline"])])
    heads = ["", "users, both arms", *(METRICS[name].label.split(",")[0] for name in dict.fromkeys((result["primary"], "ctr", "roi"))), "p (Holm)", "verdict"]
    return f'<section class="card" id="treatments"><h2>All treatments against {escape(control)}</h2>{_table(heads, rows)}</section>'


def _segments_card(result: dict[str, Any], control: str, treatment: str) -> str:
    """Lifts inside segments: where to look next, not what to decide by."""
    if not result["segments"]:
        return ""
    rows = []
    for record in sorted(result["segments"], key=lambda r: (r["metric"] != result["primary"], r["dimension"], r["segment"])):
        p = record.get("p_adjusted")
        name = f"{escape(record['dimension'])} {escape(record['segment'])}"
        lift = f"<b>{percent(record['lift'])}</b> <small>{percent(record['lift_low'])} to {percent(record['lift_high'])}</small>"
        state = '<span class="state calm">differs</span>' if p is not None and p < 0.05 else ""
        rows.append([name, escape(record["label"].split(",")[0]), number(record["users"]), lift, p_text(p), state])
    text = f"{treatment} over {control} inside cities, hours, and new or returning users. p is adjusted over all rows of a metric (Benjamini-Hochberg): a place to look next, not to decide by."
    return f'<section class="card" id="segments"><h2>Segments</h2><p class="soft">{escape(text)}</p>{_table(["", "metric", "users", f"lift, {interval_name(result)}", "p", ""], rows)}</section>'


def render(result: dict[str, Any], days: pd.DataFrame, drift_rows: list[DriftRow], drift_note: str, plan: ExperimentPlan, title: str) -> str:
    """The whole page. `result` is the content of ab_result.json, `days` the sums by arm and day."""
    control, treatment = plan.control, plan.treatment
    verdict = result["verdict"]
    dates = sorted(days["day"].unique())
    span = "no traffic" if not dates else (dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    texts = [*verdict["reasons"], *result["alarms"]]
    reasons = "".join(f"<li>{escape(_short(text))}</li>" for text in texts[:FIRST_TEXTS])
    if len(texts) > FIRST_TEXTS or any(_short(text) != text for text in texts):
        reasons += f'<li class="more"><a href="#alarms">All {len(texts)} in full</a></li>'
    trends = "".join(_trend(days, name, control, treatment) for name in dict.fromkeys((result["primary"] if result["primary"] in TRENDS else "rpm", "ctr")))
    legend = f'<p class="soft"><span class="key a"></span>{escape(control)} &nbsp; <span class="key b"></span>{escape(treatment)} &nbsp; bars: 95 % intervals</p>'
    policies = "; ".join(f"{arm}: {', '.join(record['policies']) or 'no answer'}" for arm, record in result["arms"].items())
    rest = [name for name in result["lifts"] if name not in shown_first(result)]
    html = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,"><title>{escape(verdict["headline"])}</title><style>{_STYLE}</style></head>
<body><main>
<header><span>{escape(title)}</span><span>{escape(span)} &middot; {number(result["users"])} of {number(result["planned_users"])} planned users</span></header>
<section class="card verdict {_TONE[verdict["code"]]}" id="verdict"><h1>{escape(verdict["headline"])}</h1><p>{escape(verdict["sentence"])}</p>{f"<ul>{reasons}</ul>" if reasons else ""}</section>
<div class="first">
<section class="card" id="lifts">{_arms_table(result, control, treatment, shown_first(result), False)}{_sureness(result)}</section>
<section class="card" id="trend"><div class="trends">{trends}</div>{legend}</section>
</div>
{_treatments_card(result, control)}
{_alarms_card(texts)}
{_guardrail_card(result, plan)}
<section class="card"><h2>More numbers</h2>{_arms_table(result, control, treatment, rest, True)}</section>
{_segments_card(result, control, treatment)}
{_drift_card(drift_rows, drift_note)}
{_service_card(result["service"])}
{_notes_card(result, plan)}
<footer>Policies: {escape(policies)}. Beside this page: <a href="evidently.html">evidently.html</a> (distributions), <a href="ab_result.json">ab_result.json</a> (the same numbers for machines).</footer>
</main></body></html>
"""
    return html.replace(" %", "\N{NO-BREAK SPACE}%")
