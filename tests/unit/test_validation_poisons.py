"""Poisoned logs are stopped, each by the rule that names the poison.

The fifteen kinds go through `validate_logs` as a whole. Their further shapes, on synthetic and on check-ins logs, go
through Great Expectations with the naming rule alone, which takes a tenth of the time; under `make soak` as a whole too.
"""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

import numpy as np
import pytest
from poisons import POISONS
from validation_logs import checkins_logs, synthetic_logs

from marketplace.validation import ValidationConfig, laws_of, validate_logs
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


@pytest.mark.parametrize("name", FIFTEEN)
def test_each_of_the_fifteen_kinds_stops_with_a_message_that_names_it(name, synthetic, tmp_path):
    result = validate_logs(poisoned(synthetic, name, tmp_path), tmp_path / "out")
    assert not result.passed
    named = [failure for failure in result.failures if failure.rule == POISONS[name][1]]
    assert named, [failure.rule for failure in result.failures]
    assert named[0].severity == "critical"
    assert FIFTEEN[name] in named[0].message
    assert "What to do: " in named[0].message
    assert named[0].rows > 0 or named[0].table == "statistics"
    assert len(named[0].examples) <= 3
    assert named[0].message.split("]")[0].strip("[") == named[0].rule


def named_rule_breaks(logs: Path, rule: str) -> bool:
    frames, laws, _ = laws_of(load_logs(logs), ValidationConfig(), dt.datetime.now(dt.UTC), None)
    return any(not verdict.kept for verdict in run_suites(frames, [law for law in laws if law.rule == rule]))


@pytest.mark.parametrize("name", sorted(set(POISONS) - set(FIFTEEN)))
def test_every_shape_of_poison_breaks_its_rule(name, synthetic, tmp_path):
    assert named_rule_breaks(poisoned(synthetic, name, tmp_path), POISONS[name][1])


@pytest.mark.parametrize("name", POISONS)
def test_poisoned_check_ins_break_the_same_rules(name, checkins, tmp_path):
    if name == "constant feature, age":
        pytest.skip("check-ins have no ages, all are 0")
    assert named_rule_breaks(poisoned(checkins, name, tmp_path), POISONS[name][1])


@pytest.mark.parametrize("column", ["ads.bid", "ads.poi_id", "users.gender", "behaviours.poi_id", "requests.user_id", "impressions.propensity"])
def test_a_constant_column_is_found_in_any_table(column, synthetic, tmp_path):
    from poisons import _constant_everywhere

    table, name = column.split(".")
    logs = tmp_path / "logs"
    shutil.copytree(synthetic, logs)
    _constant_everywhere(table, name)(logs, np.random.default_rng(0))
    assert named_rule_breaks(logs, "no-constant-features")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", POISONS)
def test_every_poison_fails_the_whole_validation(name, seed, synthetic, tmp_path):
    result = validate_logs(poisoned(synthetic, name, tmp_path, seed), tmp_path / "out")
    assert not result.passed
    assert POISONS[name][1] in [failure.rule for failure in result.failures]
