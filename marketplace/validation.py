"""Validation of a folder of logs: is it fit to train on? Great Expectations suites from the schema, and business rules.

`validate_logs` reads the folder as far as it can be read, checks every law of `validation_rules` and every figure of
`validation_statistics`, and writes `validation.html` (data docs, one self-contained file) and `validation.json`. One
critical failure stops the pipeline; warnings do not. `accept` keeps the figures of logs that passed, so that the next
logs are compared with them.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from marketplace.logs import write_bytes
from marketplace.schema import TABLES
from marketplace.validation_docs import data_docs
from marketplace.validation_read import LoadedLogs, load_logs
from marketplace.validation_rules import CRITICAL, ROW_RULES, WARNING, Law, Lookups, ValidationConfig, file_laws, files_frame, schema_laws
from marketplace.validation_statistics import compute, show_rows
from marketplace.validation_suites import Verdict, run_suites

__all__ = ["Failure", "ValidationConfig", "ValidationResult", "accept", "failures_of", "laws_of", "validate_logs", "validation_text"]

ACCEPTED = "statistics.json"
"""File of the accepted folder that holds the figures of the last accepted logs."""

_ACCEPTED_FORMAT = 1
_EXAMPLES = 3


@dataclass(frozen=True)
class Failure:
    """One broken rule, in plain words."""

    rule: str
    """Name of the rule, e.g. `no-slot-gaps`."""
    table: str
    """The log table, `files` or `statistics`."""
    severity: str
    """`critical` stops the pipeline, `warning` does not."""
    rows: int
    """How many rows (files, for the table `files`) break it; 0 where it is about a whole table."""
    total: int
    """Of how many."""
    examples: tuple[str, ...]
    """Up to three, as 'column=value, ...'."""
    message: str
    """What is wrong, where, how much, examples, and what to do: one line."""


@dataclass(frozen=True)
class ValidationResult:
    """The verdict on a folder of logs. `passed` is False if any failure is critical."""

    passed: bool
    failures: list[Failure]
    html: Path
    laws: int
    """Number of laws that were checked."""
    statistics: dict
    """Figures of these logs; what `accept` keeps."""


def validate_logs(logs: Path, out: Path, config: ValidationConfig | None = None, accepted: Path | None = None, now: dt.datetime | None = None) -> ValidationResult:
    """Validate `<logs>/<table>/day=*/*.parquet` and write `<out>/validation.html` and `validation.json`.

    Args: accepted, folder with the figures of the last accepted logs (none yet is fine); now, time-zone aware, the real
    time by default. Broken data never raises: it becomes failures. Raises only where `out` cannot be written or `now` is naive.
    """
    logs, out, config = Path(logs), Path(out), config or ValidationConfig()
    now = now or dt.datetime.now(dt.UTC)
    if now.tzinfo is None:
        raise ValueError(f"now must carry a time zone, got {now!r}")
    loaded = load_logs(logs)
    last, problem = _read_accepted(accepted)
    frames, laws, summary = laws_of(loaded, config, now.astimezone(dt.UTC), last)
    if problem:
        frames["files"]["accepted-statistics-readable"] = False
        laws.append(Law("accepted-statistics-readable", "files", ("accepted-statistics-readable",), "true", problem, "restore the file, or delete it to start afresh", severity=WARNING))
    verdicts = run_suites(frames, laws)
    failures = failures_of(verdicts, frames)
    passed = not any(failure.severity == CRITICAL for failure in failures)
    summary |= {"data_hash": loaded.data_hash, "validated": now.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    result = ValidationResult(passed, failures, out / "validation.html", len(laws), summary)
    record = {"passed": passed, "laws": len(laws), "failures": [dataclasses.asdict(failure) for failure in failures], "statistics": summary}
    write_bytes(result.html, data_docs(result.passed, failures, verdicts, summary).encode())
    write_bytes(out / "validation.json", (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    return result


def accept(result: ValidationResult | dict, accepted: Path) -> Path:
    """Keep the figures of logs that passed as `<accepted>/statistics.json`, atomically; takes a result or its `statistics`.

    Raises ValueError for a result with critical failures: what failed is no yardstick.
    """
    if isinstance(result, ValidationResult):
        if not result.passed:
            raise ValueError("logs with critical failures cannot be accepted; correct them and validate again")
        statistics = result.statistics
    else:
        statistics = result
    path = Path(accepted) / ACCEPTED
    write_bytes(path, (json.dumps({"format": _ACCEPTED_FORMAT, **statistics}, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    return path


def validation_text(result: ValidationResult) -> str:
    """The verdict for a terminal: one line if all is well, else one paragraph a failure, critical ones first."""
    rows = ", ".join(f"{count:,} {name}" for name, count in result.statistics["rows"].items())
    if not result.failures:
        return f"validation passed: {result.laws} laws hold for {rows}"
    critical = sum(failure.severity == CRITICAL for failure in result.failures)
    head = f"validation {'passed with warnings' if result.passed else 'FAILED'}: {critical} critical, {len(result.failures) - critical} warnings ({rows})"
    return "\n".join([head, *(f"  {failure.severity}: {failure.message}" for failure in result.failures), f"  all checks: {result.html}"])


# ---------------------------------------------------------------------------------------------------------------------


def _read_accepted(accepted: Path | None) -> tuple[dict | None, str]:
    path = None if accepted is None else Path(accepted) / ACCEPTED
    if path is None or not path.exists():
        return None, ""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != _ACCEPTED_FORMAT or not isinstance(record["varied"], list):
            raise ValueError(f"format {record['format']}, this release reads {_ACCEPTED_FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"the statistics of the last accepted logs cannot be read ({path.name}: {error})"
    return record, ""


def laws_of(loaded: LoadedLogs, config: ValidationConfig, now: dt.datetime, accepted: dict | None) -> tuple[dict[str, pd.DataFrame], list[Law], dict]:
    """Frames with the rules' true/false columns, the laws on them, and the figures of these logs.

    Args: accepted, the figures of the last accepted logs, or None. `run_suites` checks the laws on the frames.
    """
    frames = {"files": files_frame(loaded)} | dict(loaded.tables)
    laws = file_laws() if len(loaded.files) else []
    if not len(loaded.files):
        frames["files"] = pd.DataFrame()
        laws.append(Law("tables-present", "files", (), "rows", f"no Parquet file <table>/day=YYYY-MM-DD/*.parquet of {', '.join(TABLES)} under the folder", "give the folder that holds the tables", low=1))
    look = Lookups(loaded, config, now)
    statistics, summary = compute(look, accepted)
    kept: dict[tuple[str, str], np.ndarray] = {}
    for rule in ROW_RULES:
        if look.has(*rule.needs):
            try:
                kept[rule.table, rule.rule] = np.asarray(rule.check(look), bool)
            except Exception as error:  # whatever broken values do to a rule is a failure of the logs, not a traceback
                statistics.cannot(f"{rule.table} {rule.rule}", error)
    for name in loaded.tables:
        laws += schema_laws(name, loaded.tables, config)
    for rule in ROW_RULES:
        if (rule.table, rule.rule) in kept:
            says = f"{rule.says}: after {look.latest[1]}" if rule.rule == "no-future-timestamps" else rule.says
            show = rule.show if rule.value is None else (*rule.show, rule.value[0])
            laws.append(Law(rule.rule, rule.table, (rule.rule,), "true", says, rule.remedy, rule.severity, show=show))
    for name in loaded.tables:
        columns = {rule: values for (table, rule), values in kept.items() if table == name}
        columns |= {rule.value[0]: rule.value[1](look) for rule in ROW_RULES if rule.table == name and rule.value and not kept.get((name, rule.rule), np.ones(1)).all()}
        if columns:
            frames[name] = pd.concat([frames[name], pd.DataFrame(columns, index=frames[name].index)], axis=1)
    frames["statistics"] = statistics.frame
    return frames, laws + statistics.laws, summary


def failures_of(verdicts: list[Verdict], frames: dict[str, pd.DataFrame]) -> list[Failure]:
    """Broken laws as failures: critical first, else in the laws' order; a missing column of many files is told once."""
    failures: dict[tuple[str, str, str], Failure] = {}
    for verdict in verdicts:
        if not verdict.kept:
            failure = _failure(verdict, frames[verdict.law.frame])
            failures.setdefault((failure.rule, failure.table, failure.message), failure)
    return sorted(failures.values(), key=lambda failure: failure.severity != CRITICAL)


def _failure(verdict: Verdict, frame: pd.DataFrame) -> Failure:
    law = verdict.law
    where = law.frame if law.frame not in ("files", "statistics") else ""
    subject = f"{where}.{law.columns[0]}" if where and law.kind in ("type", "not_null", "range", "varies") else where
    examples, rows = law.examples, verdict.rows
    if verdict.problem:
        what = f"{law.says}: could not be checked ({verdict.problem})"
    else:
        broken = _broken_rows(law, frame)
        if broken is not None:
            rows = int(broken.sum())
            examples = show_rows(frame, np.flatnonzero(broken), law.show, 1 if law.kind == "varies" else _EXAMPLES)
        what = law.says + (f" (found {verdict.observed})" if law.kind == "type" else "")
    unit = "files" if law.frame == "files" else "rows"
    count = f" - {rows:,} of {verdict.total:,} {unit}" if rows and law.kind not in ("columns", "within", "rows") and law.show else ""
    shown = f", e.g. {'; '.join(examples)}".rstrip(".") if examples else ""
    message = f"[{law.rule}] {subject + ': ' if subject else ''}{what}{count}{shown}. What to do: {law.remedy}."
    return Failure(law.rule, law.frame, law.severity, rows, verdict.total, tuple(examples), message)


def _broken_rows(law: Law, frame: pd.DataFrame) -> np.ndarray | None:
    """Which rows break a law on rows; None for other kinds."""
    if law.kind == "true" and law.show:
        return ~frame[law.columns[0]].to_numpy(bool)
    if law.kind == "not_null":
        return frame[law.columns[0]].isna().to_numpy()
    if law.kind == "range":
        values = frame[law.columns[0]]
        low, high = -np.inf if law.low is None else law.low, np.inf if law.high is None else law.high
        return (((values <= low) if law.strict_low else (values < low)) | (values > high)).to_numpy()
    if law.kind == "unique":
        return frame.duplicated(list(law.columns), keep=False).to_numpy()
    if law.kind == "varies":
        return np.ones(len(frame), bool)
    return None
