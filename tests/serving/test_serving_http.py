"""The whole service over HTTP: a real `bentoml serve` child on a real home, and the hostile corpus. No 5xx, no price above a bid."""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_world import BODY, catalogue, served_home

from auction.receipt import difference
from benchmarks.load import copy_of_home
from serving.event_log import read_impressions, read_organic, read_receipts, read_requests, read_service_facts
from serving.launch import Running, StartError, running_service
from serving.openapi import FILE, rendered, specification
from serving.settings import SETTINGS_VARIABLE, Arm, ServingConfig
from serving.store import live_model

pytestmark = pytest.mark.xdist_group("serving_http")
ARMS = (Arm(name="control", policy="bootstrap"), Arm(name="ega", policy="model"))
ADS = catalogue().set_index("ad_id")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.pop("EGA_SIGNING_KEY", None)
    return served_home(tmp_path_factory.mktemp("ega"))


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[Running]:
    log = home / "service.log"
    with running_service(ServingConfig(home=home, arms=ARMS, feature_deadline_ms=5000.0), log=log) as running:
        yield running
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, trust_env=False, timeout=20.0) as client:
        yield client


def post(client: httpx.Client, body: Any, path: str = "/v1/rank") -> httpx.Response:
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    return client.post(path, content=text, headers={"content-type": "application/json"})


def user_of(client: httpx.Client, arm: str) -> int:
    return next(user for user in range(1, 30) if post(client, BODY | {"user_id": user}).json()["arm"] == arm)


def check_page(page: dict[str, Any], bids: dict[int, float] | None = None) -> None:
    """Every law of an answer, from the outside."""
    shown = [ad["ad_id"] for ad in page["ads"]]
    assert len(set(shown)) == len(shown) and [ad["slot"] for ad in page["ads"]] == list(range(1, len(shown) + 1))
    for ad in page["ads"]:
        bid = (bids or {}).get(ad["ad_id"], ADS.loc[ad["ad_id"], "bid"])
        assert ad["bid"] == bid and ADS.loc[ad["ad_id"], "reserve"] <= ad["price"] <= bid
        assert math.isfinite(ad["price"]) and 0.0 <= ad["pctr"] <= 1.0 and ad["creative_id"] == ADS.loc[ad["ad_id"], "creative_id"]


def test_both_arms_answer_and_are_on_record(client: httpx.Client, home: Path) -> None:
    version = live_model(home, bytes.fromhex((home.parent / "signing.key").read_text())).version
    for arm, expected in (("control", "bootstrap-1"), ("ega", version)):
        user = user_of(client, arm)
        page = post(client, BODY | {"user_id": user, "session_id": 4, "timestamp": "2026-06-01T12:00:00Z"}).json()
        check_page(page)
        assert (page["arm"], page["model_version"], len(page["ads"]), page["degraded"]) == (arm, expected, 5, [])
        logged = read_impressions(home / "events" / "events.db").query("request_id == @page['request_id']")
        assert logged["ad_id"].tolist() == [ad["ad_id"] for ad in page["ads"]] and logged["payment"].tolist() == [ad["price"] for ad in page["ads"]]
        if arm == "ega":
            assert page["price_mode"] == "critical" and logged["propensity"].eq(1.0).all()


def test_unknown_users_are_degraded_not_refused(client: httpx.Client) -> None:
    pages = [post(client, BODY | {"user_id": user}).json() for user in range(10**9, 10**9 + 12)]
    for page in pages:
        check_page(page)
        assert page["degraded"] == (["user_features_default"] if page["arm"] == "ega" else [])
    assert {page["arm"] for page in pages} == {"control", "ega"}


def test_bids_filters_and_modes(client: httpx.Client) -> None:
    user = user_of(client, "ega")
    bids = {int(ad): float(bid) for ad, bid in zip(ADS.query("city_id == 0").index, [1e6, 5e-324, 0.05, 0.04, 1e-9], strict=False)}
    overrides = [{"ad_id": ad, "bid": bid} for ad, bid in bids.items()]
    for mode in ("critical", "gsp", "first_price"):
        page = post(client, BODY | {"user_id": user, "bids": overrides, "price_mode": mode}).json()
        check_page(page, bids)
        assert page["price_mode"] == mode and page["degraded"] == []
        if mode == "first_price":
            assert all(ad["bid"] - 1e-4 <= ad["price"] <= ad["bid"] for ad in page["ads"])  # rounded down to the currency step
    refused = post(client, BODY | {"user_id": user, "price_mode": "learned"})
    assert refused.status_code == 422 and refused.json()["error"]["code"] == "price_mode_unavailable"
    only = post(client, BODY | {"user_id": user, "candidates": [1000, 1002, 1004], "exclude": [1002], "slots": 50}).json()
    assert sorted(ad["ad_id"] for ad in only["ads"]) == [1000, 1004]


def test_a_repeated_request_id_is_one_page(client: httpx.Client, home: Path) -> None:
    body = BODY | {"request_id": 2**62 + 1}
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(post(httpx.Client(base_url=client.base_url, trust_env=False), body))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.append(post(client, body))
    assert {answer.status_code for answer in answers} == {200} and len({answer.text for answer in answers}) == 1
    assert (read_requests(home / "events" / "events.db")["request_id"] == 2**62 + 1).sum() == 1
    assert post(client, body | {"user_id": 8}).status_code == 409


def test_events_count_once_and_unknown_ones_are_listed(client: httpx.Client, home: Path) -> None:
    page = post(client, BODY).json()
    events = [
        {"type": "click", "request_id": page["request_id"], "slot": 1, "ad_id": page["ads"][0]["ad_id"]},
        {"type": "purchase", "request_id": page["request_id"], "slot": 1, "order_value": 12.5},
        {"type": "click", "request_id": 404, "slot": 1},
        {"type": "click", "request_id": page["request_id"], "slot": 2, "ad_id": 1},
    ]
    first, again = (post(client, {"events": events}, "/v1/events") for _ in range(2))
    rejected = [
        {"index": 2, "request_id": 404, "slot": 1, "reason": "unknown_impression"},
        {"index": 3, "request_id": page["request_id"], "slot": 2, "reason": "ad_mismatch"},
    ]
    assert first.json() == {"accepted": 2, "duplicates": 0, "rejected": rejected}
    assert again.json() == {"accepted": 0, "duplicates": 2, "rejected": rejected}
    logged = read_impressions(home / "events" / "events.db").query("request_id == @page['request_id']")
    assert logged["click"].tolist() == [1, 0, 0, 0, 0] and logged["order_value"].tolist() == [12.5, 0, 0, 0, 0]


def test_creatives_opened_and_organic_results_clicked_are_on_record(client: httpx.Client, home: Path) -> None:
    items = [{"poi_id": 900 + k, "category_id": k, "latitude": 40.0, "longitude": -74.0} for k in (2, 0, 1)]
    page = post(client, BODY | {"organic": items, "slots": 2}).json()
    key = {"request_id": page["request_id"]}
    events = [
        {"type": "creative_click", **key, "slot": 2, "ad_id": page["ads"][1]["ad_id"]},
        {"type": "organic_click", **key, "rank": 3},
        {"type": "organic_click", **key, "rank": 4},
        {"type": "creative_click", **key, "slot": 3},
    ]
    first, again = (post(client, {"events": events}, "/v1/events") for _ in range(2))
    rejected = [{"index": 2, **key, "rank": 4, "reason": "unknown_impression"}, {"index": 3, **key, "slot": 3, "reason": "unknown_impression"}]
    assert first.json() == {"accepted": 2, "duplicates": 0, "rejected": rejected}
    assert again.json() == {"accepted": 0, "duplicates": 2, "rejected": rejected}
    log = home / "events" / "events.db"
    shown, organic = (frame[frame["request_id"] == page["request_id"]] for frame in (read_impressions(log), read_organic(log)))
    assert shown["creative_click"].tolist() == [0, 1] and shown["click"].tolist() == [0, 0]
    assert organic["poi_id"].tolist() == [902, 900, 901] and organic["click"].tolist() == [0, 0, 1]
    taken = [ad["slot"] + ad["above"] for ad in page["ads"]]
    assert organic["position"].tolist() == [place for place in range(1, 6) if place not in taken]


@pytest.mark.parametrize(
    ("event", "field", "message"),
    [
        ({"type": "click"}, "slot", "click needs slot"),
        ({"type": "creative_click", "rank": 1}, "slot", "creative_click needs slot"),
        ({"type": "click", "slot": 1, "rank": 1}, "rank", "click takes no rank"),
        ({"type": "organic_click"}, "rank", "organic_click needs rank"),
        ({"type": "organic_click", "slot": 1}, "slot", "organic_click takes no slot"),
        ({"type": "organic_click", "slot": 1, "rank": 1}, "slot", "organic_click takes no slot"),
        ({"type": "organic_click", "rank": 1, "ad_id": 1000}, "ad_id", "organic_click takes no ad_id"),
        ({"type": "organic_click", "rank": "1"}, "rank", "valid integer"),
        ({"type": "organic_click", "rank": 0}, "rank", "greater than or equal to 1"),
        ({"type": "organic_click", "rank": 51}, "rank", "less than or equal to 50"),
        ({"type": "purchase", "slot": True}, "slot", "valid integer"),
        ({"type": "visit", "slot": 1}, "type", "creative_click"),
    ],
)
def test_an_event_at_no_place_or_at_two_is_refused_by_name(client: httpx.Client, event: dict[str, Any], field: str, message: str) -> None:
    answer = post(client, {"events": [{"request_id": 1} | event]}, "/v1/events")
    assert answer.status_code == 422 and answer.json()["error"]["field"].endswith(f"events.0.{field}") and message in answer.json()["error"]["message"]


def raw(**fields: str) -> str:
    """A body with fields as literal JSON text, so that it need not be valid."""
    return json.dumps(BODY)[:-1] + "".join(f', "{name}": {text}' for name, text in fields.items()) + "}"


def bid_of(text: str) -> str:
    return raw(bids=f'[{{"ad_id": 1000, "bid": {text}}}]')


HOSTILE = {
    "empty": "", "blank": "  \n", "not json": "{", "null": "null", "list": "[]", "number": "7", "string": '"x"', "missing": "{}", "extra field": raw(x="1"),
    "NaN latitude": raw(latitude="NaN"), "Infinity": raw(longitude="Infinity"), "-Infinity": raw(longitude="-Infinity"), "1e400": raw(latitude="1e400"),
    "off the globe": raw(latitude="90.1"), "NaN bid": bid_of("NaN"), "Infinity bid": bid_of("Infinity"), "1e400 bid": bid_of("1e400"), "zero bid": bid_of("0"),
    "minus zero bid": bid_of("-0.0"), "negative bid": bid_of("-1"), "huge bid": bid_of("1000001"), "bid null": bid_of("null"), "bid text": bid_of('"1"'),
    "bid true": bid_of("true"), "bid twice": raw(bids='[{"ad_id": 1000, "bid": 1}, {"ad_id": 1000, "bid": 2}]'), "bids object": raw(bids='{"1000": 1}'),
    "candidates none": raw(candidates="[]"), "candidates twice": raw(candidates="[1000, 1000]"), "exclude twice": raw(exclude="[1000, 1000]"),
    "candidates of another city": raw(candidates="[1001]"), "unknown excluded": raw(exclude="[1]"), "candidate text": raw(candidates='["1000"]'),
    "candidate true": raw(candidates="[true]"), "candidate 1.0": raw(candidates="[1000.0]"), "candidate null": raw(candidates="[null]"),
    "400,000 candidates": raw(candidates=json.dumps(list(range(400_000)))), "1,000,000 candidates": raw(candidates="[" + "1," * 999_999 + "1]"),
    "1,000,000 long ids": raw(candidates=json.dumps(list(range(10**6, 2 * 10**6)))), "user text": raw(user_id='"7"'), "user true": raw(user_id="true"),
    "user 7.0": raw(user_id="7.0"), "user negative": raw(user_id="-1"), "user 2^63": raw(user_id=str(2**63)), "user null": raw(user_id="null"),
    "5,000 digits": raw(user_id="9" * 5000), "unknown city": raw(city_id="99"), "city 2^31": raw(city_id=str(2**31)), "slots 0": raw(slots="0"),
    "slots 51": raw(slots="51"), "slots 2.5": raw(slots="2.5"), "deep": raw(candidates="[" * 100_000), "lone surrogate": raw(x='"\\ud800"'), "NUL": raw(x='"\\u0000"'),
    "right to left": raw(user_id='"\\u202e7"'), "bad utf-8": json.dumps(BODY).encode() + b"\xff", "two values": json.dumps(BODY) * 2, "comment": "/* x */ {}",
    "time text": raw(timestamp='"yesterday"'), "time without zone": raw(timestamp='"2026-06-01T12:00:00"'), "time in ms": raw(timestamp="1780000000000"),
    "time year 1": raw(timestamp='"0001-01-01T00:00:00+14:00"'), "time true": raw(timestamp="true"), "offset": raw(utc_offset_minutes="841"),
    "price mode": raw(price_mode='"free"'), "price mode number": raw(price_mode="1"), "5 MB": "x" * 5_000_000, "5 MB of JSON": raw(exclude="[" + "1" * 5_000_000 + "]"),
    "100 MB": b" " * 100_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_get_a_clear_4xx(client: httpx.Client, name: str) -> None:
    for path in ("/v1/rank", "/v1/events"):
        answer = post(client, HOSTILE[name], path)
        assert answer.status_code in (400, 413, 422), answer.text
        error = answer.json()["error"]
        assert set(error) == {"code", "message", "field"} and error["message"] and len(answer.content) < 600
        assert "Traceback" not in answer.text and "site-packages" not in answer.text


def test_denormal_bids_and_odd_but_valid_bodies_are_served(client: httpx.Client) -> None:
    for body in (bid_of("5e-324"), bid_of("1e6"), raw(latitude="-0.0"), raw(timestamp="0"), raw(slots="50"), raw(user_id=str(2**63 - 1)), " " + raw() + "\n"):
        answer = post(client, body)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert all(ADS.loc[ad["ad_id"], "reserve"] <= ad["price"] <= ad["bid"] for ad in page["ads"])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/vnd.bentoml+pickle"}, 415), ({"content-type": "multipart/form-data; boundary=x"}, 415), ({"content-type": "text/plain"}, 415),
        ({}, 415), ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
    ],
)  # fmt: skip
def test_other_content_types(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    answer = client.post("/v1/rank", content=b"\x80\x04\x95junk", headers=headers)
    assert answer.status_code == status and answer.json()["error"]["code"].startswith("unsupported")


def raw_http(service: Running, request: bytes, patience: float = 5.0) -> bytes:
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=patience) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        try:
            return b"".join(iter(lambda: connection.recv(65_536), b""))
        except ConnectionResetError:
            return b""


def test_odd_http_never_breaks_the_service(service: Running, client: httpx.Client) -> None:
    head = b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for request in (
        head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", head + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", b"GET /v1/rank\r\n\r\n",  # as HTTP/0.9 had it
        head + b"Content-Length: -5\r\n\r\n", head + b"Content-Length: 10\r\n\r\n{}", head + b"X: " + b"y" * 70_000 + b"\r\nContent-Length: 2\r\n\r\n{}", b"\x00\x01\x02",
        b"TRACE /v1/rank HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", head + b"Content-Length: 2\r\n\r\n{}" + head + b"Content-Length: 2\r\n\r\n{}",
    ):  # fmt: skip
        first = raw_http(service, request).split(b"\r\n", 1)[0]
        assert not first or first.split(b" ")[1][:1] == b"4", first
    assert post(client, BODY).status_code == 200
    for method, path, status in (("GET", "/v1/rank", 405), ("GET", "/nope", 404), ("HEAD", "/v1/rank", 405), ("DELETE", "/v1/rank", 415)):
        assert client.request(method, path).status_code == status


CITY = sorted(ADS.query("city_id == 0").index)


@settings(max_examples=int(os.environ.get("EGA_PROPERTY_EXAMPLES", "40")), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bids=st.dictionaries(st.sampled_from(CITY), st.floats(1e-6, 1e5), max_size=12),
    candidates=st.none() | st.lists(st.sampled_from(CITY), min_size=1, unique=True),
    mode=st.sampled_from(["critical", "gsp", "vcg", "first_price"]),
    slots=st.integers(1, 8),
    raised=st.floats(1.001, 50.0),
    data=st.data(),
)
def test_the_laws_of_the_auction_over_http(client: httpx.Client, bids: dict[int, float], candidates: list[int] | None, mode: str, slots: int, raised: float, data: Any) -> None:
    """Within [reserve, bid], no ad twice, blind to the order of candidates, deterministic; a higher own bid never loses a slot, and under
    critical prices pays the same in the same slot and no less in a better one."""
    user = data.draw(st.sampled_from([user_of_arm(client, "control"), user_of_arm(client, "ega")]))

    def page(bids: dict[int, float], candidates: list[int] | None) -> dict[str, Any]:
        body: dict[str, Any] = BODY | {"user_id": user, "slots": slots, "price_mode": mode, "bids": [{"ad_id": ad, "bid": bid} for ad, bid in bids.items()]}
        if candidates is not None:
            body["candidates"] = candidates
        answer = post(client, body)
        assert answer.status_code == 200, answer.text
        check_page(answer.json(), bids)
        assert answer.json()["degraded"] == []
        return answer.json()

    first = page(bids, candidates)
    assert len(first["ads"]) <= slots and (candidates is None or {ad["ad_id"] for ad in first["ads"]} <= set(candidates))
    if first["arm"] != "ega":
        return  # explores: another request is another page
    assert page(bids, candidates and candidates[::-1])["ads"] == first["ads"]
    if not first["ads"]:
        return
    own = data.draw(st.sampled_from(first["ads"]))
    higher = page({**bids, own["ad_id"]: min(own["bid"] * raised, 1e6)}, candidates)
    again = next(ad for ad in higher["ads"] if ad["ad_id"] == own["ad_id"])
    assert again["slot"] <= own["slot"]
    if mode == "critical":
        # The bid of all requests together sets the unit of money; a bid that moves the median moves scores a little.
        same_unit = np.median([bids.get(ad, ADS.loc[ad, "bid"]) for ad in CITY]) == np.median([({**bids, own["ad_id"]: own["bid"] * raised}).get(ad, ADS.loc[ad, "bid"]) for ad in CITY])
        if same_unit and again["slot"] == own["slot"]:
            assert again["price"] == own["price"]


_USERS: dict[tuple[str, str], int] = {}


def user_of_arm(client: httpx.Client, arm: str) -> int:
    key = (str(client.base_url), arm)
    if key not in _USERS:
        _USERS[key] = user_of(client, arm)
    return _USERS[key]


def test_every_receipt_of_the_service_replays(client: httpx.Client, home: Path) -> None:
    post(client, BODY)
    receipts = read_receipts(home / "events" / "events.db")
    assert receipts and [receipt for receipt in receipts if difference(receipt) is not None] == []


def test_overload_is_refused_at_once_and_what_is_accepted_is_recorded(client: httpx.Client, home: Path) -> None:
    before = len(read_requests(home / "events" / "events.db"))
    codes: list[int] = []

    def burst() -> None:
        with httpx.Client(base_url=client.base_url, trust_env=False, timeout=20.0) as own:
            codes.extend(post(own, BODY).status_code for _ in range(6))

    threads = [threading.Thread(target=burst) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) <= {200, 429} and codes.count(200) > 0
    assert len(read_requests(home / "events" / "events.db")) - before == codes.count(200)


def test_metrics_probes_and_openapi(client: httpx.Client) -> None:
    post(client, BODY)
    metrics = client.get("/metrics").text
    for name in ("ega_pages_total", "ega_stage_seconds_bucket", "ega_refused_total", "ega_events_total", "ega_degraded_total"):
        assert f"\n{name}{{" in metrics
    assert "\nega_price_fallback_total{" not in metrics  # the alarm: no law was broken in all these tests
    assert client.get("/readyz").status_code == client.get("/livez").status_code == 200
    served = client.get("/docs.json").json()["paths"]
    assert {"/v1/rank", "/v1/events"} <= served.keys() and set(specification()["paths"]) <= served.keys()


SABOTAGE = """
import pathlib, auction.receipt as receipt
honest = receipt.truthful_price
def charge_the_bid(theta, ctr, slot, reserve, paced_bid):
    return paced_bid if pathlib.Path({flag!r}).exists() else honest(theta, ctr, slot, reserve, paced_bid)
receipt.truthful_price = charge_the_bid
"""


def test_a_broken_pricing_rule_is_caught_served_by_gsp_and_counted(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule charges the bid instead of the critical price, within every bound: only the check of the price itself can see it."""
    flag = tmp_path / "broken"
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE.format(flag=str(flag)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = ServingConfig(home=home, arms=(Arm(name="ega", policy="model"),), feature_deadline_ms=5000.0)
    with running_service(own, log=tmp_path / "log") as running, httpx.Client(base_url=running.url, trust_env=False, timeout=20.0) as asking:
        honest = post(asking, BODY).json()
        assert honest["price_mode"] == "critical" and honest["degraded"] == [] and "\nega_price_fallback_total{" not in asking.get("/metrics").text
        flag.touch()
        caught = post(asking, BODY).json()
        check_page(caught)
        assert caught["price_mode"] == "gsp" and caught["degraded"] == ["price_fallback_gsp"]
        assert [ad["ad_id"] for ad in caught["ads"]] == [ad["ad_id"] for ad in honest["ads"]]
        assert '\nega_price_fallback_total{invariant="price_not_truthful"} 1.0' in asking.get("/metrics").text
    flag.unlink()
    stored = [receipt for receipt in read_receipts(home / "events" / "events.db") if receipt["request_id"] == caught["request_id"]]
    assert len(stored) == len(caught["ads"]) and [difference(receipt) for receipt in stored] == [None] * len(stored)
    flag.touch()
    with pytest.raises(StartError, match="price_not_truthful"), running_service(own, log=tmp_path / "log"):
        pass  # a rule that is broken from the start never becomes ready


def test_the_checked_in_openapi_is_the_code() -> None:
    assert FILE.read_text() == rendered(), "run `python -m serving.openapi` and commit docs/openapi.json"


def test_service_facts_are_kept(client: httpx.Client, home: Path) -> None:
    page = post(client, BODY | {"user_id": 10**9 + 5}).json()
    facts = read_service_facts(home / "events" / "events.db").set_index("request_id").loc[page["request_id"]]
    assert facts["degraded"] == page["degraded"] and 0 < facts["latency_ms"] < 10_000


def test_a_locked_event_log_is_a_503_and_no_answer(client: httpx.Client, home: Path) -> None:
    import sqlite3

    blocker = sqlite3.connect(home / "events" / "events.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        answer = post(client, BODY)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "event_log_unavailable" and answer.headers["retry-after"] == "1"
    finally:
        blocker.rollback()
        blocker.close()
    assert post(client, BODY).status_code == 200


# -- start and stop ---------------------------------------------------------------------------------------------------


def test_a_ranking_process_killed_while_it_first_loads_is_replaced(home: Path, tmp_path: Path) -> None:
    own = copy_of_home(home, tmp_path)

    def kill_one() -> None:
        while True:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "serving.backend" in process.cmdline() and process.environ()[SETTINGS_VARIABLE].startswith(str(own)):
                        process.kill()
                        return
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    with running_service(ServingConfig(home=own, arms=ARMS[:1]), log=tmp_path / "log") as service, httpx.Client(base_url=service.url, trust_env=False) as client:
        assert post(client, BODY).status_code == 200
    assert not thread.is_alive() and "while it loaded" in (tmp_path / "log").read_text()


def test_a_home_without_features_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="build the features first"), running_service(ServingConfig(home=tmp_path / "h", arms=ARMS[:1]), log=tmp_path / "log"):
        pass


def test_a_port_in_use_is_named(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=str(port)), running_service(ServingConfig(home=home, arms=ARMS[:1]), port=port):
            pass


def test_a_killed_ranking_process_is_replaced_while_the_service_stays_up(service: Running, client: httpx.Client, home: Path) -> None:
    user = user_of(client, "ega")
    page = post(client, BODY | {"user_id": user, "request_id": 99_001}).json()
    family = psutil.Process(service.process.pid).children(recursive=True)
    ranking = next(process for process in family if "serving.backend" in process.cmdline())
    ranking.kill()
    deadline, seen = time.monotonic() + 60, []
    while True:
        assert client.get("/livez").status_code == 200 and time.monotonic() < deadline
        answer = post(client, BODY)
        seen.append(answer.status_code)
        if answer.status_code == 200:
            break
        assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (503, "1", "not_ready")
        time.sleep(0.1)
    assert 503 in seen and "ended with exit code -9; another one is started" in (home / "service.log").read_text()
    assert {process.pid for process in family if process.is_running() and process != ranking} == {process.pid for process in family} - {ranking.pid}
    assert post(client, BODY | {"user_id": user, "request_id": 99_001}).json() == page  # what was answered is on record


def test_sigterm_ends_the_service_cleanly(service: Running, client: httpx.Client, home: Path) -> None:
    """The last test of this module: it stops the service that the others used."""
    request_id = post(client, BODY).json()["request_id"]
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(20)
    with pytest.raises(OSError):  # noqa: PT011 - refused or reset
        http.client.HTTPConnection(*service.url.removeprefix("http://").split(":"), timeout=2).request("GET", "/livez")
    assert request_id in set(read_requests(home / "events" / "events.db")["request_id"])
