"""`ega convert-checkins`: published check-in text to the check-ins folder that `--data` takes."""

from __future__ import annotations

from pathlib import Path


def convert(text: Path, out: Path, min_poi_checkins: int = 1, min_user_checkins: int = 1) -> None:
    """Convert a TSMC2014 text file (user, venue, category id, category, latitude, longitude, offset, UTC time; tabs) into OUT.

    Args: text, the file; out, the folder for checkins.parquet and pois.parquet; min_poi_checkins and min_user_checkins,
    rarer venues, then rarer users, are left out.
    """
    from marketplace.tsmc import convert_checkins

    counts = convert_checkins(text, out, min_poi_checkins, min_user_checkins)
    print(f"{out}: {counts['checkins']:,} check-ins of {counts['users']:,} users at {counts['pois']:,} places; next: ega run CONFIG --data {out}")
