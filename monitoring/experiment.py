"""The A/B driver: simulated users ask the live HTTP service for pages and send back what they click and buy.

It is a client like any other: it knows the service's URL and nothing of its inside. What it saw (answers, response times, events sent) is
written down, so that the report can say how complete the service's own log is.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import urllib3
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from tqdm import tqdm

from marketplace import logs

RETRIED = (429, 503)
ATTEMPTS = 10
LONGEST_WAIT_SECONDS = 5.0
TIMEOUT_SECONDS = 30.0
GIVE_UP_ERRORS = 20
"""Failed requests after which the driver stops, if they are more than `GIVE_UP_SHARE` of all."""
GIVE_UP_SHARE = 0.05

RESPONSES = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("model_version", pa.string(), nullable=False),
        pa.field("response_ms", pa.float64(), nullable=False),
        pa.field("degraded", pa.bool_(), nullable=False),
        pa.field("ads", pa.int32(), nullable=False),
    ]
)
"""`responses.parquet`: one row an answered request; response_ms is the client's wall time of the attempt that was answered."""


class ExperimentError(RuntimeError):
    """The service cannot be driven; the text says what it answered."""


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class DriverConfig:
    """How simulated users are sent."""

    workers: int = Field(4, ge=1, le=256)
    """Users served at once; each user's requests stay in order."""
    most_requests: int | None = Field(None, ge=1)
    """Whole users are drawn until their requests reach this number; null: everybody."""
    seed: int = Field(0, ge=0)
    """Of that draw."""
    salt: str = Field("ab-1", min_length=1)
    """Experiment salt of the arm assignment; a new experiment takes a new one."""
    treatment_policy: Literal["model", "bootstrap"] = "model"
    """What answers arm B. "bootstrap", the control's policy, makes an A/A test of the whole chain: it must show no difference."""


class SimulatedUsers(Protocol):
    """What the driver needs of a world."""

    def live_requests(self) -> pd.DataFrame:
        """REQUESTS columns, in time order."""
        ...

    def respond(self, request_row: Any, page_ad_ids: Any) -> Any:
        """click, click_delay_seconds, purchase, purchase_delay_seconds, order_value, each [K']."""
        ...


@dataclass
class _Tally:
    """What one worker saw."""

    rows: list[tuple[Any, ...]] = field(default_factory=list)
    errors: int = 0
    retries: int = 0
    impressions: int = 0
    clicks: int = 0
    purchases: int = 0
    events_failed: int = 0
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ExperimentSummary:
    """What all clients saw together; `experiment.json`."""

    requests: int
    answered: int
    errors: int
    retries: int
    impressions: int
    clicks: int
    """Clicks sent and acknowledged, as the purchases."""
    purchases: int
    events_failed: int
    """Clicks and purchases that the service did not take."""
    arms: dict[str, dict[str, float]]
    """By arm: answered, degraded, p50_ms, p95_ms, p99_ms."""
    seconds: float
    messages: list[str]
    """Texts of the first failures."""


def _wait_seconds(retry_after: str | None, attempt: int) -> float:
    """What the service asks for, else doubling from 50 ms; never longer than `LONGEST_WAIT_SECONDS`."""
    try:
        wanted = float(retry_after) if retry_after is not None else 0.05 * 2**attempt
    except ValueError:  # an HTTP date: not worth a clock comparison
        wanted = 0.05 * 2**attempt
    return min(max(wanted, 0.0), LONGEST_WAIT_SECONDS) if wanted == wanted else LONGEST_WAIT_SECONDS


class Client:
    """One HTTP client for all workers: keeps connections, retries 429, 503 and broken connections. Repeating a call is safe: both routes are idempotent."""

    def __init__(self, base_url: str, connections: int, token: str | None = None) -> None:
        self._base = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        timeout = urllib3.Timeout(total=TIMEOUT_SECONDS)
        self._pool = urllib3.PoolManager(maxsize=connections, block=True, retries=False, timeout=timeout, headers=self._headers)

    def post(self, route: str, body: dict[str, Any]) -> tuple[dict[str, Any] | None, float, int, str]:
        """(answer or None, milliseconds of the last attempt, retries, text of the failure)."""
        payload, message, milliseconds = json.dumps(body).encode(), "", 0.0
        for attempt in range(ATTEMPTS):
            begun = time.perf_counter()
            try:
                answer = self._pool.request("POST", self._base + route, body=payload)
            except urllib3.exceptions.HTTPError as error:
                message, wait = f"{route}: {error}", _wait_seconds(None, attempt)
            else:
                milliseconds = 1000 * (time.perf_counter() - begun)
                if answer.status == 200:
                    try:
                        return answer.json(), milliseconds, attempt, ""
                    except ValueError:
                        return None, milliseconds, attempt, f"{route}: the answer is not JSON"
                message = f"{route}: HTTP {answer.status}: {answer.data[:300].decode(errors='replace')}"
                if answer.status not in RETRIED:
                    return None, milliseconds, attempt, message
                wait = _wait_seconds(answer.headers.get("Retry-After"), attempt)
            if attempt + 1 < ATTEMPTS:
                time.sleep(wait)
        return None, milliseconds, ATTEMPTS - 1, message


def _rank_body(row: Any) -> dict[str, Any]:
    return {
        "user_id": int(row.user_id),
        "city_id": int(row.city_id),
        "latitude": float(row.latitude),
        "longitude": float(row.longitude),
        "timestamp": row.event_timestamp.isoformat(),
        "utc_offset_minutes": int(row.utc_offset_minutes),
        "session_id": int(row.session_id),
        "request_id": int(row.request_id),
        "slots": int(row.slots),
    }


def _events_of(row: Any, page: dict[str, Any], response: Any) -> list[dict[str, Any]]:
    """Click and purchase events of a page: a purchase follows its click."""
    events = []
    for index, ad in enumerate(page["ads"]):
        if not response.click[index]:
            continue
        at = row.event_timestamp + pd.Timedelta(seconds=round(float(response.click_delay_seconds[index]), 6))
        key = {"request_id": int(row.request_id), "slot": int(ad["slot"]), "ad_id": int(ad["ad_id"])}
        events.append({"type": "click", **key, "timestamp": at.isoformat()})
        if response.purchase[index]:
            at += pd.Timedelta(seconds=round(float(response.purchase_delay_seconds[index]), 6))
            events.append({"type": "purchase", **key, "timestamp": at.isoformat(), "order_value": float(response.order_value[index])})
    return events


def _visit(row: Any, world: SimulatedUsers, client: Client, tally: _Tally) -> None:
    """One page view: ask, look, answer."""
    page, milliseconds, retries, message = client.post("/v1/rank", _rank_body(row))
    tally.retries += retries
    if page is None:
        tally.errors += 1
        tally.messages.append(message)
        return
    ads = page["ads"]
    tally.rows.append((int(row.request_id), int(row.user_id), page["arm"], page["model_version"], milliseconds, bool(page["degraded"]), len(ads)))
    tally.impressions += len(ads)
    if not ads:
        return
    events = _events_of(row, page, world.respond(row, np.array([ad["ad_id"] for ad in ads], np.int64)))
    if not events:
        return
    answer, _, retries, message = client.post("/v1/events", {"events": events})
    tally.retries += retries
    rejected = {record["index"] for record in answer["rejected"]} if answer is not None else set(range(len(events)))
    for index, event in enumerate(events):
        if index in rejected:
            tally.events_failed += 1
        elif event["type"] == "click":
            tally.clicks += 1
        else:
            tally.purchases += 1
    if rejected:
        tally.messages.append(message or f"/v1/events: {len(rejected)} of {len(events)} events rejected")


def draw_users(requests: pd.DataFrame, most_requests: int | None, seed: int) -> pd.DataFrame:
    """Requests of whole users, drawn until about `most_requests`; everybody without a limit or with a higher one."""
    if most_requests is None or len(requests) <= most_requests:
        return requests
    users = np.random.default_rng(seed).permutation(np.sort(requests["user_id"].unique()))
    sizes = requests["user_id"].value_counts().reindex(users).to_numpy()
    kept = users[: max(2, int(np.searchsorted(np.cumsum(sizes), most_requests, side="right")))]
    return requests[requests["user_id"].isin(kept)].reset_index(drop=True)


def _queues(requests: pd.DataFrame, workers: int) -> list[Iterator[Any]]:
    """Requests by worker in time order; all requests of a user go to one worker, so that they stay in order."""
    ordered = requests.sort_values(["event_timestamp", "request_id"], kind="stable")
    lane = ordered["user_id"].to_numpy() % workers
    return [ordered[lane == number].itertuples(index=False) for number in range(workers)]


def run_experiment(
    world: SimulatedUsers,
    base_url: str,
    out: Path,
    workers: int = 4,
    progress: bool = True,
    token: str | None = None,
    most_requests: int | None = None,
    seed: int = 0,
) -> ExperimentSummary:
    """Send the live days' requests to the service at `base_url` and post the users' clicks and purchases back.

    Args: out, folder for `experiment.json` and `responses.parquet`; progress, a bar on stderr; token, bearer token of the service.
    Raises ExperimentError when the service is not there, or refuses more than a twentieth of the requests.
    """
    requests = draw_users(world.live_requests(), most_requests, seed)
    if requests.empty:
        raise ExperimentError("the world has no live requests; give it live days (ab_days) and simulate it again")
    client, stop = Client(base_url, workers, token), threading.Event()
    tallies = [_Tally() for _ in range(workers)]
    begun = time.perf_counter()
    with tqdm(total=len(requests), desc="simulated users", unit="request", disable=not progress, mininterval=0.5) as bar:

        def work(queue: Iterator[Any], tally: _Tally, advance: Callable[[int], Any]) -> None:
            for row in queue:
                if stop.is_set():
                    return
                _visit(row, world, client, tally)
                advance(1)
                if tally.errors >= GIVE_UP_ERRORS / workers and tally.errors > GIVE_UP_SHARE * (tally.errors + len(tally.rows)):
                    stop.set()

        with ThreadPoolExecutor(workers, thread_name_prefix="simulated-user") as pool:
            futures = [pool.submit(work, queue, tally, bar.update) for queue, tally in zip(_queues(requests, workers), tallies, strict=True)]
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()
    rows = [row for tally in tallies for row in tally.rows]
    messages = [message for tally in tallies for message in tally.messages][:5]
    errors = sum(tally.errors for tally in tallies)
    if not rows or errors > GIVE_UP_SHARE * (errors + len(rows)):
        raise ExperimentError(f"{errors} of {errors + len(rows)} requests to {base_url} failed; the first answer was: {messages[0]}")
    responses = pd.DataFrame(rows, columns=RESPONSES.names).sort_values("request_id", ignore_index=True)
    total: dict[str, int] = defaultdict(int)
    for tally in tallies:
        for name in ("retries", "impressions", "clicks", "purchases", "events_failed"):
            total[name] += getattr(tally, name)
    seconds = time.perf_counter() - begun
    summary = ExperimentSummary(requests=len(requests), answered=len(rows), errors=errors, arms=_by_arm(responses), seconds=round(seconds, 1), messages=messages, **total)
    logs.write_parquet(out / "responses.parquet", pa.Table.from_pandas(responses, schema=RESPONSES, preserve_index=False))
    logs.write_bytes(out / "experiment.json", (json.dumps(asdict(summary), indent=1) + "\n").encode())
    return summary


def _by_arm(responses: pd.DataFrame) -> dict[str, dict[str, float]]:
    return {
        str(arm): {
            "answered": len(rows),
            "degraded": int(rows["degraded"].sum()),
            **{f"p{q}_ms": round(float(np.percentile(rows["response_ms"], q)), 2) for q in (50, 95, 99)},
        }
        for arm, rows in responses.groupby("arm")
    }
