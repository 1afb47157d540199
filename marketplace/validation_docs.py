"""Data docs: every law that was checked, as one self-contained HTML file (no script, no network), failures first.

Great Expectations' own pages load styles and scripts from several content networks, so they are blank on a closed
network; this page is rendered from the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from marketplace.schema import OPTIONAL_TABLES, TABLES
from marketplace.validation_suites import Verdict

if TYPE_CHECKING:
    from marketplace.validation import Failure

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1c2430}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%;font-size:13px}
td,th{text-align:left;padding:.3rem .5rem;border-bottom:1px solid #dde3ea;vertical-align:top;overflow-wrap:anywhere}
.good{color:#14692f}.bad{color:#b3261e}.warn{color:#8a5a00}.box{border-left:5px solid #b3261e;background:#fdf3f2;padding:.5rem .8rem;margin:.6rem 0}
.box.warning{border-color:#c98a00;background:#fdf8ec}summary{cursor:pointer}.quiet{color:#5b6673}"""

_KINDS = {
    "rows": "row count",
    "columns": "all columns exist",
    "type": "column type",
    "not_null": "never missing",
    "range": "values in range",
    "unique": "values unique",
    "varies": "more than one value",
    "true": "rule holds in every row",
    "within": "figure within bounds",
}


def data_docs(passed: bool, failures: Sequence[Failure], verdicts: Sequence[Verdict], statistics: dict) -> str:
    """The page. `failures` and `verdicts` as `validate_logs` has them; `statistics` gives the header line."""
    rows = ", ".join(f"{count:,} {escape(name)}" for name, count in statistics["rows"].items())
    word = '<span class="good">passed</span>' if passed else '<span class="bad">FAILED</span>'
    if passed and failures:
        word += ' <span class="warn">with warnings</span>'
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>Validation of the logs</title><style>{_STYLE}</style></head><body>",
        f"<h1>Validation of the logs: {word}</h1>",
        f"<p class='quiet'>{len(verdicts)} laws checked by Great Expectations on {rows}; {escape(statistics['validated'])}; data {escape(statistics['data_hash'][:12] or 'unreadable')}</p>",
    ]
    parts += [f"<div class='box {failure.severity}'><b>{failure.severity}</b> {escape(failure.message)}</div>" for failure in failures]
    for name in ("files", *TABLES, *OPTIONAL_TABLES, "statistics"):
        mine = [verdict for verdict in verdicts if verdict.law.frame == name]
        if mine:
            parts.append(_suite(name, mine))
    return "\n".join([*parts, "</body></html>\n"])


def _suite(name: str, verdicts: list[Verdict]) -> str:
    broken = sum(not verdict.kept for verdict in verdicts)
    title = f"{name}: {len(verdicts) - broken} of {len(verdicts)} laws hold"
    lines = [_line(verdict) for verdict in sorted(verdicts, key=lambda verdict: verdict.kept)]
    head = "<tr><th></th><th>rule</th><th>column</th><th>checks</th><th>bounds</th><th>observed</th></tr>"
    return f"<h2 class='{'bad' if broken else ''}'>{escape(title)}</h2><details{' open' if broken else ''}><summary>all laws</summary><table>{head}{''.join(lines)}</table></details>"


def _line(verdict: Verdict) -> str:
    law = verdict.law
    mark = "<td class='good'>holds</td>" if verdict.kept else f"<td class='{'bad' if law.severity == 'critical' else 'warn'}'>{law.severity}</td>"
    observed = verdict.problem or verdict.observed or (f"{verdict.rows:,} of {verdict.total:,} rows break it" if verdict.rows else "")
    cells = (law.rule, ", ".join(law.columns), _KINDS[law.kind], _bounds(verdict), observed)
    return f"<tr>{mark}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _bounds(verdict: Verdict) -> str:
    law = verdict.law
    if law.kind == "type":
        return law.dtype
    low = "" if law.low is None else f"{'more than' if law.strict_low else 'at least'} {law.low:.6g}"
    high = "" if law.high is None else f"at most {law.high:.6g}"
    return ", ".join(part for part in (low, high) if part)
