"""The run's report: one self-contained HTML page, metrics.json for machines, and the lines at the end of `ega run`."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from components.candidate import candidate_sections
from model.bundle import write_atomic
from model.evaluation.plots import curve_svg, number, page, part_curves, table
from model.kinds import STAGES


def _lift(entry: dict[str, Any]) -> str:
    return f"{100 * entry['lift']:+.1f} % ({100 * entry['low']:+.1f} to {100 * entry['high']:+.1f})"


def _truth_sections(truth: dict[str, Any]) -> list[tuple[str, str]]:
    policies = [(name, *values.values()) for name, values in truth["policies"].items()]
    header = ("policy / prices", *(name.replace("_", " ") for name in next(iter(truth["policies"].values()))))
    lifts = [(e["treatment"], e["control"], e["metric"], _lift(e)) for e in truth["lifts"]]
    sections = [
        ("The market's hidden truth about the replayed pages", table(header, [tuple(map(_flat, row)) for row in policies])),
        ("True lifts on the same requests (95 % interval, clustered by user)", table(("policy", "against", "measure per request", "lift"), lifts)),
    ]
    bound = truth.get("limits")
    if bound is None:  # several creatives an ad, or organic results
        return sections
    near = [
        (name, *(f"{100 * row[key]:.1f} %" for key in ("welfare_of_limit", "gap_closed", "revenue_of_optimum"))) for name, row in bound["policies"].items()
    ]
    exact = (
        f"<p>Best page of every request, all hidden truth known: welfare W* {number(bound['welfare_per_request'])} a request, of which VCG collects "
        f"{number(bound['vcg_revenue_per_1000'])} per 1000 requests; R*, the most that a truthful auction can collect on average, {number(bound['optimal_revenue_per_1000'])} per 1000.</p>"
    )
    return [("The limits of this market", exact + table(("policy / prices", "welfare, of W*", f"gap from {bound['baseline']} to W* closed", "revenue, of R*"), near)), *sections]


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return f"{number(value['mean'])} ({number(value['low'])} to {number(value['high'])})"
    return " to ".join(number(x) for x in value) if isinstance(value, list | tuple) else value


def write_report(run_dir: Path, logs: Path, summary: dict[str, Any]) -> Path:
    """Write `report.html` and `metrics.json` of a judged run; returns the page."""
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    validation = json.loads((run_dir / "validation" / "validation.json").read_text())
    colour = "good" if summary["approved"] else "bad"
    lead = f'<p class="verdict"><span class="{colour}">{"Approved" if summary["approved"] else "Rejected"}</span> {html.escape(_reason(metrics, summary))}</p>'
    sections = candidate_sections(run_dir, summary.get("truth"))
    if summary.get("truth"):
        sections[2:2] = _truth_sections(summary["truth"])
    if (run_dir / "evaluation" / "baselines.json").is_file():
        rows = json.loads((run_dir / "evaluation" / "baselines.json").read_text())
        cells = [(r["split"], r["model"], r["auc"], r["recall"], _flat(r["recall_interval"])) for r in rows]
        header = ("days", "model", "AUC, sampled candidates", f"Recall@{rows[0]['k']}, whole city", "95 % interval")
        sections.insert(2, ("Ranking against counting baselines", table(header, cells)))
    if "experiment" in summary:
        sections.insert(1, ("Experiment", '<p><a href="experiment/report.html">A/B test on live traffic</a></p>'))
    for stage in STAGES[metrics["policy"]]:
        result = json.loads((run_dir / "stages" / stage / "result.json").read_text())
        sections += [(f"Training: {stage}", curve_svg(result)), *part_curves(result)]
    rows = ", ".join(f"{count:,} {name}" for name, count in validation["statistics"]["rows"].items())
    sections.append(("Data", f'<p>{html.escape(rows)}; {validation["laws"]} rules checked. <a href="validation/validation.html">Data docs</a></p>'))
    path = run_dir / "report.html"
    write_atomic(path, page(f"EGA run {run_dir.name}", sections, lead).encode())
    write_atomic(run_dir / "metrics.json", json.dumps({**metrics, **summary}, indent=1, default=float).encode())
    return path


def _reason(metrics: dict[str, Any], summary: dict[str, Any]) -> str:
    if summary["approved"]:
        return "; ".join(gate["reason"] for gate in metrics["gates"])
    return str(summary["verdict"]).removeprefix("rejected: ")


def recall_k(ranking: dict[str, Any]) -> int:
    """k of the Recall@k that was measured."""
    return next(int(name.removeprefix("recall_at_")) for name in ranking if name.startswith("recall_at_") and not name.endswith("interval"))


def result_lines(run_dir: Path, summary: dict[str, Any]) -> list[str]:
    """The results table for the terminal."""
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    mode, ranking = metrics["price_mode"], metrics["ranking"]
    policy = f"{metrics['policy']}/{mode}"
    lines = [
        "",
        f"AUC (exposed + unexposed)     {number(ranking['auc'])}",
        f"Recall@{recall_k(ranking)} over the city       {number(ranking[f'recall_at_{recall_k(ranking)}'])}",
        f"AUC on exposed ads            set-aware {number(ranking['auc_exposed'])}, evaluator {number(ranking['auc_evaluator'])}",
        f"calibration Dev               {number(ranking['dev'])} (95 % interval of pCTR / CTR: {' to '.join(map(number, ranking['pctr_over_ctr_interval']))})",
        f"psi of {mode} prices".ljust(30) + f"{number(metrics['psi'][mode]['psi_exact_model'])} (independent evaluator {number(metrics['psi'][mode]['psi_exact'])})",
        f"eRPM, test days               {number(metrics['policies'][policy]['erpm'])} (incumbent {metrics['incumbent']})",
    ]
    baselines = run_dir / "evaluation" / "baselines.json"
    if baselines.is_file():
        lines += ["", f"{'ranking':<14}{'model':<16}{'AUC':>8}{'Recall@' + str(recall_k(ranking)):>12}"]
        lines += [f"{r['split']:<14}{r['model']:<16}{number(r['auc']):>8}{number(r['recall']):>12}" for r in json.loads(baselines.read_text())]
        lines.append("")
    for entry in (summary.get("truth") or {}).get("lifts", []):
        lines.append(f"true {entry['metric']}: {entry['treatment']} over {entry['control']}".ljust(58) + _lift(entry))
    bound = (summary.get("truth") or {}).get("limits")
    if bound is not None:
        lines.append(
            f"true welfare of {policy}".ljust(58) + f"{100 * bound['policies'][policy]['welfare_of_limit']:.1f} % of the best pages' "
            f"({bound['baseline']} {100 * bound['policies'][bound['baseline']]['welfare_of_limit']:.1f} %)"
        )
    lines += [f"gate {gate['name']}".ljust(30) + ("approved  " if gate["approved"] else "REJECTED  ") + gate["reason"] for gate in metrics["gates"]]
    return lines
