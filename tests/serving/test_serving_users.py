"""What replaces user features that do not come: the last known ones, the default user; and when the store is left alone."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.users import FAILED, LATE, SKIPPED, STALE, UNKNOWN, Breaker, UserReader


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Store:
    """A store that answers {1: "one", 2: "two"}, unless told otherwise."""

    def __init__(self) -> None:
        self.rows: dict[int, str] = {1: "one", 2: "two"}
        self.broken = False
        self.reads = 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, user: int) -> str | None:
        self.reads += 1
        self.gate.wait(5)
        if self.broken:
            raise ConnectionError("refused")
        return self.rows.get(user)


@pytest.fixture
def parts() -> tuple[Store, Clock, UserReader[str]]:
    store, clock = Store(), Clock()
    return store, clock, UserReader(store, 0.2, Breaker(3, 1.0, clock), cache_users=2, cache_seconds=60.0, clock=clock)


def test_known_and_unknown_users(parts: tuple[Store, Clock, UserReader[str]]) -> None:
    _, _, reader = parts
    assert reader(1) == ("one", None) and reader(9) == (None, UNKNOWN)


def test_a_failing_store_gives_the_last_known_features_until_they_are_too_old(parts: tuple[Store, Clock, UserReader[str]]) -> None:
    store, clock, reader = parts
    reader(1)
    store.broken = True
    assert reader(1) == ("one", STALE) and reader(9) == (None, FAILED)
    clock.now = 61.0
    assert reader(1)[0] is None


def test_an_emptied_store_is_noticed(parts: tuple[Store, Clock, UserReader[str]]) -> None:
    """Redis after FLUSHALL answers None for everybody without an error: a user read a minute ago has not ceased to exist."""
    store, _, reader = parts
    reader(1)
    store.rows.clear()
    assert reader(1) == ("one", STALE) and reader(2) == (None, UNKNOWN)


def test_only_the_users_seen_last_are_kept(parts: tuple[Store, Clock, UserReader[str]]) -> None:
    store, _, reader = parts
    store.rows[3] = "three"
    for user in (1, 2, 1, 3):
        reader(user)
    store.broken = True
    assert [reader(user)[0] for user in (1, 2, 3)] == ["one", None, "three"]


def test_the_circuit_opens_after_failures_in_a_row_tries_once_a_cool_down_and_closes(parts: tuple[Store, Clock, UserReader[str]]) -> None:
    store, clock, reader = parts
    store.broken = True
    assert [reader(9)[1] for _ in range(5)] == [FAILED] * 3 + [SKIPPED] * 2 and store.reads == 3
    clock.now = 1.1
    assert [reader(9)[1] for _ in range(3)] == [FAILED, SKIPPED, SKIPPED] and store.reads == 4  # half open: one trial
    store.broken = False
    assert reader(1)[1] == SKIPPED
    clock.now = 2.2
    assert reader(1) == ("one", None) and reader(2) == ("two", None)
    store.broken = True
    assert [reader(9)[1] for _ in range(4)] == [FAILED] * 3 + [SKIPPED]  # the count starts anew


def test_a_hung_read_holds_nobody_up_and_recovers(parts: tuple[Store, Clock, UserReader[str]]) -> None:
    store, clock, reader = parts
    store.gate.clear()
    assert reader(1) == (None, LATE)
    assert [reader(9)[1] for _ in range(50)] == [LATE] * 50 and store.reads == 1  # nobody queues behind it
    store.gate.set()
    while reader._stuck is not None and not reader._stuck.done():
        pass
    assert reader(1) == ("one", None)


@given(outcomes=st.lists(st.tuples(st.booleans(), st.floats(0.0, 3.0)), max_size=60), failures=st.integers(1, 5))
def test_the_breaker_never_calls_more_than_once_a_cool_down_while_open(outcomes: list[tuple[bool, float]], failures: int) -> None:
    clock = Clock()
    breaker = Breaker(failures, 1.0, clock)
    in_row, last_call = 0, -10.0
    for works, pause in outcomes:
        clock.now += pause
        open_before = in_row >= failures
        called = breaker.allows()
        assert called or open_before
        if called:
            assert not open_before or clock.now - last_call >= 1.0
            last_call = clock.now
            (breaker.succeeded if works else breaker.failed)()
            in_row = 0 if works else in_row + 1
