"""`ega bench load`: the ranking service under open-loop load, up to ten times what it can do.

Arrivals are a Poisson process that does not wait for answers, and latency counts from the scheduled time: a client that is late
because the machine is busy is no excuse. Figures of one run belong together; the generator shares the machine with the service.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd

_OPEN_CONNECTIONS = 512
"""Most connections of the generator: a service that stops answering must not take the generator's files."""
_IDLE_SECONDS = 2.0
"""A kept-alive connection that was idle longer is not used again: servers close them, BentoML's after 5 s."""


@dataclass(frozen=True)
class Answer:
    """One request: all times in seconds of one clock; `status` 0: the connection broke."""

    scheduled: float
    ended: float
    status: int
    request_id: int = 0
    ads: int = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.scheduled


class Client:
    """HTTP/1.1 over a pool of kept-alive connections: as little work a request as Python allows, because it shares the machine."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self._free: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._open = asyncio.Semaphore(_OPEN_CONNECTIONS)

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body; (0, b"") where the connection broke."""
        async with self._open:
            try:
                return await self._exchange(path, body, *(self._idle() or await asyncio.open_connection(self._host, self._port)))
            except (OSError, asyncio.IncompleteReadError):
                return 0, b""

    def _idle(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        if not self._free:
            return None
        used, reader, writer = self._free.pop()
        if time.perf_counter() - used < _IDLE_SECONDS:
            return reader, writer
        writer.close()
        self.close()  # the others were idle even longer
        return None

    async def _exchange(self, path: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, bytes]:
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            writer.write(head.encode() + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
            answer = await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in lines:
            writer.close()
        else:
            self._free.append((time.perf_counter(), reader, writer))
        return int(lines[0][9:12]), answer

    def close(self) -> None:
        for _, _, writer in self._free:
            writer.close()
        self._free.clear()


async def _ask(client: Client, body: bytes, scheduled: float) -> Answer:
    status, text = await client.post("/v1/rank", body)
    ended = time.perf_counter()
    page = json.loads(text) if status == 200 else {}
    return Answer(scheduled, ended, status, page.get("request_id", 0), len(page.get("ads", ())))


async def closed_loop(url: str, bodies: Sequence[bytes], seconds: float, clients: int) -> list[Answer]:
    """`clients` that each send the next request when the last is answered."""
    client, until = Client(url), time.perf_counter() + seconds
    answers: list[Answer] = []

    async def one(first: int) -> None:
        turn = first
        while (now := time.perf_counter()) < until:
            answers.append(await _ask(client, bodies[turn % len(bodies)], now))
            turn += clients

    await asyncio.gather(*(one(first) for first in range(clients)))
    client.close()
    return answers


async def open_loop(url: str, bodies: Sequence[bytes], rate: float, seconds: float, rng: np.random.Generator) -> list[Answer]:
    """Poisson arrivals at `rate` a second; the i-th request is sent at its time whatever became of the others."""
    gaps = rng.exponential(1.0 / rate, int(rate * seconds * 1.5) + 50)
    due = np.cumsum(gaps)
    due = due[due < seconds]
    client, start = Client(url), time.perf_counter()
    tasks = []
    for turn, offset in enumerate(due):
        pause = start + offset - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        tasks.append(asyncio.create_task(_ask(client, bodies[turn % len(bodies)], start + offset)))
    answers = list(await asyncio.gather(*tasks))
    client.close()
    return answers


def bodies_of(home: Path, count: int, rng: np.random.Generator) -> list[bytes]:
    """Requests of known users at places of ads, all of cities with ads."""
    from features.store import load_catalogue, source_path

    ads, users = load_catalogue(home), pd.read_parquet(source_path(home, "user_profile"), columns=["user_id"])["user_id"].unique()
    rows = ads.iloc[rng.integers(0, len(ads), count)]
    return [
        json.dumps({"user_id": int(user), "city_id": int(city), "latitude": float(latitude), "longitude": float(longitude)}).encode()
        for user, city, latitude, longitude in zip(rng.choice(users, count), rows["city_id"], rows["latitude"], rows["longitude"], strict=True)
    ]


def copy_of_home(home: Path, folder: Path) -> Path:
    """A home with the same features and models and no traffic."""
    shutil.copytree(home, folder / "home", ignore=shutil.ignore_patterns("events*", "serving", "*.lock"))
    return folder / "home"


def quantile(answers: Sequence[Answer], share: float) -> float:
    """Of the answered requests' seconds; NaN without any."""
    seconds = [answer.seconds for answer in answers if answer.status == 200]
    return float(np.quantile(seconds, share)) if seconds else float("nan")


def recovery_seconds(answers: Sequence[Answer], usual_p99: float, window: float = 0.5) -> float:
    """Time from the first scheduled request until no window holds a refusal or has a median above the p99 that is usual at this load."""
    start = min(answer.scheduled for answer in answers)
    frame = pd.DataFrame({"window": [int((a.scheduled - start) / window) for a in answers], "ok": [a.status == 200 for a in answers], "seconds": [a.seconds for a in answers]})
    windows = frame.groupby("window").agg(ok=("ok", "all"), seconds=("seconds", "median"))
    bad = windows.index[~windows["ok"] | (windows["seconds"] > usual_p99)]
    return 0.0 if bad.empty else float(bad.max() + 1) * window


def stage_seconds(url: str) -> dict[str, tuple[float, float]]:
    """Seconds and pages that the service spent on every stage of a page since it started, from its /metrics."""
    from urllib.request import urlopen

    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, list[float]] = {}
    with urlopen(f"{url}/metrics", timeout=30) as answer:  # noqa: S310 - our own service
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                if sample.name in ("ega_stage_seconds_sum", "ega_stage_seconds_count"):
                    found.setdefault(sample.labels["stage"], [0.0, 0.0])[sample.name.endswith("count")] += sample.value
    return {stage: (total, count) for stage, (total, count) in found.items()}


def _stages(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]], alone: Sequence[Answer]) -> list[dict[str, Any]]:
    """Mean milliseconds of an unloaded page by stage; `elsewhere` is what the client waited beyond them."""
    means = {
        stage: 1e3 * (total - before.get(stage, (0.0, 0.0))[0]) / (count - before.get(stage, (0.0, 0.0))[1])
        for stage, (total, count) in after.items() if stage in ("features", "rank", "event_log") and count > before.get(stage, (0.0, 0.0))[1]
    }  # fmt: skip
    whole = 1e3 * float(np.mean([answer.seconds for answer in alone]))
    return [{"stage": stage, "mean_ms": mean} for stage, mean in [*means.items(), ("elsewhere", whole - sum(means.values())), ("whole", whole)]]


def _row(phase: str, offered: float, answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    ok = sum(answer.status == 200 for answer in answers)
    return {
        "phase": phase, "offered_per_s": offered, "requests": len(answers), "answered_per_s": ok / seconds, "refused": sum(a.status in (429, 503) for a in answers),
        "p50_ms": 1e3 * quantile(answers, 0.5), "p99_ms": 1e3 * quantile(answers, 0.99),
        "refused_p99_ms": 1e3 * float(np.quantile([a.seconds for a in answers if a.status != 200], 0.99)) if ok < len(answers) else float("nan"),
    }  # fmt: skip


def load(
    home: Path, seconds: float = 60.0, factor: float = 10.0, seed: int = 0, settings: Any = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Drive a service of our own on a copy of a home: unloaded, at capacity, at half load, at `factor` times capacity for `seconds`, at half load again.

    Returns: figures, and a `table` with a row a phase. Latency in milliseconds from the scheduled time; p99 of the answered (200).
    `records_missing` and `records_twice`: answered pages that are not, or more than once, in the event log; `other_statuses`: what
    was neither 200 nor a refusal with Retry-After.
    """
    from serving.event_log import read_impressions, read_requests
    from serving.launch import running_service
    from serving.settings import ServingConfig

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        copied = copy_of_home(home, Path(folder))
        config = replace(settings or ServingConfig(home=home), home=copied, signing_home=(settings.signing_home if settings else None) or home.parent)
        bodies = bodies_of(copied, 2_000, rng)
        with running_service(config, log=Path(folder) / "service.log") as service:
            say("unloaded: one request after the other")
            asyncio.run(closed_loop(service.url, bodies, 3.0, 1))  # what is slow only once
            alone_seconds, capacity_seconds = max(seconds / 4, 3.0), max(seconds / 6, 3.0)
            stages = stage_seconds(service.url)
            alone = asyncio.run(closed_loop(service.url, bodies, alone_seconds, 1))
            parts = _stages(stages, stage_seconds(service.url), alone)
            say("capacity: always one request waiting")
            busy = asyncio.run(closed_loop(service.url, bodies, capacity_seconds, config.admission_limit))
            capacity = sum(answer.status == 200 for answer in busy) / capacity_seconds
            say(f"overload: {factor:g} x {capacity:.0f}/s for {seconds:g} s")
            half_seconds = max(seconds / 3, 4.0)
            before = asyncio.run(open_loop(service.url, bodies, 0.5 * capacity, half_seconds, rng))
            over = asyncio.run(open_loop(service.url, bodies, factor * capacity, seconds, rng))
            after = asyncio.run(open_loop(service.url, bodies, 0.5 * capacity, half_seconds, rng))
        everything = [*alone, *busy, *before, *over, *after]
        shown = {answer.request_id: answer.ads for answer in everything if answer.status == 200}
        logged = read_requests(config.event_log)["request_id"]
        impressions = read_impressions(config.event_log).groupby("request_id").size()
    usual, loaded = quantile(alone, 0.99), quantile(over, 0.99)
    statuses = Counter(answer.status for answer in everything)
    figures = {
        "capacity_per_s": capacity,
        "goodput_ratio": sum(answer.status == 200 for answer in over) / seconds / capacity,
        "p99_ratio_overload_to_unloaded": loaded / usual,
        "recovery_s": recovery_seconds(after, quantile(before, 0.99)),
        "other_statuses": sum(count for status, count in statuses.items() if status not in (200, 429, 503)),
        "pages_answered": len(shown),
        "records_missing": len(set(shown) - set(logged)) + sum(int(impressions.get(request, 0)) != ads for request, ads in shown.items()),
        "records_twice": int(logged.duplicated().sum()),
    }
    return {
        **figures, "statuses": dict(sorted(statuses.items())), "second_table": [{name.replace("_", " "): value for name, value in figures.items()}], "third_table": parts,
        "table": [
            _row("unloaded", float("nan"), alone, alone_seconds),
            _row("capacity", float("nan"), busy, capacity_seconds),
            _row("half load", 0.5 * capacity, before, half_seconds),
            _row(f"{factor:g} x capacity", factor * capacity, over, seconds),
            _row("half load after it", 0.5 * capacity, after, half_seconds),
        ],
    }  # fmt: skip
