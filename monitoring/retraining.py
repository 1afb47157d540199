"""Logs for the next training: the reference period and the monitored traffic as one folder, in the schema of the logs."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pandas as pd

from marketplace import logs
from marketplace.schema import OPTIONAL_TABLES, TABLES


def training_logs(reference: Path, traffic: Path, folder: Path) -> Path:
    """`merge_logs` into `<folder>/retrain-<hash of both>`: the same two folders of logs give the same one, which is written once."""
    identity = hashlib.sha256((logs.data_hash(Path(reference)) + logs.data_hash(Path(traffic))).encode()).hexdigest()[:12]
    out = Path(folder) / f"retrain-{identity}"
    if not out.exists():
        merge_logs(reference, traffic, out)
    return out


def merge_logs(reference: Path, traffic: Path, out: Path) -> dict[str, int]:
    """Write `out`: every day of both folders, rows once by their table's key, the traffic's where both have one. Returns days by table.

    A day that only one folder has is copied as it is. Raises LogError if both have requests of a day under other ids: two platforms, not one.
    """
    final = Path(out)
    if final.exists():
        raise FileExistsError(f"{final} exists already; logs are written into a new folder: delete it or give another one")
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        days_of = _merge_into(part, Path(reference), Path(traffic))
        logs.write_manifest(part, {"source": "reference and monitored traffic", "days": days_of})
        os.replace(part, final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return days_of


def _merge_into(part: Path, reference: Path, traffic: Path) -> dict[str, int]:
    """Every table of both folders, day by day; returns days by table."""
    sides = [reference, traffic]
    days_of: dict[str, int] = {}
    for name, table in (TABLES | OPTIONAL_TABLES).items():
        found = [set(logs.days_of(side, name)) if logs.has_table(side, name) else set() for side in sides]
        for day in sorted(found[0] | found[1]):
            holders = [side for side, days in zip(sides, found, strict=True) if day in days]
            if len(holders) == 1:
                shutil.copytree(holders[0] / name / f"day={day}", part / name / f"day={day}")
                continue
            old, new = (logs.read_table(side, name, [day]) for side in sides)
            if name == "requests" and not set(old["request_id"]) & set(new["request_id"]):
                raise logs.LogError(f"{reference} and {traffic} both have requests of {day}, and none in common; the traffic must follow the reference or be its continuation")
            logs.write_table(part, name, pd.concat([old, new], ignore_index=True).drop_duplicates(list(table.key), keep="last", ignore_index=True))
        if name in TABLES or found[0] | found[1]:
            days_of[name] = len(found[0] | found[1])
    return days_of
