"""The load generator: it does not wait for answers, counts from the scheduled time, and survives what a server does to it."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from benchmarks.load import Answer, closed_loop, open_loop, quantile, recovery_seconds

Reply = Callable[[int], Awaitable[bytes | None]]


def ok(turn: int) -> bytes:
    body = b'{"request_id": %d, "ads": [1, 2]}' % turn
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"


async def serving(reply: Reply, work: Callable[[str], Awaitable[list[Answer]]]) -> list[Answer]:
    """Drive a small HTTP server; `reply` gives each request's bytes, None breaks the connection."""
    turn = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal turn
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(2)
                turn += 1
                answer = await reply(turn)
                if answer is None:
                    break
                writer.write(answer)
                if b"connection: close" in answer:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        return await work(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()


def poisson(rate: float, seconds: float) -> Callable[[str], Awaitable[list[Answer]]]:
    return lambda url: open_loop(url, [b"{}"], rate, seconds, np.random.default_rng(0))


def test_every_status_is_counted_and_pages_are_read() -> None:
    async def reply(turn: int) -> bytes | None:
        return [ok(turn), REFUSED, None][turn % 3]

    answers = asyncio.run(serving(reply, poisson(200, 1.0)))
    counts = Counter(answer.status for answer in answers)
    assert counts.keys() == {200, 429, 0} and len(answers) > 150
    shown = [answer for answer in answers if answer.status == 200]
    assert all(answer.ads == 2 and answer.request_id for answer in shown) and len({answer.request_id for answer in shown}) == len(shown)


def test_a_stall_counts_for_all_who_were_scheduled_meanwhile() -> None:
    """A closed loop asks once during a stall, and one request tells of it; users do not wait for each other."""

    async def reply(turn: int) -> bytes | None:
        if turn == 1:
            await asyncio.sleep(1.0)
            stalled.set()
        await stalled.wait()
        return ok(turn)

    stalled = asyncio.Event()
    answers = asyncio.run(serving(reply, poisson(50, 1.0)))
    until = answers[0].scheduled + 1.0  # the stall ends later than this, however busy the machine is
    early = [answer for answer in answers if answer.scheduled < until - 0.5]
    assert len(early) > 10 and all(answer.ended > until for answer in early)
    stalled = asyncio.Event()
    closed = asyncio.run(serving(reply, lambda url: closed_loop(url, [b"{}"], 1.5, 1)))
    assert sum(answer.scheduled < closed[0].scheduled + 1.0 for answer in closed) == 1


def test_nobody_listening_is_a_broken_connection_not_an_error() -> None:
    answers = asyncio.run(open_loop("http://127.0.0.1:9", [b"{}"], 50, 0.2, np.random.default_rng(0)))
    assert answers and {answer.status for answer in answers} == {0} and math.isnan(quantile(answers, 0.5))


@pytest.mark.parametrize(
    ("bad", "expected"), [([], 0.0), ([0.1], 0.5), ([0.1, 1.2], 1.5), ([2.9], 3.0)],
)  # fmt: skip
def test_recovery_ends_after_the_last_window_with_a_refusal(bad: list[float], expected: float) -> None:
    answers = [Answer(at, at + 0.01, 200) for at in np.arange(0.0, 3.0, 0.05)] + [Answer(at, at + 0.01, 429) for at in bad]
    assert recovery_seconds(answers, usual_p99=0.05) == expected


def test_recovery_waits_for_slow_answers_too() -> None:
    answers = [Answer(at, at + (0.5 if at < 0.9 else 0.01), 200) for at in np.arange(0.0, 3.0, 0.05)]
    assert recovery_seconds(answers, usual_p99=0.05) == 1.0
