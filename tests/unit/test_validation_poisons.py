"""Poisoned logs are stopped, each by the rule that names the poison.

Each poison alone goes through Great Expectations with the rule that must name it, on synthetic and on check-ins logs;
the fifteen kinds also go through `validate_logs` as a whole, five at a time here and one by one under `make soak`.
"""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

import numpy as np
import pytest
from poisons import POISONS, constant_everywhere
from validation_logs import checkins_logs, synthetic_logs

from marketplace.validation import Failure, ValidationConfig, failures_of, laws_of, validate_logs
from marketplace.validation_read import load_logs
from marketplace.validation_suites import run_suites

FIFTEEN = {
    "duplicate keys, impressions": "duplicate keys",
    "NaN bids, impressions": "NaN",
    "negative bids, impressions": "negative",
    "bids x100, impressions": "bid level",
    "payment above bid": "payment above the bid",
    "click without impression, lost page": "click without an impression",
    "future timestamps, impressions": "future timestamp",
    "unknown ads": "unknown ad",
    "unknown users, requests": "unknown user",
    "label flip 20 %, consistent": "label flip",
    "constant feature, category of ads": "constant feature",
    "slot gaps, middle": "slot gaps",
    "30 % duplicate rows, behaviours": "duplicate rows",
    "truncated file, half": "truncated",
    "missing column, one file": "column is missing",
}


THIRDS = (
    ("duplicate keys, impressions", "NaN bids, impressions", "negative bids, impressions", "payment above bid", "unknown users, requests"),
    ("bids x100, impressions", "click without impression, lost page", "unknown ads", "label flip 20 %, consistent", "slot gaps, middle"),
    ("future timestamps, impressions", "constant feature, category of ads", "30 % duplicate rows, behaviours", "missing column, one file", "truncated file, half"),
)
assert sorted(name for third in THIRDS for name in third) == sorted(FIFTEEN)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    return synthetic_logs(tmp_path_factory.mktemp("logs") / "synthetic", seed=11)


@pytest.fixture(scope="module")
def checkins(tmp_path_factory) -> Path:
    return checkins_logs(tmp_path_factory.mktemp("logs") / "checkins", seed=12)


def poisoned(clean: Path, name: str, tmp_path: Path, seed: int = 5) -> Path:
    logs = tmp_path / "logs"
    shutil.copytree(clean, logs)
    POISONS[name][0](logs, np.random.default_rng(seed))
    return logs


def named_failures(logs: Path, rule: str) -> list[Failure]:
    frames, laws, _ = laws_of(load_logs(logs), ValidationConfig(), dt.datetime.now(dt.UTC), None)
    return failures_of(run_suites(frames, [law for law in laws if law.rule == rule]), frames)


def assert_named(failures: list[Failure], name: str) -> None:
    """Some failure is of the rule that names the poison, is critical, and says rows, at most three examples and a remedy."""
    rule = POISONS[name][1]
    named = [failure for failure in failures if failure.rule == rule and FIFTEEN.get(name, "") in failure.message]
    assert named, (name, [failure.message for failure in failures])
    assert named[0].severity == "critical"
    assert named[0].message.startswith(f"[{rule}] ")
    assert "What to do: " in named[0].message
    assert named[0].rows > 0 or named[0].table == "statistics" or rule in ("no-missing-columns", "table-not-empty")
    assert len(named[0].examples) <= 3


@pytest.mark.parametrize("name", POISONS)
def test_every_poison_breaks_the_rule_that_names_it(name, synthetic, tmp_path):
    assert_named(named_failures(poisoned(synthetic, name, tmp_path), POISONS[name][1]), name)


@pytest.mark.parametrize("name", FIFTEEN)
def test_poisoned_check_ins_break_the_same_rules(name, checkins, tmp_path):
    assert_named(named_failures(poisoned(checkins, name, tmp_path), POISONS[name][1]), name)


@pytest.mark.parametrize("third", range(3))
def test_the_fifteen_kinds_stop_the_validation(third, synthetic, tmp_path):
    names = THIRDS[third]
    logs = tmp_path / "logs"
    shutil.copytree(synthetic, logs)
    for name in names:
        POISONS[name][0](logs, np.random.default_rng(3))
    result = validate_logs(logs, tmp_path / "out")
    assert not result.passed
    for name in names:
        assert_named(result.failures, name)


@pytest.mark.parametrize("column", ["ads.bid", "ads.poi_id", "users.gender", "behaviours.poi_id", "requests.user_id", "impressions.propensity"])
def test_a_constant_column_is_found_in_any_table(column, synthetic, tmp_path):
    table, name = column.split(".")
    logs = tmp_path / "logs"
    shutil.copytree(synthetic, logs)
    constant_everywhere(table, name)(logs, np.random.default_rng(0))
    assert named_failures(logs, "no-constant-features")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", POISONS)
@pytest.mark.parametrize("kind", ["synthetic", "checkins"])
def test_every_poison_fails_the_whole_validation(name, seed, kind, request, tmp_path):
    result = validate_logs(poisoned(request.getfixturevalue(kind), name, tmp_path, seed), tmp_path / "out")
    assert not result.passed
    assert_named(result.failures, name)
