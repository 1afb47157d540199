"""The A/B driver: simulated users ask the live HTTP service for pages and send back what they click, open and buy.

It is a client like any other: it knows the service's URL and nothing of its inside. What it saw (answers, response times, events sent) is
written down, so that the report can say how complete the service's own log is.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

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


_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@checked_dataclass(frozen=True, config=_STRICT)
class FaultConfig:
    """What happens to events (clicks, purchases) between the user and the service. All shares are of events."""

    duplicates: float = Field(0.0, ge=0, le=1)
    """Share that is sent again, one to four times, in any order."""
    loss: float = Field(0.0, ge=0, le=1)
    """Share that never arrives. The users did click: the report must find the log incomplete."""
    delay: float = Field(0.0, ge=0, le=1)
    """Share that arrives after later page views of other users, with its own time."""
    clock_skew_seconds: float = Field(0.0, ge=0)
    """A user's clock is wrong by up to this much, either way."""


@checked_dataclass(frozen=True, config=_STRICT)
class HabitConfig:
    """How people change while the experiment runs. The market's own answers stay as they are: clicks are taken away or added."""

    day_drift: float = Field(0.0, ge=0, lt=1)
    """Greatest share of a day's clicks that stay away, drawn for every day: days on which people have other things to do."""
    novelty: float = Field(0.0, ge=0)
    """Extra clicks on a treatment's pages on a user's first day, as a share of the predicted ones: curiosity, which buys nothing."""
    novelty_half_life_days: float = Field(1.0, gt=0)
    """Days after which half of the curiosity is left."""


@checked_dataclass(frozen=True, config=_STRICT)
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
    control_policy: str = Field("bootstrap", min_length=1)
    """What answers arm A: "bootstrap" (the logging policy), "model" (the newest approved model) or the exact tag of an approved model."""
    treatment_policy: str = Field("model", min_length=1)
    """What answers arm B, as above. The control's policy makes an A/A test of the whole chain: it must show no difference."""
    other_policies: dict[str, str] = Field(default_factory=dict)
    """What answers the plan's `others`, by arm."""
    shadow: bool = False
    """Users see the control only; arm B answers the same requests unseen, and its pages are compared with those that were shown."""
    faults: FaultConfig = Field(default_factory=FaultConfig)
    """Delivery of events."""
    habits: HabitConfig = Field(default_factory=HabitConfig)
    """How people change over the days."""


class SimulatedUsers(Protocol):
    """What the driver needs of a world."""

    def live_requests(self) -> pd.DataFrame:
        """REQUESTS columns, in time order."""
        ...

    def organic_items(self, request_ids: Any) -> pd.DataFrame:
        """poi_id, category_id, latitude, longitude of the organic results of requests, in their order; empty where pages hold ads alone."""
        ...

    def respond(self, request_row: Any, page_ad_ids: Any, creative_ids: Any = None, above: Any = None) -> Any:
        """click, click_delay_seconds, purchase, purchase_delay_seconds, order_value, creative_click, each [K'], and organic_click,
        organic_click_delay_seconds [O]; `above`: organic results above each ad."""
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
    creative_clicks: int = 0
    organic_clicks: int = 0
    events_failed: int = 0
    duplicates: int = 0
    lost: int = 0
    delayed: int = 0
    messages: list[str] = field(default_factory=list)
    shadow: list[tuple[Any, ...]] = field(default_factory=list)
    waiting: list[dict[str, Any]] = field(default_factory=list)
    """Events on their way."""
    settled: set[tuple[Any, ...]] = field(default_factory=set)
    """Events (type, request, slot or rank) that were answered: copies count once."""


@dataclass(frozen=True)
class ExperimentSummary:
    """What all clients saw together; `experiment.json`."""

    requests: int
    answered: int
    errors: int
    retries: int
    impressions: int
    clicks: int
    """Clicks on ads that users made (those that the service refused are counted apart), as the purchases."""
    purchases: int
    creative_clicks: int
    """Creatives that users opened; likewise, and nobody pays for them."""
    organic_clicks: int
    """Clicks on organic results; likewise."""
    events_failed: int
    """Events of any kind that the service did not take."""
    duplicates: int
    """Copies sent on top, by the configured faults; `lost` and `delayed` likewise."""
    lost: int
    delayed: int
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

    def post(self, route: str, body: dict[str, Any], base_url: str | None = None) -> tuple[dict[str, Any] | None, float, int, str]:
        """(answer or None, milliseconds of the last attempt, retries, text of the failure). `base_url`: another service than the client's own."""
        base = self._base if base_url is None else base_url.rstrip("/")
        payload, message, milliseconds = json.dumps(body).encode(), "", 0.0
        for attempt in range(ATTEMPTS):
            begun = time.perf_counter()
            try:
                answer = self._pool.request("POST", base + route, body=payload)
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


def _rank_body(row: Any, organic: pd.DataFrame) -> dict[str, Any]:
    items = organic[["poi_id", "category_id", "latitude", "longitude"]].to_dict("records")
    return ({"organic": items} if items else {}) | {
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
    """Events of a page: what users did with each ad, a purchase after its click, then clicks on organic results. A market does not say when a
    creative was opened: its event has the page's time."""
    events = []
    for index, ad in enumerate(page["ads"]):
        key = {"request_id": int(row.request_id), "slot": int(ad["slot"]), "ad_id": int(ad["ad_id"])}
        if response.creative_click[index]:
            events.append({"type": "creative_click", **key, "timestamp": row.event_timestamp.isoformat()})
        if not response.click[index]:
            continue
        at = _after(row.event_timestamp, response.click_delay_seconds[index])
        events.append({"type": "click", **key, "timestamp": at.isoformat()})
        if response.purchase[index]:
            at = _after(at, response.purchase_delay_seconds[index])
            events.append({"type": "purchase", **key, "timestamp": at.isoformat(), "order_value": float(response.order_value[index])})
    for index in np.flatnonzero(response.organic_click).tolist():
        at = _after(row.event_timestamp, response.organic_click_delay_seconds[index])
        events.append({"type": "organic_click", "request_id": int(row.request_id), "rank": index + 1, "timestamp": at.isoformat()})
    return events


def _after(time: pd.Timestamp, seconds: float) -> pd.Timestamp:
    return time + pd.Timedelta(seconds=round(float(seconds), 6))


@dataclass(frozen=True)
class _Scene:
    """What every worker needs."""

    world: SimulatedUsers
    client: Client
    config: DriverConfig
    treatments: frozenset[str]
    """Arms whose pages are new to people."""
    first_day: dict[int, pd.Timestamp]
    """First day of each user in the experiment."""
    day_factor: dict[pd.Timestamp, float]
    """Share of the clicks that happen on a day."""
    address: Callable[[int], str]
    """Service of a user."""
    shadow_url: str | None


def _habits(response: Any, row: Any, page: dict[str, Any], scene: _Scene) -> Any:
    """The answer after what the day and curiosity do to it; the same for a request whenever it is asked."""
    habits = scene.config.habits
    if habits.day_drift == 0 and habits.novelty == 0:
        return response
    draws = np.random.default_rng([scene.config.seed, 11, int(row.request_id)])
    clicked = np.asarray(response.click, bool)
    day = row.event_timestamp.floor("D")
    click = clicked & (draws.random(len(clicked)) < scene.day_factor[day])
    if habits.novelty and page["arm"] in scene.treatments:
        age = (day - scene.first_day[int(row.user_id)]) / pd.Timedelta(days=1)
        curious = habits.novelty * 0.5 ** (age / habits.novelty_half_life_days) * np.array([ad["pctr"] for ad in page["ads"]])
        click |= draws.random(len(clicked)) < curious
    kept = clicked & click
    opened, organic = (np.asarray(values, bool) & (draws.random(len(values)) < scene.day_factor[day]) for values in (response.creative_click, response.organic_click))
    return Response(
        click=click,
        click_delay_seconds=np.where(kept, response.click_delay_seconds, 10.0),
        purchase=np.asarray(response.purchase, bool) & kept,
        purchase_delay_seconds=response.purchase_delay_seconds,
        order_value=np.where(kept, response.order_value, 0.0),
        creative_click=opened,
        organic_click=organic,
        organic_click_delay_seconds=response.organic_click_delay_seconds,
    )


@dataclass(frozen=True)
class Response:
    """A user's answer to a page, one entry a slot or organic result; as a world gives it."""

    click: np.ndarray
    click_delay_seconds: np.ndarray
    purchase: np.ndarray
    purchase_delay_seconds: np.ndarray
    order_value: np.ndarray
    creative_click: np.ndarray
    organic_click: np.ndarray
    organic_click_delay_seconds: np.ndarray


def _deliver(events: list[dict[str, Any]], row: Any, scene: _Scene, tally: _Tally) -> list[dict[str, Any]]:
    """The events that are sent now, after the configured faults; delayed ones wait in the tally."""
    faults = scene.config.faults
    if faults == FaultConfig():
        return events
    draws = np.random.default_rng([scene.config.seed, 12, int(row.request_id)])
    skew = pd.Timedelta(seconds=round(float(draws.uniform(-1, 1) * faults.clock_skew_seconds), 6))
    sent: list[dict[str, Any]] = []
    for event in events:
        skewed = event | {"timestamp": (pd.Timestamp(event["timestamp"]) + skew).isoformat()}
        if draws.random() < faults.loss:
            tally.lost += 1
            _count(event, tally)
            continue
        copies = int(draws.integers(1, 5)) if draws.random() < faults.duplicates else 0
        tally.duplicates += copies
        late = draws.random() < faults.delay
        tally.delayed += late
        (tally.waiting if late else sent).extend([skewed] * (1 + copies))
    draws.shuffle(sent)
    return sent


def _count(event: dict[str, Any], tally: _Tally) -> None:
    name = f"{event['type']}s"
    setattr(tally, name, getattr(tally, name) + 1)


def _send(events: list[dict[str, Any]], url: str, scene: _Scene, tally: _Tally) -> None:
    """Post events; each distinct one is counted once, as taken or as failed."""
    answer, _, retries, message = scene.client.post("/v1/events", {"events": events}, url)
    tally.retries += retries
    rejected = {record["index"] for record in answer["rejected"]} if answer is not None else set(range(len(events)))
    for index, event in enumerate(events):
        key = (event["type"], event["request_id"], event["rank" if event["type"] == "organic_click" else "slot"])
        if key in tally.settled:
            continue
        tally.settled.add(key)
        if index in rejected:
            tally.events_failed += 1
        else:
            _count(event, tally)
    if rejected:
        tally.messages.append(message or f"/v1/events: {len(rejected)} of {len(events)} events rejected")


def _visit(row: Any, scene: _Scene, tally: _Tally) -> None:
    """One page view: ask, look, answer."""
    organic = scene.world.organic_items([int(row.request_id)])
    body, url = _rank_body(row, organic), scene.address(int(row.user_id))
    page, milliseconds, retries, message = scene.client.post("/v1/rank", body, url)
    tally.retries += retries
    if page is None:
        tally.errors += 1
        tally.messages.append(message)
        return
    ads = page["ads"]
    tally.rows.append((int(row.request_id), int(row.user_id), page["arm"], page["model_version"], milliseconds, bool(page["degraded"]), len(ads)))
    tally.impressions += len(ads)
    if scene.shadow_url is not None:
        _shadow(row, body, page, milliseconds, scene, tally)
    if not ads and organic.empty:
        return
    shown, creatives, above = (np.array([ad[name] for ad in ads], np.int64) for name in ("ad_id", "creative_id", "above"))
    response = _habits(scene.world.respond(row, shown, creatives, above if len(organic) else None), row, page, scene)
    if events := _deliver(_events_of(row, page, response), row, scene, tally):
        _send(events, url, scene, tally)


SHADOW = pa.schema(
    [pa.field("request_id", pa.int64(), nullable=False), pa.field("user_id", pa.int64(), nullable=False), pa.field("event_timestamp", pa.timestamp("us", tz="UTC"), nullable=False)]
    + [
        pa.field(f"{name}_{side}", kind, nullable=False)
        for side in ("shown", "shadow")
        for name, kind in (("ads", pa.int32()), ("pctr", pa.float64()), ("revenue", pa.float64()), ("price_over_bid", pa.float64()), ("response_ms", pa.float64()), ("degraded", pa.bool_()))
    ]
    + [pa.field("common", pa.int32(), nullable=False), pa.field("model_version_shadow", pa.string(), nullable=False)]
)
"""`shadow.parquet`: one row a request that both policies answered; pctr and revenue are the policy's own predictions, summed over the page."""


def _page_sums(page: dict[str, Any], milliseconds: float) -> tuple[Any, ...]:
    ads = page["ads"]
    ratio = sum(ad["price"] for ad in ads) / max(sum(ad["bid"] for ad in ads), 1e-12)
    return len(ads), sum(ad["pctr"] for ad in ads), sum(ad["pctr"] * ad["price"] for ad in ads), ratio, milliseconds, bool(page["degraded"])


def _shadow(row: Any, body: dict[str, Any], page: dict[str, Any], milliseconds: float, scene: _Scene, tally: _Tally) -> None:
    """Ask the shadow for the same page; nobody sees it."""
    unseen, its_milliseconds, retries, message = scene.client.post("/v1/rank", body, scene.shadow_url)
    tally.retries += retries
    if unseen is None:
        tally.errors += 1
        tally.messages.append(f"shadow: {message}")
        return
    common = len({ad["ad_id"] for ad in page["ads"]} & {ad["ad_id"] for ad in unseen["ads"]})
    tally.shadow.append(
        (int(row.request_id), int(row.user_id), row.event_timestamp, *_page_sums(page, milliseconds), *_page_sums(unseen, its_milliseconds), common, unseen["model_version"])
    )


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
    config: DriverConfig | None = None,
    progress: bool = True,
    token: str | None = None,
    treatments: Iterable[str] = (),
    address: Callable[[int], str] | None = None,
    shadow_url: str | None = None,
) -> ExperimentSummary:
    """Send the live days' requests to the service at `base_url` and post what the users did back.

    Args: out, folder for `experiment.json`, `responses.parquet` and, with a shadow, `shadow.parquet`; progress, a bar on stderr; token, bearer token of the
    service; treatments, arms whose pages are new to people; address, the service of each user where arms have services of their own; shadow_url, a service
    that answers everything unseen. Raises ExperimentError when the service is not there, or refuses more than a twentieth of the requests.
    """
    config = config or DriverConfig()
    requests = draw_users(world.live_requests(), config.most_requests, config.seed)
    if requests.empty:
        raise ExperimentError("the world has no live requests; give it live days (ab_days) and simulate it again")
    workers = config.workers
    client, stop = Client(base_url, 2 * workers, token), threading.Event()
    days = requests["event_timestamp"].dt.floor("D")
    drawn = np.random.default_rng([config.seed, 13]).random(days.nunique())
    factors = {day: 1 - config.habits.day_drift * share for day, share in zip(sorted(days.unique()), drawn, strict=True)}
    first = days.groupby(requests["user_id"]).min().to_dict()
    scene = _Scene(world, client, config, frozenset(treatments), first, factors, address or (lambda user_id: base_url), shadow_url)
    tallies = [_Tally() for _ in range(workers)]
    begun = time.perf_counter()
    with tqdm(total=len(requests), desc="simulated users", unit="request", disable=not progress, mininterval=0.5) as bar:

        def work(queue: Iterator[Any], tally: _Tally, advance: Callable[[int], Any]) -> None:
            for row in queue:
                if stop.is_set():
                    return
                _visit(row, scene, tally)
                advance(1)
                if tally.errors >= GIVE_UP_ERRORS / workers and tally.errors > GIVE_UP_SHARE * (tally.errors + len(tally.rows)):
                    stop.set()
            arms = {request_id: user_id for request_id, user_id, *_ in tally.rows}
            for event in tally.waiting:  # each by itself, after everything else
                _send([event], scene.address(arms[event["request_id"]]), scene, tally)

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
        for name in ("retries", "impressions", "clicks", "purchases", "creative_clicks", "organic_clicks", "events_failed", "duplicates", "lost", "delayed"):
            total[name] += int(getattr(tally, name))
    seconds = time.perf_counter() - begun
    summary = ExperimentSummary(requests=len(requests), answered=len(rows), errors=errors, arms=_by_arm(responses), seconds=round(seconds, 1), messages=messages, **total)
    logs.write_parquet(out / "responses.parquet", pa.Table.from_pandas(responses, schema=RESPONSES, preserve_index=False))
    if shadow_url is not None:
        compared = pd.DataFrame([row for tally in tallies for row in tally.shadow], columns=SHADOW.names).sort_values("request_id", ignore_index=True)
        logs.write_parquet(out / "shadow.parquet", pa.Table.from_pandas(compared, schema=SHADOW, preserve_index=False))
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
