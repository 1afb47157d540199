"""What crosses between the HTTP worker and the ranking process; the process itself is tested over HTTP."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

import pytest

from serving import backend
from serving.backend import Backend, BackendError, BackendLost, _answer, _serve
from serving.errors import Refusal
from serving.messages import EventsRequest, EventsResponse, RankRequest

RANK = {"user_id": 7, "city_id": 0, "latitude": 40.1, "longitude": -74.0000000000001}


@pytest.mark.parametrize("more", [
    {}, {"timestamp": 1780315200.123456}, {"timestamp": "2026-06-01T12:00:00.000001+02:00"}, {"timestamp": None}, {"request_id": 2**53 - 1, "slots": 3},
    {"bids": [{"ad_id": 1, "bid": 5e-324}, {"ad_id": 2, "bid": 0.1}], "candidates": [2, 1], "exclude": []}, {"price_mode": "gsp", "alpha": 0.5},
    {"organic": [{"poi_id": 3, "category_id": 1, "latitude": 1e-9, "longitude": 0.0}]},
], ids=str)  # fmt: skip
def test_a_request_is_the_same_on_the_other_side(more: dict[str, Any]) -> None:
    request = RankRequest.model_validate_json(json.dumps(RANK | more))
    crossed = RankRequest.model_validate_json(request.model_dump_json(exclude_unset=True))
    assert crossed == request and crossed.model_dump_json() == request.model_dump_json()  # the latter is what identifies a repeated request


def test_answers_refusals_and_failures_have_a_status(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(body: bytes) -> Any:
        raise Refusal(422, "unknown_city", "no", "city_id")

    assert _answer(lambda body: {"said": body.decode()}, b"x") == b'200{"said": "x"}'
    assert _answer(refuse, b"").startswith(b'422{"error": {"code": "unknown_city"')
    assert _answer(lambda body: 1 / 0, b"").startswith(b'500{"error": {"code": "internal_error"') and "ZeroDivisionError" in caplog.text
    assert _answer(lambda body: float("nan"), b"").startswith(b"500")  # no JSON


class Process:
    """As far as a Backend knows one."""

    killed = False

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> int:
        return -9


def backend_of(monkeypatch: pytest.MonkeyPatch, patience: int = 1) -> tuple[Backend, list[Connection]]:
    """A Backend and the other ends of its connections, without a process between them."""
    there: list[Connection] = []

    def popen(command: list[str], pass_fds: list[int], **_: Any) -> Process:
        there.extend(Connection(os.dup(number)) for number in pass_fds)
        return Process()

    monkeypatch.setattr(backend, "_PATIENCE_SECONDS", patience)
    monkeypatch.setattr(backend, "_SEND_SECONDS", patience)
    monkeypatch.setattr(backend.subprocess, "Popen", popen)
    return Backend(), there


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_who_gets_no_answer_gets_503_and_nobody_gets_it_later(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, there = backend_of(monkeypatch)
    assert ours.call("rank", b"x" * size)[0] == 503 and ours._process.killed  # type: ignore[attr-defined]
    for side in there[1:]:
        with suppress(OSError):
            side.send_bytes(b"200the page of the first")
    assert [ours.call("rank", b"y")[0] for _ in range(3)] == [503] * 3


def test_a_change_of_models_before_it_is_ready_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, there = backend_of(monkeypatch)
    for said in (b"changing", b"changed", b"ready"):
        there[0].send_bytes(said)
    ours.wait_ready()


def test_what_is_missing_is_said_and_who_dies_while_loading_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, there = backend_of(monkeypatch)
    there[0].send_bytes(b"failed:no approved model")
    with pytest.raises(BackendError, match="^no approved model$"):
        ours.wait_ready()
    ours, there = backend_of(monkeypatch)
    there[0].close()
    with pytest.raises(BackendLost, match="exit code -9"):
        ours.wait_ready()


def test_a_connection_is_served_until_it_is_closed() -> None:
    class Ranking:
        def rank(self, request: RankRequest) -> dict[str, Any]:
            return {"user": request.user_id}

        def events(self, request: EventsRequest) -> EventsResponse:
            return EventsResponse(accepted=len(request.events), duplicates=0, rejected=[])

    here, there = Pipe()
    thread = threading.Thread(target=_serve, args=(there, Ranking()))
    thread.start()
    for path, body, answer in (("rank", RANK, {"user": 7}), ("events", {"events": [{"type": "click", "request_id": 1, "slot": 1, "ad_id": 1}]}, {"accepted": 1, "duplicates": 0, "rejected": []})):
        here.send_bytes(path.encode() + b"\n" + json.dumps(body, indent=1).encode())
        said = here.recv_bytes()
        assert said[:3] == b"200" and json.loads(said[3:]) == answer
    here.close()
    thread.join(10)
    assert not thread.is_alive()
