"""Laws as Great Expectations suites: one suite a frame, run in an ephemeral context.

Great Expectations decides and counts. Results come back in any order and `success` is false for mere warnings too, so
each result is found again by the position of its law, which travels in the expectation's `meta`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import pandas as pd

from marketplace.validation_rules import Law


@dataclass(frozen=True)
class Verdict:
    """What became of one law. `rows` broke it of `total` (0 of 0 where it is not about rows); `observed` in plain words;
    `problem` says why it could not be checked, '' if it was."""

    law: Law
    kept: bool
    rows: int
    total: int
    observed: str
    problem: str = ""


def run_suites(frames: dict[str, pd.DataFrame], laws: list[Law]) -> list[Verdict]:
    """Check every law on its frame. A law that cannot be evaluated counts as broken."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    logger = logging.getLogger("great_expectations")
    level, verdicts = logger.level, []
    logger.setLevel(logging.ERROR)
    try:
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        source = context.data_sources.add_pandas("logs")
        for name, frame in frames.items():
            numbered = [(number, law) for number, law in enumerate(laws) if law.frame == name]
            if not numbered:
                continue
            batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all").get_batch(batch_parameters={"dataframe": frame})
            suite = gx.ExpectationSuite(name=name, expectations=[_expectation(law, number) for number, law in numbered])
            result = batch.validate(suite, result_format={"result_format": "BASIC", "partial_unexpected_count": 0})
            found = {item.expectation_config.meta["law"]: item for item in result.results}
            verdicts += [_verdict(law, found.get(number), len(frame)) for number, law in numbered]
    finally:
        logger.setLevel(level)
    return verdicts


def _expectation(law: Law, number: int) -> Any:
    import great_expectations.expectations as gxe

    common: dict[str, Any] = {"severity": law.severity, "meta": {"law": number, "rule": law.rule}}
    column = law.columns[0] if law.columns else ""
    if law.kind == "rows":
        return gxe.ExpectTableRowCountToBeBetween(min_value=int(law.low or 0), **common)
    if law.kind == "columns":
        return gxe.ExpectTableColumnsToMatchSet(column_set=list(law.columns), exact_match=False, **common)
    if law.kind == "type":
        return gxe.ExpectColumnValuesToBeOfType(column=column, type_=law.dtype, **common)
    if law.kind == "not_null":
        return gxe.ExpectColumnValuesToNotBeNull(column=column, **common)
    if law.kind in ("range", "within"):
        return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=law.low, max_value=law.high, strict_min=law.strict_low, **common)
    if law.kind == "unique" and len(law.columns) == 1:
        return gxe.ExpectColumnValuesToBeUnique(column=column, **common)
    if law.kind == "unique":
        return gxe.ExpectCompoundColumnsToBeUnique(column_list=list(law.columns), **common)
    if law.kind == "varies":
        return gxe.ExpectColumnUniqueValueCountToBeBetween(column=column, min_value=int(law.low or 2), **common)
    if law.kind == "true":
        return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[True], **common)
    raise ValueError(f"law {law.rule} has unknown kind {law.kind!r}")


def _verdict(law: Law, result: Any, rows: int) -> Verdict:
    if result is None:
        return Verdict(law, False, 0, rows, "", "Great Expectations gave no result for it")
    raised = _exception(result.exception_info)
    if raised:
        return Verdict(law, False, 0, rows, "", raised)
    detail = result.result or {}
    observed = detail.get("observed_value")
    broken = int(detail.get("unexpected_count") or 0)
    per_row = law.kind in ("not_null", "range", "unique", "true")
    if not result.success and law.kind == "type":
        broken = rows
    return Verdict(law, bool(result.success), broken, int(detail.get("element_count") or rows) if per_row else rows, "" if observed is None else str(observed))


def _exception(info: Any) -> str:
    """The first exception message of a result, '' if none. One expectation may carry one record or one per metric."""
    if not isinstance(info, dict):
        return ""
    records = [info] if "raised_exception" in info else [record for record in info.values() if isinstance(record, dict)]
    for record in records:
        if record.get("raised_exception"):
            return str(record.get("exception_message") or "it raised an exception")[:200]
    return ""
