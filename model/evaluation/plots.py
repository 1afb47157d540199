"""Plots as inline SVG and small self-contained HTML pages: loss curves, ROC, calibration, prices. No script, no network."""

from __future__ import annotations

import html
import io
import math
from typing import Any

import numpy as np

from model.evaluation.metrics import calibration_bins

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1c2733;background:#fff}
h1{font-size:1.6rem;margin:.2rem 0 1rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #d8dee6;vertical-align:top}
th{font-weight:600;color:#55606d}td.n{text-align:right;white-space:nowrap}
.scroll{overflow-x:auto}svg{max-width:100%;height:auto;background:#fff;border-radius:6px}
.good{color:#0a7a3d;font-weight:600}.bad{color:#b3261e;font-weight:600}
.verdict{font-size:1.15rem;padding:.8rem 1rem;border-radius:8px;background:#eef4fb;border-left:5px solid #2f6db5}
@media (prefers-color-scheme:dark){body{color:#e4e8ee;background:#14181d}th{color:#9aa5b1}th,td{border-color:#2d3640}.verdict{background:#1c2733}
.good{color:#5fd394}.bad{color:#ff8a80}}
"""

_GOOD, _BAD = {"approved", "yes", "ok"}, {"rejected", "no", "failed"}


def number(value: Any) -> str:
    """A figure for a table: four significant digits, a dash for what was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """An HTML table; numbers to the right, verdict words coloured."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = []
    for row in rows:
        cells = []
        for value in row:
            text = html.escape(number(value))
            style = ' class="n"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
            if str(value) in _GOOD or str(value) in _BAD:
                style = ' class="good"' if str(value) in _GOOD else ' class="bad"'
            cells.append(f"<td{style}>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def page(title: str, sections: list[tuple[str, str]], lead: str = "") -> str:
    """A self-contained HTML page; `sections` are (heading, HTML)."""
    parts = "".join(f"<section><h2>{html.escape(heading)}</h2>{content}</section>" for heading, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{lead}{parts}</body></html>"
    )


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, nothing to close, half the time to import

    return Figure(figsize=(width, height))


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "ega"}):  # the same figure, the same text
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float = 6.4, height: float = 3.6) -> tuple[Any, Any]:
    figure = _figure(width, height)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def curve_svg(result: dict[str, Any]) -> str:
    """Training loss and validation score of a stage over its steps, the kept step marked; of a stage that is fitted at once what it measured."""
    history = result["history"]
    if "loss" not in history[0]:
        return table(("measure", "value"), [(name.replace("_", " "), value) for name, value in history[0].items() if name not in ("step", "score")])
    figure, left = _axes()
    trained = [entry for entry in history if entry["loss"] is not None]
    left.plot([e["step"] for e in trained], [e["loss"] for e in trained], color="#2f6db5", marker="o", ms=3, label="training loss")
    left.set_xlabel("step")
    left.set_ylabel("training loss", color="#2f6db5")
    right = left.twinx()
    right.plot([e["step"] for e in history], [e["score"] for e in history], color="#b5622f", marker="s", ms=3, label="validation score")
    right.axvline(result["best_step"], color="#888", ls=":", lw=1)
    right.set_ylabel("validation score", color="#b5622f")
    right.spines[["top"]].set_visible(False)
    left.set_title(f"{result['stage']}: kept step {result['best_step']} of {result['steps']}", fontsize=10)
    return _svg(figure)


def curve_page(result: dict[str, Any]) -> str:
    """One stage as a page: curve and the history as a table."""
    names = [name for name in result["history"][0] if name != "step"]
    rows = [(entry["step"], *(entry.get(name) for name in names)) for entry in result["history"]]
    return page(f"Stage {result['stage']}", [("Curve", curve_svg(result)), ("History", table(("step", *names), rows)), *part_curves(result)])


def part_curves(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Sections with the curves of the networks that a stage trained beside its own (`StageResult.parts`)."""
    return [(f"Training: {result['stage']}, {name}", curve_svg({**part, "stage": f"{result['stage']} {name}"})) for name, part in result.get("parts", {}).items()]


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(fpr, tpr, thresholds) from (0, 0) to (1, 1), one point a distinct score; the first threshold is 1."""
    order = np.argsort(-scores, kind="stable")
    hits, ordered = np.asarray(labels, np.float64)[order], np.asarray(scores, np.float64)[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    tpr, fpr = np.cumsum(hits)[last], np.cumsum(1 - hits)[last]
    return np.append(0.0, fpr / max(fpr[-1], 1.0)), np.append(0.0, tpr / max(tpr[-1], 1.0)), np.append(1.0, ordered[last])


def roc_svg(labels: np.ndarray, scores: np.ndarray) -> str:
    """ROC curve."""
    fpr, tpr, _ = roc_curve(labels, scores)
    keep = np.unique(np.linspace(0, len(fpr) - 1, 400).astype(int))
    figure, axes = _axes(4.2, 3.8)
    axes.plot(fpr[keep], tpr[keep], color="#2f6db5")
    axes.plot([0, 1], [0, 1], color="#999", ls=":")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    return _svg(figure)


def calibration_svg(labels: np.ndarray, scores: np.ndarray, bins: int = 10) -> str:
    """Observed click rate against predicted pCTR in bins of equal size, with two standard errors."""
    figure, axes = _axes(4.6, 3.8)
    predicted, observed, size = calibration_bins(labels, scores, bins)
    error = 2 * np.sqrt(np.maximum(observed * (1 - observed), 1e-9) / size)
    axes.errorbar(predicted, observed, yerr=error, fmt="o", color="#2f6db5", ms=4, capsize=2)
    top = max(predicted.max(initial=1e-3), observed.max(initial=1e-3)) * 1.1
    axes.plot([0, top], [0, top], color="#999", ls=":")
    axes.set_xlabel("predicted pCTR")
    axes.set_ylabel("observed click rate")
    return _svg(figure)


def lines_svg(series: dict[str, list[float]], x: str, y: str, ticks: list[str] | None = None) -> str:
    """Named lines over their index, or over what `ticks` calls it."""
    figure, axes = _axes()
    if ticks is not None:
        axes.set_xticks(range(len(ticks)), ticks)
    for name, values in series.items():
        axes.plot(values, label=name, lw=1.8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(series) > 4 else {}))  # many names would cover the lines
    return _svg(figure)


def intervals_svg(entries: dict[str, tuple[float, float, float]], x: str, wider: dict[str, tuple[float, float]] | None = None) -> str:
    """Named (value, low, high) from top to bottom, with a line at 0; thin lines behind for those with a `wider` interval too."""
    figure, axes = _axes(6.4, 0.7 + 0.3 * len(entries))
    at = np.arange(len(entries))[::-1]
    value, low, high = np.array(list(entries.values())).T
    for place, name in zip(at, entries, strict=True):
        if wider and name in wider:
            axes.plot(wider[name], (place, place), color="#999", lw=0.9, zorder=1)
    axes.errorbar(value, at, xerr=[value - low, high - value], fmt="o", color="#2f6db5", ms=4, capsize=2)
    axes.axvline(0.0, color="#888", lw=0.8)
    axes.set_yticks(at, list(entries), fontsize=8)
    axes.set_ylim(-0.7, len(entries) - 0.3)
    axes.set_xlabel(x, fontsize=9)
    return _svg(figure)


def lies_svg(data: dict[str, np.ndarray], charged: str) -> str:
    """What a few displayed ads would gain over bidding their value, against the bid, under the prices charged and two others."""
    ads = len(data["lie_ad"])
    figure = _figure(3.1 * ads, 3.0)
    panels = figure.subplots(1, ads, squeeze=False)
    colours = {mode: colour for mode, colour in (("critical", "#0a7a3d"), ("implicit", "#0a7a3d"), ("learned", "#2f6db5"), ("gsp", "#b5622f")) if f"lie_{mode}" in data}
    for row, axes in enumerate(panels[0]):
        for mode, colour in colours.items():
            axes.plot(data["lie_bid"][row], data[f"lie_{mode}"][row], color=colour, lw=2.2 if mode == charged else 1.2, label=mode)
        axes.axvline(data["lie_value"][row], color="#888", ls=":", lw=1)
        axes.axhline(0.0, color="#888", lw=0.6)
        near = np.abs(data["lie_bid"][row] - data["lie_value"][row]) <= 0.5 * data["lie_value"][row]
        best, scale = (max(float(reduce(data[f"lie_{mode}"][row][near])) for mode in colours) for reduce in (np.max, np.ptp))
        axes.set_ylim(best - 1.1 * max(scale, 1e-9), best + 0.1 * max(scale, 1e-9))  # far from the truth losses are of no interest
        axes.set_title(f"ad {int(data['lie_ad'][row])}, slot {int(data['lie_slot'][row])}", fontsize=9)
        axes.set_xlabel("bid (dotted: the truth)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("gain over the truth, per request", fontsize=8)
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return _svg(figure)


def price_scatter_svg(critical: np.ndarray, charged: np.ndarray, most: int = 2000) -> str:
    """Learned price against the truthful one, a sample of displayed ads."""
    pick = np.unique(np.linspace(0, len(critical) - 1, min(most, len(critical))).astype(int))
    figure, axes = _axes(4.6, 3.8)
    axes.scatter(critical[pick], charged[pick], s=5, alpha=0.4, color="#2f6db5", rasterized=False)
    top = float(max(np.max(critical[pick], initial=0), np.max(charged[pick], initial=0))) * 1.05
    axes.plot([0, top], [0, top], color="#999", ls=":")
    axes.set_xlabel("critical price, currency per click")
    axes.set_ylabel("learned price")
    return _svg(figure)
