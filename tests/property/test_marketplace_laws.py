"""Laws of the market: cascade, exploration, prices, logs within the schema, same seed same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from marketplace.bootstrap import BootstrapConfig, BootstrapPolicy, choose_with_exploration
from marketplace.click_model import ClickConfig, attraction, continuation, page_click_probability, reading_probability
from marketplace.keyed import keyed_uniform
from marketplace.logs import LogError, data_hash, read_table, verify_manifest
from marketplace.schema import TABLES
from marketplace.synthetic import SyntheticConfig
from marketplace.worlds import WorldConfig, build_world

UNIT = st.floats(0.0, 1.0)
LOGIT = st.floats(-30.0, 30.0)
CONFIG = WorldConfig(synthetic=SyntheticConfig(cities=2, users=60, ads_per_city=25, places_per_city=40, categories=5, history_days=6, log_days=4, live_days=1, part_time_ads=0.4))


@given(hnp.arrays(float, (3, 6), elements=UNIT), hnp.arrays(float, (3, 6), elements=UNIT))
def test_reading_never_rises_down_the_page_and_clicks_never_exceed_p(p, c) -> None:
    reach, q = reading_probability(c), page_click_probability(p, c)
    assert (reach[:, 0] == 1.0).all()
    assert (np.diff(reach, axis=1) <= 0).all()
    assert (q <= p).all()
    assert (q >= 0).all()
    assert (np.diff(page_click_probability(np.full_like(p, 0.3), c), axis=1) <= 0).all()


@given(hnp.arrays(float, 5, elements=UNIT), hnp.arrays(float, 5, elements=UNIT), st.integers(0, 3))
def test_what_stands_below_never_changes_what_stands_above(p, c, slot) -> None:
    swapped_p, swapped_c = p.copy(), c.copy()
    swapped_p[slot + 1 :], swapped_c[slot + 1 :] = p[: slot : -1], c[: slot : -1]
    np.testing.assert_array_equal(page_click_probability(p, c)[: slot + 1], page_click_probability(swapped_p, swapped_c)[: slot + 1])


@given(LOGIT, st.floats(0.0, 50.0), st.floats(0.01, 50.0), st.floats(-5.0, 5.0), st.floats(0.01, 3.0))
def test_p_rises_with_utility_and_falls_with_substitutes(utility, pressure, more, base, externality) -> None:
    config = ClickConfig(externality=externality)
    p = attraction(np.float64(utility), pressure, base, config)
    assert 0.0 <= p <= config.max_probability
    assert attraction(np.float64(utility), pressure + more, base, config) <= p
    assert attraction(np.float64(utility + 1.0), pressure, base, config) >= p
    assert attraction(np.float64(utility), pressure, base, ClickConfig(externality=0.0)) >= p


@given(LOGIT, LOGIT, st.floats(0.01, 5.0))
def test_continuation_stays_in_its_range_and_falls_with_satisfaction(satisfaction, taste, more) -> None:
    c = continuation(np.float64(satisfaction), taste, ClickConfig())
    assert 0.5 <= c <= 0.97
    assert continuation(np.float64(satisfaction + more), taste, ClickConfig()) <= c


@given(hnp.arrays(float, (4, 7), elements=st.floats(0.0, 10.0)), st.floats(0.0, 0.99), st.integers(1, 9))
def test_propensities_are_a_distribution_over_the_alternatives_of_each_slot(score, epsilon, slots) -> None:
    """Sweep the second draw over all alternatives: their propensities and the best one's sum to one in every slot."""
    ads = score.shape[1]
    for slot in range(min(slots, ads)):
        alternatives = {}
        for nth in range(ads - slot):
            for explores in (0.0, 0.999999):
                draws = np.full((4, slots, 2), 0.999999)  # above: no exploration
                draws[:, slot] = explores, (nth + 0.5) / (ads - slot)
                index, propensity, _ = choose_with_exploration(score, draws, epsilon)
                for row in range(4):
                    alternatives.setdefault(row, {})[int(index[row, slot])] = propensity[row, slot]
                    assert len(set(index[row])) == min(slots, ads)
        if epsilon > 0:
            for row in range(4):
                assert len(alternatives[row]) == ads - slot
                assert sum(alternatives[row].values()) == pytest.approx(1.0)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 8), st.floats(0.0, 0.9))
def test_prices_lie_between_reserve_and_bid_and_ads_appear_once(seed, ads, slots, exploration) -> None:
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, 50, ads)
    policy = BootstrapPolicy(rng.permutation(ads), rng.normal(31, 0.05, ads), rng.normal(121, 0.05, ads), shown, rng.binomial(shown, 0.2), BootstrapConfig(exploration, recall=20))
    bids, reserve = rng.lognormal(0, 1, ads), rng.uniform(0, 1.5, ads)
    page = policy.rank(31.0, 121.0, bids, rng.random(ads) < 0.8, slots, rng, reserve)
    assert len(set(page.rows.tolist())) == len(page.rows) <= slots
    assert (page.price <= bids[page.rows]).all()
    assert (page.price >= reserve[page.rows]).all()
    assert ((page.propensity > 0) & (page.propensity <= 1)).all()
    assert ((page.pctr > 0) & (page.pctr < 1)).all()


@given(st.integers(0, 2**40), st.integers(0, 2**62), st.integers(1, 8))
def test_keyed_draws_depend_on_their_key_only(seed, key, purpose) -> None:
    keys = np.array([key, key + 1, key])
    draws = keyed_uniform(seed, purpose, keys)
    assert ((draws >= 0) & (draws < 1)).all()
    assert draws[0] == draws[2] != draws[1]
    assert keyed_uniform(seed, purpose, keys[::-1])[0] == draws[0]
    assert keyed_uniform(seed + 1, purpose, keys)[0] != draws[0]
    assert keyed_uniform(seed, purpose + 1, keys)[0] != draws[0]


def test_keyed_draws_are_uniform_and_independent_across_purposes() -> None:
    draws = [keyed_uniform(7, purpose, np.arange(200_000)) for purpose in (1, 2)]
    assert np.histogram(draws[0], 20, (0, 1))[0] == pytest.approx(np.full(20, 10_000), rel=0.05)
    assert abs(np.corrcoef(draws)[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[0][1:], draws[0][:-1])[0, 1]) < 0.01


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_logs_keep_every_range_key_and_reference_of_the_schema(tmp_path: Path, seed: int) -> None:
    build_world(CONFIG, seed).write_logs(tmp_path / "logs")
    frames = {name: read_table(tmp_path / "logs", name) for name in TABLES}
    for name, table in TABLES.items():
        frame = frames[name]
        assert len(frame)
        assert not frame.duplicated(list(table.key)).any()
        for column in table.columns:
            values = frame[column.name]
            assert column.nullable or values.notna().all(), column.name
            if column.minimum is not None:
                assert (values > column.minimum if column.exclusive_minimum else values >= column.minimum).all(), column.name
            if column.maximum is not None:
                assert (values <= column.maximum).all(), column.name
    requests, impressions, ads, users, behaviours = (frames[name] for name in ("requests", "impressions", "ads", "users", "behaviours"))
    joined = impressions.merge(requests, on="request_id", suffixes=("", "_request"), validate="m:1")
    assert len(joined) == len(impressions)
    assert (joined["user_id"] == joined["user_id_request"]).all()
    assert set(requests["user_id"]) | set(behaviours["user_id"]) <= set(users["user_id"])
    joined["day"], ads["day"] = joined["event_timestamp"].dt.date, ads["event_timestamp"].dt.date
    bids = joined.merge(ads, on=["day", "ad_id"], suffixes=("", "_ad"), validate="m:1")
    assert len(bids) == len(joined)
    assert (bids["city_id"] == bids["city_id_ad"]).all()
    np.testing.assert_array_equal(bids["bid"], bids["bid_ad"])
    assert (bids["payment"] <= bids["bid"]).all()
    assert (bids["payment"] >= bids["reserve"]).all()
    assert (bids["bid"] >= bids["reserve"]).all()
    slots = impressions.groupby("request_id")["slot"].agg(["min", "max", "size"])
    assert ((slots["min"] == 1) & (slots["max"] == slots["size"])).all()
    assert not impressions.duplicated(["request_id", "ad_id"]).any()
    assert not ads[["ad_id", "poi_id"]].drop_duplicates()["ad_id"].duplicated().any()


def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_world(CONFIG, seed).write_logs(tmp_path / name)
    assert data_hash(tmp_path / "a") == data_hash(tmp_path / "b") != data_hash(tmp_path / "c")


def test_manifest_detects_any_flipped_byte(tmp_path: Path) -> None:
    build_world(CONFIG, 1).write_logs(tmp_path)
    rng, files = np.random.default_rng(0), sorted(tmp_path.glob("*/*/*.parquet"))
    for file in rng.choice(np.array(files, object), 12, replace=False):
        whole = file.read_bytes()
        at = int(rng.integers(len(whole)))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
        with pytest.raises(LogError, match=file.parent.name):
            verify_manifest(tmp_path)
        file.write_bytes(whole)
    verify_manifest(tmp_path)


def test_no_click_falls_outside_its_day(tmp_path: Path) -> None:
    build_world(CONFIG, 4).write_logs(tmp_path)
    impressions = read_table(tmp_path, "impressions").query("click == 1")
    assert (impressions["click_timestamp"].dt.floor("D") == impressions["event_timestamp"].dt.floor("D")).all()
    assert pd.api.types.is_datetime64_any_dtype(impressions["click_timestamp"])
