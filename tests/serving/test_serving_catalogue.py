"""Ads and bids that change while the service runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from serving_world import BODY, KEY, NOW, bootstrap_ranking, catalogue, tiny_bundle

from features.store import SOURCES, load_catalogue, source_path
from marketplace.logs import write_parquet
from serving.assembly import catalogue_feed
from serving.catalogue import split_by_city
from serving.errors import Refusal
from serving.messages import RankRequest
from serving.policies import Query, load_model
from serving.ranking import Ranking
from serving.settings import ServingConfig


def write(home: Path, frame: pd.DataFrame) -> None:
    """The source of the view `ad_catalog`, as the feature pipeline writes it."""
    table = pa.Table.from_pandas(frame.assign(created=frame["event_timestamp"]), schema=SOURCES["ad_catalog"], preserve_index=False)
    source_path(home, "ad_catalog").parent.mkdir(parents=True, exist_ok=True)
    write_parquet(source_path(home, "ad_catalog"), table)


def soon(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def shown(ranking: Ranking, **request: object) -> list[dict]:
    return ranking.rank(RankRequest(**{**BODY, "slots": 1, **request}))["ads"]


def test_new_ads_and_bids_are_shown_without_a_restart_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    frame = catalogue()
    write(tmp_path, frame)
    ranking = bootstrap_ranking(tmp_path, catalogue_seconds=0.05)
    feed = catalogue_feed(ranking._config, ranking)
    feed.start()
    try:
        new = frame.iloc[[0]].assign(ad_id=7777, bid=3.25)
        with pytest.raises(Refusal, match="7777 is not an active ad"):
            shown(ranking, candidates=[7777])
        write(tmp_path, pd.concat([frame, new], ignore_index=True))
        assert soon(lambda: 7777 in ranking._cities[0].ad_id)
        assert shown(ranking, candidates=[7777])[0]["bid"] == 3.25

        for damage in (b"", b"PAR1 no more"):
            source_path(tmp_path, "ad_catalog").write_bytes(damage)
            time.sleep(0.2)
            assert shown(ranking, candidates=[7777])
        write(tmp_path, frame.assign(bid=frame["bid"] * 2))
        assert soon(lambda: 7777 not in ranking._cities[0].ad_id)
        first = int(frame["ad_id"][0])
        assert shown(ranking, candidates=[first])[0]["bid"] == pytest.approx(2 * frame["bid"][0])
        write(tmp_path, frame.assign(bid=-1.0))
        time.sleep(0.2)
        assert shown(ranking, candidates=[first])[0]["bid"] == pytest.approx(2 * frame["bid"][0])
    finally:
        feed.close()
    assert len(load_catalogue(tmp_path)) == len(frame)


def test_requests_go_on_while_ads_come_and_go(tmp_path: Path) -> None:
    """Every answer is of one snapshot: its ads exist there, at that snapshot's bids."""
    ranking, frame = bootstrap_ranking(tmp_path), catalogue()
    snapshots = [frame.iloc[: 60 - 2 * drop].assign(bid=frame["bid"] + drop) for drop in range(8)]
    bids = {(int(ad), round(float(bid), 9)) for each in snapshots for ad, bid in zip(each["ad_id"], each["bid"], strict=True)}
    stop, seen, failed = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            answer = ranking.rank(RankRequest(**BODY))
            failed.extend(answer["degraded"])
            seen.extend((ad["ad_id"], round(ad["bid"], 9)) for ad in answer["ads"])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for each in snapshots:
        ranking.renew(split_by_city(each))
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert seen and not failed and set(seen) <= bids


def test_new_bids_do_not_recompute_a_models_states_and_the_snapshot_before_is_still_ranked(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    model = load_model(tmp_path / "bundle", KEY, "critical", False, 4, 1)
    frame = catalogue()
    before, dearer, fewer = (split_by_city(each)[0] for each in (frame, frame.assign(bid=2 * frame["bid"]), frame.iloc[:-2]))
    assert before.members == dearer.members != fewer.members and before.version != dearer.version

    def page(ads) -> np.ndarray:
        query = Query(1, 7, NOW, 0, 40.0, -74.0, None, ads.bid, ads.reserve, np.ones(len(ads.bid), bool), 3, None)
        return ads.ad_id[model.rank(ads, query).rows]

    model.prepare(before)
    kept = model._cities.of(0, before.members)
    first = page(before)
    model.prepare(dearer)
    assert model._cities.of(0, dearer.members) is kept
    np.testing.assert_array_equal(page(dearer), first)  # twice every bid is the same auction in another currency
    model.prepare(fewer)
    assert set(page(fewer)) <= set(fewer.ad_id)
    np.testing.assert_array_equal(page(before), first)


def test_the_dtype_of_the_settings_is_the_models(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    model = load_model(tmp_path / "bundle", KEY, "critical", False, 4, 1, dtype="bfloat16")
    assert model._engine.execution.dtype == "bfloat16"
    assert ServingConfig(home=tmp_path, dtype="float32").dtype == "float32"
    with pytest.raises(ValueError, match="dtype"):
        ServingConfig(home=tmp_path, dtype="float16")
