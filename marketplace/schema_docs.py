"""docs/data.md, made from `marketplace.schema`: `python -m marketplace.schema_docs > docs/data.md`. A test keeps both equal."""

from __future__ import annotations

import pyarrow as pa

from marketplace.schema import FORMAT_VERSION, ID_MAX, OPTIONAL_TABLES, TABLES, Column, Table

_TYPES = {pa.int32(): "int32", pa.int64(): "int64", pa.float32(): "float32", pa.float64(): "float64", pa.string(): "string", pa.list_(pa.float32()): "list of float32"}

_INTRODUCTION = f"""# The data: bring your own logs

The pipeline's input is a folder of logs. Simulated markets (`ega simulate`) only produce such folders; nothing downstream knows where a
folder came from. `ega run CONFIG --logs DIR` trains and gates on yours. This page is made from `marketplace/schema.py`, format version {FORMAT_VERSION}.

## Layout

```text
DIR/
  ads/day=2025-09-01/part-0.parquet          the catalogue of that day, with bids
  users/day=2025-09-01/part-0.parquet        profiles that began to hold that day
  behaviours/day=2025-08-04/part-0.parquet   visits, clicks and purchases; also from before the first request
  requests/day=2025-09-01/part-0.parquet     page views that asked for ads
  impressions/day=2025-09-01/part-0.parquet  ads shown, and what came of them
  creatives/day=2025-09-01/part-0.parquet    optional: several creatives an ad
  organic/day=2025-09-01/part-0.parquet      optional: organic results between the ads
  manifest.json                              optional: sha256 and size of every file
```

- One folder per table and UTC day; the day is that of the table's time column. Any number of `*.parquet` files in a day. Days without rows need no folder.
- A column with "default" in the table below may be left out. Column order does not matter; other columns are refused, since a misspelt name would go unseen. Narrower integers, other time units and dictionary-encoded strings are widened
  without loss; a text where a number belongs is an error that names file and column. Timestamps need a time zone.
- Write Parquet with page checksums (`write_page_checksum=True`) if you can: they are verified when read.
- Without `manifest.json` the folder is taken as it is. With one, a file that is missing, added or changed stops the run:
  `marketplace.logs.write_manifest(DIR)` writes it.
- Before anything is trained, all rules below and the business rules (keys unique, payment <= bid, clicks only on shown ads, slots 1..K without
  gaps, ads and users known, no future times) are checked; a failure names the rule, how many rows, and three examples.

## Tables
"""

_GUIDE = """
## What the labels are made of

- **Exposed ads** are the rows of `impressions`; their labels are `click` and `purchase`.
- **Unexposed ads** are the city's other active ads. Their label asks whether the user clicked or visited the ad's place elsewhere in the same
  session: a row of `behaviours` with the request's `session_id` and the ad's `poi_id`, **after** the request's time. So sessions carry the
  signal about ads that were never shown. A session is whatever unit of intent your platform has (30 minutes of activity will do); give
  requests and behaviours of one session the same id. A request with `session_id` 0 has no positive labels on ads that were not shown.
- **Features** of a request are the user's behaviours strictly before its time. Behaviours from weeks before the first request are worth
  bringing: people repeat themselves.
- **Candidates** of a request are the ads of its `city_id` in that day's `ads` partition. An ad missing from a day is not active that day.
- **Bids** are never features. `bid` in `ads` is the day's bid; `bid` in `impressions` the one that entered that auction.
- **Propensity**: the probability that your policy put this ad in this slot, given the slots above. A deterministic policy logs 1.0.
  Off-policy estimates need some exploration in the logs.
- Clicks on ads appear twice: in `impressions` and, with the same session, as action 2 (an order as action 3) in `behaviours`.

## Example

```python
from pathlib import Path
import pandas as pd
from marketplace.logs import write_manifest, write_table

root, day = Path("my_logs"), pd.Timestamp("2025-09-01", tz="UTC")
place = {"latitude": 40.74, "longitude": -73.99}
at = lambda hours: day + pd.Timedelta(hours=hours)
write_table(root, "ads", pd.DataFrame([{"event_timestamp": day, "ad_id": 7, "creative_id": 70, "poi_id": 700, "advertiser_id": 1, "city_id": 1,
                                        "category_id": 3, "price_band": 2, "bid": 1.20, "reserve": 0.10, **place}]))
write_table(root, "users", pd.DataFrame([{"event_timestamp": day, "user_id": 5, "city_id": 1, "age_band": 0, "gender": 0,
                                          "home_latitude": 40.7, "home_longitude": -74.0}]))
write_table(root, "requests", pd.DataFrame([{"request_id": 1, "event_timestamp": at(12), "user_id": 5, "session_id": 9, "city_id": 1,
                                             "utc_offset_minutes": -240, "slots": 1, "arm": "none", "model_version": "ours", **place}]))
write_table(root, "impressions", pd.DataFrame([{"request_id": 1, "slot": 1, "event_timestamp": at(12), "user_id": 5, "ad_id": 7, "creative_id": 70,
                                                "bid": 1.20, "payment": 0.80, "pctr": 0.05, "propensity": 1.0, "click": 1,
                                                "click_timestamp": at(12.01), "purchase": 0, "order_value": 0.0}]))
write_table(root, "behaviours", pd.DataFrame([{"behaviour_id": 1, "event_timestamp": at(13), "user_id": 5, "session_id": 9, "poi_id": 700,
                                               "category_id": 3, "action": 1, **place}]))
write_manifest(root)
```

Written another way (Spark, DuckDB, pyarrow), the same layout and types do; `marketplace.schema.TABLES[name].arrow` is the Arrow schema.

## Check-ins instead of logs

`ega run config/nyc.yaml --data DIR` simulates a market over real people's check-ins. DIR holds `checkins.parquet` (user_id, poi_id: integers;
timestamp: UTC) and `pois.parquet` (poi_id, lat, lon; category, taxonomy, name where known, null otherwise).
`ega convert-checkins TXT DIR` makes both from the published TSMC2014 text format. Homes and residential buildings are never ads; advertisers,
values, bids and price bands are synthetic and seeded (price bands drawn around a level per category, 0 where the category is unknown).
"""


def _number(value: float) -> str:
    if value == ID_MAX:
        return "2^63-1"
    if value == 2**31 - 1:
        return "2^31-1"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _range(column: Column) -> str:
    if column.minimum is None and column.maximum is None:
        return "any"
    low = "(-inf" if column.minimum is None else ("(" if column.exclusive_minimum else "[") + _number(column.minimum)
    high = "inf)" if column.maximum is None else _number(column.maximum) + "]"
    return f"{low}, {high}"


def _table(table: Table) -> str:
    lines = [
        f"\n### {table.name}\n",
        f"{table.meaning} Key: {', '.join(f'`{name}`' for name in table.key)}. Time: `{table.time}`.\n",
        "| column | type | unit | range | null | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for column in table.columns:
        kind = "timestamp" if pa.types.is_timestamp(column.dtype) else _TYPES[column.dtype]
        null = "allowed" if column.nullable else "no" if column.default is None else f"default {column.default:g}"
        lines.append(f"| `{column.name}` | {kind} | {column.unit or '-'} | {_range(column)} | {null} | {column.meaning} |")
    return "\n".join(lines) + "\n"


def schema_markdown() -> str:
    """The text of docs/data.md."""
    return _INTRODUCTION + "".join(_table(table) for table in (TABLES | OPTIONAL_TABLES).values()) + _GUIDE


if __name__ == "__main__":
    print(schema_markdown(), end="")
