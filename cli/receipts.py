"""`ega replay-price` and `ega replay-day`: recompute charges from their receipts alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from auction.receipt import ReceiptError, difference, replay

SHOWN = 20
"""Mismatches printed one by one; all are counted."""


def replay_price(source: str) -> int:
    """Recompute the charge of each receipt in a file (one JSON object, a list, or one object a line), or of standard input for `-`.

    Returns 0 if every charge is what its receipt says, 1 otherwise.
    """
    text = sys.stdin.read() if source == "-" else Path(source).read_text()
    receipts = read_receipts(text, "standard input" if source == "-" else source)
    if len(receipts) == 1:
        again = replay(receipts[0])
        print(f"mode {receipts[0]['mode']}: exact {again.exact!r}, charged {again.price!r}; truthful price {again.critical!r}")
    return _report(receipts)


def read_receipts(text: str, source: str) -> list[dict[str, Any]]:
    """Receipts of a text; raises ReceiptError where it is not JSON or holds something else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ReceiptError(f"{source}, line {number}: not JSON: {error.msg}") from None
    receipts = found if isinstance(found, list) else [found]
    for number, receipt in enumerate(receipts, start=1):
        if not isinstance(receipt, dict):
            raise ReceiptError(f"{source}, receipt {number}: an object was expected, got {type(receipt).__name__}")
    if not receipts:
        raise ReceiptError(f"{source} holds no receipt")
    return receipts


def replay_day(config: Path, day: str | None) -> int:
    """Recompute every charge that the service of a configuration made on a UTC day (default: all that it ever made)."""
    from cli.run import ega_home
    from pipelines.config import load_run_config
    from serving.event_log import read_receipts as logged_receipts
    from serving.settings import event_log_path

    since = until = None
    if day is not None:
        try:
            since = datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC)
        except ValueError:
            raise ValueError(f"--day must be a date such as 2026-03-31, got {day!r}") from None
        until = since + timedelta(days=1)
    home = ega_home() / load_run_config(config).name
    current = event_log_path(home)
    logs = sorted(home.glob(f"{current.parent.name}*/{current.name}"))  # `ega ab` keeps earlier traffic beside the current log
    if not logs:
        raise FileNotFoundError(f"{current} is not there: the service of {config} has answered nothing yet")
    receipts = [receipt for log in logs for receipt in logged_receipts(log, since, until)]
    if not receipts:
        print(f"no ad was shown{'' if day is None else f' on {day}'}; nothing to replay in {', '.join(map(str, logs))}")
        return 0
    return _report(receipts)


def _report(receipts: Iterable[dict[str, Any]]) -> int:
    total = wrong = 0
    for receipt in receipts:
        total += 1
        try:
            problem = difference(receipt)
        except ReceiptError as error:
            problem = f"not a receipt: {error}"
        if problem is not None:
            wrong += 1
            if wrong <= SHOWN:
                print(f"request {receipt.get('request_id')}, slot {receipt.get('slot')}, ad {receipt.get('ad_id')}: {problem}")
    if wrong > SHOWN:
        print(f"... and {wrong - SHOWN:,} more")
    print(f"{total:,} receipts replayed, {wrong:,} differ")
    return 1 if wrong else 0
