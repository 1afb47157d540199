"""User features from the real stores, SQLite and Redis: what a click changes, what a fault does to pages, and how they recover."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_world import BODY, served_home

from features.store import REDIS_VARIABLE, open_store, read_user
from serving.assembly import Assembled, assemble
from serving.launch import free_port
from serving.messages import EventsRequest, RankRequest
from serving.pushes import Pusher
from serving.settings import Arm, ServingConfig
from serving.users import FAILED, LATE, SKIPPED, STALE, UNKNOWN

pytestmark = pytest.mark.xdist_group("serving_features")
DEADLINE_MS = 400.0
"""Generous: the suite shares its machine. `make soak` has the 50 ms of the service."""


class Redis:
    """A redis-server of our own."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        self.process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError("redis-server did not start")

    def command(self, *words: str) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(" ".join(words).encode() + b"\r\n")
            assert connection.recv(100).startswith(b"+OK")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    os.environ.pop("EGA_SIGNING_KEY", None)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sqlite":
        yield served_home(folder)
        return
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt install redis-server)")
    server = Redis(folder)
    os.environ[REDIS_VARIABLE] = f"127.0.0.1:{server.port},db=1"
    try:
        yield served_home(folder)
    finally:
        del os.environ[REDIS_VARIABLE]
        server.stop()


@pytest.fixture
def redis(home: Path) -> Iterator[Redis]:
    """Another server with the same rows, to be hurt."""
    if REDIS_VARIABLE not in os.environ:
        pytest.skip("needs the Redis online store")
    from features.build import build_features

    before, server = os.environ[REDIS_VARIABLE], Redis(home)
    os.environ[REDIS_VARIABLE] = f"127.0.0.1:{server.port},db=0"
    build_features(home.parent / "logs", home, behaviours=16)
    try:
        yield server
    finally:
        os.environ[REDIS_VARIABLE] = before
        server.process.send_signal(signal.SIGCONT)
        server.stop()


@pytest.fixture
def service(home: Path) -> Iterator[Callable[..., Assembled]]:
    made: list[Assembled] = []

    def make(**settings: Any) -> Assembled:
        shutil.rmtree(home / "events", ignore_errors=True)
        options = {"feature_deadline_ms": DEADLINE_MS, "feature_cooldown_seconds": 0.2, "push_wait_ms": 20_000.0, **settings}
        made.append(assemble(ServingConfig(home=home, arms=(Arm(name="ega", policy="model"),), events_synchronous="normal", **options)))
        made[-1].ranking.warm_up()
        return made[-1]

    yield make
    for one in made:
        one.close()


def page(served: Assembled, user: int = 3, **fields: object) -> dict[str, Any]:
    return served.ranking.rank(RankRequest.model_validate({**BODY, "user_id": user, **fields}))


def click(served: Assembled, shown: dict[str, Any], slot: int = 1) -> None:
    events = {"events": [{"type": "click", "request_id": shown["request_id"], "slot": slot}]}
    assert served.ranking.events(EventsRequest.model_validate(events)).accepted == 1


def behaviours_of(home: Path, user: int) -> list[int]:
    found = read_user(open_store(home), user, 16)
    return [] if found is None else found.histories.behaviour_id[0, : found.histories.count[0]].tolist()


# -- a click is seen by the next request --------------------------------------------------------------------------------


def test_the_next_request_sees_the_click(home: Path, service: Callable[..., Assembled]) -> None:
    served = service()
    before, first = behaviours_of(home, 3), page(served)
    assert first["degraded"] == [] and len(before) == 8
    click(served, first)
    after = behaviours_of(home, 3)
    assert after[1:] == before and after[0] not in before  # newest first
    time.sleep(0.001)  # behaviours of the very instant of a request are not its past
    second = page(served)
    assert [ad["pctr"] for ad in second["ads"]] != [ad["pctr"] for ad in first["ads"]]


def test_a_click_on_an_organic_result_joins_the_history_and_an_opened_creative_does_not(home: Path, service: Callable[..., Assembled]) -> None:
    served = service()
    items = [{"poi_id": 950 + k, "category_id": k, "latitude": 40.0, "longitude": -74.0} for k in range(2)]
    before, shown = behaviours_of(home, 8), page(served, user=8, organic=items)
    key = {"request_id": shown["request_id"]}
    events = [{"type": "creative_click", **key, "slot": 1}, {"type": "organic_click", **key, "rank": 2}]
    assert served.ranking.events(EventsRequest.model_validate({"events": events})).accepted == 2
    found = read_user(open_store(home), 8, 16).histories
    assert behaviours_of(home, 8)[1:] == before and found.count[0] == 9
    assert (found.poi_id[0, 0], found.category_id[0, 0], found.action[0, 0], found.creative_id[0, 0]) == (951, 1, 2, 0)
    assert served.ranking._log.unpushed()[1] == []


def test_many_clicks_in_one_second_are_all_kept_in_order(home: Path, service: Callable[..., Assembled]) -> None:
    """Feast's Redis store drops what is not a whole second newer unless it is told otherwise; its SQLite store keeps what comes last."""
    served = service()
    shown = page(served, user=4)
    for slot in (2, 1, 3):
        click(served, shown, slot)
    assert len(behaviours_of(home, 4)) == 11
    repeated = {"events": [{"type": "click", "request_id": shown["request_id"], "slot": 2}]}
    assert served.ranking.events(EventsRequest.model_validate(repeated)).duplicates == 1
    assert len(set(behaviours_of(home, 4))) == 11


def test_clicks_of_a_killed_service_are_pushed_by_the_next(home: Path, service: Callable[..., Assembled]) -> None:
    first = service(push_events=False)
    click(first, page(first, user=5))
    assert len(behaviours_of(home, 5)) == 8
    log = first.ranking._log
    done = threading.Event()
    pusher = Pusher(log, lambda frame: (None, done.set())[0])  # what it would push, and that it marks it
    assert done.wait(20) and pusher.flush(20) and log.unpushed()[1] == []
    pusher.close()


def test_a_failing_push_is_tried_again_and_holds_no_call_up(service: Callable[..., Assembled]) -> None:
    served = service(push_events=False)
    click(served, page(served, user=6))
    attempts: list[int] = []

    def push(frame: Any) -> None:
        attempts.append(len(frame))
        if len(attempts) < 3:
            raise ConnectionError("refused")

    pusher = Pusher(served.ranking._log, push)
    assert not pusher.flush(20)  # returns as the first try fails, not after the wait
    deadline = time.monotonic() + 20
    while not pusher.flush(0.2) and time.monotonic() < deadline:
        pass
    assert attempts[:3] == [1, 1, 1] and served.ranking._log.unpushed()[1] == []
    pusher.close()


# -- faults ---------------------------------------------------------------------------------------------------------------


def answered_in_time(served: Assembled, allowed: set[str], pages: int = 12) -> list[dict[str, Any]]:
    """Pages during a fault: each lawful, degraded for an allowed reason or not at all."""
    answers = [page(served, user=3) for _ in range(pages)] + [page(served, user=25)]
    for answer in answers:
        assert len(answer["ads"]) == 5 and set(answer["degraded"]) <= allowed
    return answers


def recovers(served: Assembled, within_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        if page(served, user=3)["degraded"] == []:
            return
        time.sleep(0.05)
    raise AssertionError("still degraded")


@pytest.mark.parametrize("fault", ["stopped", "killed", "empty"])
def test_redis_faults_degrade_pages_and_pass(fault: str, redis: Redis, service: Callable[..., Assembled], home: Path) -> None:
    served = service()
    healthy = page(served, timestamp=None)
    assert healthy["degraded"] == []
    if fault == "stopped":
        redis.process.send_signal(signal.SIGSTOP)
    elif fault == "killed":
        redis.stop()
    else:
        redis.command("FLUSHALL")
    answers = answered_in_time(served, {STALE, LATE, FAILED, SKIPPED, UNKNOWN})
    assert all(answer["degraded"] == [STALE] for answer in answers[:-1])  # this user was read before: the last known features rank
    assert answers[-1]["degraded"][0] in {LATE, FAILED, SKIPPED, UNKNOWN}
    assert [ad["ad_id"] for ad in answers[0]["ads"]] == [ad["ad_id"] for ad in healthy["ads"]]
    if fault != "empty":
        click(served, answers[0])  # the click waits in the event log
    if fault == "stopped":
        redis.process.send_signal(signal.SIGCONT)
    elif fault == "killed":
        redis.start()
    if fault != "stopped":
        from features.build import build_features

        build_features(home.parent / "logs", home, behaviours=16)
    recovers(served)
    if fault != "empty":
        deadline = time.monotonic() + 20
        while len(behaviours_of(home, 3)) < 9 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(behaviours_of(home, 3)) == 9


def test_a_service_starts_without_its_online_store_and_finds_it_later(redis: Redis, service: Callable[..., Assembled], home: Path) -> None:
    redis.stop()
    served = service()
    assert answered_in_time(served, {FAILED, LATE, SKIPPED})
    redis.start()
    from features.build import build_features

    build_features(home.parent / "logs", home, behaviours=16)
    recovers(served)


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "missing"])
def test_a_damaged_registry_degrades_pages_until_it_is_mended(damage: str, home: Path, service: Callable[..., Assembled]) -> None:
    registry = home / "feast" / "registry.db"
    whole = registry.read_bytes()
    data = {"empty": b"", "half": whole[: len(whole) // 2], "flipped": whole[:100] + bytes(255 - b for b in whole[100:]), "missing": None}[damage]
    try:
        registry.unlink()
        if data is not None:
            registry.write_bytes(data)
        served = service()
        answers = answered_in_time(served, {FAILED, LATE, SKIPPED})
        assert all(answer["degraded"] for answer in answers)
    finally:
        registry.write_bytes(whole)
    recovers(served)


def test_a_registry_that_is_damaged_while_serving_changes_nothing(home: Path, service: Callable[..., Assembled]) -> None:
    served = service()
    registry = home / "feast" / "registry.db"
    whole = registry.read_bytes()
    try:
        registry.write_bytes(b"")
        assert all(answer["degraded"] == [] for answer in answered_in_time(served, set())[:-1])
    finally:
        registry.write_bytes(whole)


def test_a_locked_sqlite_store_degrades_pages_and_passes(home: Path, service: Callable[..., Assembled]) -> None:
    import sqlite3

    if REDIS_VARIABLE in os.environ:
        pytest.skip("needs the SQLite online store")
    served = service()
    assert page(served)["degraded"] == []
    blocker = sqlite3.connect(home / "feast" / "online.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        answers = answered_in_time(served, {STALE, LATE, FAILED, SKIPPED})
        assert answers[0]["degraded"] == [STALE]
    finally:
        blocker.rollback()
        blocker.close()
    recovers(served)


MATERIALISE = """
import sys
from pathlib import Path
from features.build import build_features
while True:
    build_features(Path(sys.argv[1]), Path(sys.argv[2]), behaviours=16)
    print("built", flush=True)
"""


def test_pages_go_on_while_features_are_materialised_and_after_that_is_killed(home: Path, service: Callable[..., Assembled]) -> None:
    served = service()
    expected = page(served, timestamp=None)
    child = subprocess.Popen(["nice", sys.executable, "-c", MATERIALISE, str(home.parent / "logs"), str(home)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert child.stdout is not None and child.stdout.readline() == b"built\n"
        answers = answered_in_time(served, {STALE, LATE, FAILED, SKIPPED}, 40)
    finally:
        child.kill()
        child.wait()
    recovers(served)
    answers.append(page(served, timestamp=None))
    assert answers[-1]["degraded"] == [] and [ad["ad_id"] for ad in answers[-1]["ads"]] == [ad["ad_id"] for ad in expected["ads"]]
    assert np.isfinite([ad["price"] for answer in answers for ad in answer["ads"]]).all()
