"""EGA (V2) from a bundle in the service gives the very pages of its replay: same inputs online and offline, same search, same prices."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from auction.receipt import charge
from features.build import build_features
from features.sampling import SamplingConfig, sample_requests
from features.store import UserFeatures, histories_as_of, load_catalogue_days, load_creatives, open_store, profiles_as_of
from marketplace.creatives import CreativeConfig
from marketplace.logs import read_table
from marketplace.organic import OrganicConfig
from marketplace.synthetic import SyntheticConfig
from marketplace.validation import validate_logs
from marketplace.worlds import WorldConfig, build_world
from model.bundle import load_bundle, write_bundle
from model.ega_v1.network import NetworkConfig
from model.ega_v2.config import SearchConfig, V2Config
from model.ega_v2.data import PageData
from model.ega_v2.engine import UnknownCreatives
from model.ega_v2.payment import RULES
from model.ega_v2.replay import generated
from model.ega_v2.stages import PretrainConfig, RewardConfig, RlafConfig, V2TrainingConfig
from model.kinds import STAGES
from model.training.data import Samples
from model.training.run import load_final, train_stage
from model.training.stages import TrainingConfig
from monitoring.experiment import _events_of, _rank_body, draw_users
from monitoring.retraining import merge_logs
from serving.assembly import load_cities
from serving.catalogue import CityAds, split_by_city
from serving.errors import Refusal
from serving.event_log import EventLog, export_logs
from serving.invariants import broken_invariant, broken_layout
from serving.messages import EventsRequest, RankRequest
from serving.policies import GeneratedPages, Organic, Query, load_model
from serving.ranking import Ranking
from serving.settings import Arm, ServingConfig
from serving.users import UserReader

KEY = b"k" * 32
SHORT = {"steps": 6, "batch": 16, "validate_every": 3, "validation_requests": 16}
MODEL = NetworkConfig(
    kind="ega_v2", width=16, heads=2, slots=3,
    ega_v2=V2Config(behaviours=8, encoder_blocks=1, decoder_blocks=1, reward_blocks=1, poi_codes=16, creative_codes=16, creative_width=6, organic_items=2, most_collisions=0.6, search=SearchConfig(beams=8)),
)  # fmt: skip


class Trained:
    """A tiny market with logs, feature store, samples and a trained model."""

    def __init__(self, folder: Path) -> None:
        world = WorldConfig(
            slots=3, synthetic=SyntheticConfig(users=150, places_per_city=200, ads_per_city=40, log_days=5, live_days=1),
            creatives=CreativeConfig(per_ad=3, width=6), organic=OrganicConfig(items=2),
        )  # fmt: skip
        self.logs, self.home = folder / "logs", folder / "home"
        self.world = build_world(world, 11)
        self.world.write_logs(self.logs)
        build_features(self.logs, self.home, behaviours=8)
        sample_requests(self.logs, self.home, folder / "samples", SamplingConfig(unexposed=5), seed=5)
        self.samples = Samples(folder / "samples")
        training = TrainingConfig(
            ega_v2=V2TrainingConfig(
                pretrain=PretrainConfig(**SHORT), reward=RewardConfig(**SHORT), evaluation=RewardConfig(**SHORT, seed=2),
                rlaf=RlafConfig(steps=2, batch=4, validate_every=2, validation_requests=2, requests=8, beams=4),
                payment=replace(V2TrainingConfig().payment, steps=2, batch=2, validate_every=2, validation_requests=2, requests=4, losers=1, misreports=(0.5, 1.0, 1.5)),
            ),
            threads=1,
        )  # fmt: skip
        for stage in STAGES["ega_v2"]:
            train_stage(stage, self.samples.folder, MODEL, training, folder / "stages", folder / "checkpoints", seed=3)
        network = load_final(self.samples, MODEL, folder / "stages", seed=3)
        self.bundle = folder / "bundle"
        write_bundle(self.bundle, network, self.samples.vocabulary_document, {"price_mode": "learned", "gates": []}, {}, KEY)
        self.policy = load_model(self.bundle, KEY, "learned", True, 8, 1)
        assert set(load_cities(self.home)) == set(np.unique(self.samples.city_code))
        days = load_catalogue_days(self.home)
        last = days[days["event_timestamp"].dt.date == np.datetime64(self.samples.info["days"][-1], "D").item()]
        self.cities = split_by_city(last.drop(columns="created"), load_creatives(self.home))  # as the service knew its ads on the last day of the logs
        for ads in self.cities.values():
            self.policy.prepare(ads)
        self.requests = read_table(self.logs, "requests").set_index("request_id")
        self.organic = read_table(self.logs, "organic").sort_values(["request_id", "rank"])

    def newest_day(self, count: int) -> np.ndarray:
        """Rows of samples on the catalogue's own day."""
        return np.flatnonzero(np.asarray(self.samples.day) == np.max(self.samples.day))[:count]

    def query(self, row: int) -> tuple[CityAds, Query]:
        """A logged request as the service would see it at its time."""
        request = self.requests.loc[int(self.samples.request_id[row])]
        user, when = np.array([request["user_id"]]), np.array([request["event_timestamp"].value // 1000])
        store = open_store(self.home)
        profiles, histories = profiles_as_of(store, user, when), histories_as_of(store, user, when, 8)
        ads = self.cities[int(request["city_id"])]
        items = self.organic[self.organic["request_id"] == request.name].to_dict("records")
        query = Query(
            int(request.name), int(user[0]), datetime.fromtimestamp(int(when[0]) / 1e6, UTC), int(request["utc_offset_minutes"]), float(request["latitude"]), float(request["longitude"]),
            UserFeatures(profiles, histories, histories.time_us[:, 0]), ads.bid, ads.reserve, ads.bid >= ads.reserve, 3, None, organic=Organic.of(items),
        )  # fmt: skip
        return ads, query


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("v2-pages"))


@pytest.mark.parametrize("rule", RULES)
def test_the_service_answers_with_the_pages_of_the_replay(trained: Trained, rule: str) -> None:
    rows = trained.newest_day(12)
    assert len(rows) == 12
    data = PageData(trained.samples, load_bundle(trained.bundle, KEY).network)
    expected = generated(data, rows)
    seen = 0
    for row in rows:
        ads, query = trained.query(int(row))
        page = trained.policy.rank(ads, replace(query, price_mode=rule))
        wanted = expected[expected["request_id"] == query.request_id].sort_values("slot")
        assert ads.ad_id[page.rows].tolist() == wanted["ad_id"].tolist()
        assert page.creative_id.tolist() == wanted["creative_id"].tolist() and page.above.tolist() == wanted["above"].tolist()
        np.testing.assert_allclose(page.pctr, wanted["pctr"], rtol=1e-5)
        np.testing.assert_allclose(page.price, wanted[f"price_{rule}"], rtol=1e-5)
        assert broken_invariant(page, query.bids, query.reserves, query.eligible, 3) is None and broken_layout(page, ads.ad_id, ads.owners, 2) is None
        for slot, (at, price, basis) in enumerate(zip(page.rows, page.price, page.basis, strict=True), start=1):
            again = charge(rule, slot, float(query.bids[at]), float(query.reserves[at]), None, None, basis["rank_ctr"], basis["next_score"], basis["network_price"], 0.0, probe_ctr=basis["probe_ctr"])
            assert again.price == price
        seen += len(page.rows)
    assert seen >= 30


def test_a_new_ad_is_shown_without_training(trained: Trained) -> None:
    """An ad, its place and its creatives that no training day has seen: codes from the frozen codebooks, and with the highest bid it is on pages at once."""
    rows = trained.newest_day(12)
    ads, _ = trained.query(int(rows[0]))
    frame, creatives = ads.frame, ads.creatives
    new = frame.iloc[[0]].assign(ad_id=10**9, poi_id=10**9, bid=50 * frame["bid"].max(), impressions=0, clicks=0)
    mine = creatives[creatives["ad_id"] == frame["ad_id"].iloc[0]]
    more = mine.assign(ad_id=10**9, creative_id=np.arange(10**9, 10**9 + len(mine)))
    wider = split_by_city(pd.concat([frame, new], ignore_index=True), pd.concat([creatives, more], ignore_index=True))[ads.city_id]
    assert wider.members != ads.members
    trained.policy.prepare(wider)
    shown = []
    for row in rows:
        _, query = trained.query(int(row))
        page = trained.policy.rank(wider, replace(query, bids=wider.bid, reserves=wider.reserve, eligible=np.ones(len(wider.bid), bool)))
        assert broken_layout(page, wider.ad_id, wider.owners, 2) is None
        shown += [creative for at, creative in zip(page.rows, page.creative_id, strict=True) if wider.ad_id[at] == 10**9]
    assert shown and set(shown) <= set(more["creative_id"])


def test_money_can_be_weighed_by_the_request(trained: Trained) -> None:
    """With alpha 0 bids do not enter the search; with a large one the pages bid more."""
    sums = {}
    for alpha in (0.0, 2.0):
        sums[alpha] = 0.0
        for row in trained.newest_day(12):
            ads, query = trained.query(int(row))
            page = trained.policy.rank(ads, replace(query, alpha=alpha, beta=0.1))
            sums[alpha] += float(ads.bid[page.rows].sum())
    assert sums[2.0] > sums[0.0]


def test_what_this_model_cannot_do_is_refused_by_name(trained: Trained) -> None:
    ads, query = trained.query(int(trained.newest_day(1)[0]))
    for change, field in (({"price_mode": "critical"}, "price_mode"), ({"price_mode": "vcg"}, "price_mode"), ({"organic": Organic.of([{"poi_id": k, "category_id": 1, "latitude": 0.0, "longitude": 0.0} for k in range(3)])}, "organic")):
        with pytest.raises(Refusal) as refused:
            trained.policy.rank(ads, replace(query, **change))
        assert refused.value.status == 422 and refused.value.field == field
    unproved = load_model(trained.bundle, KEY, "gsp", False, 8, 1)
    unproved.prepare(ads)
    with pytest.raises(Refusal, match="has not passed its gate"):
        unproved.rank(ads, replace(query, price_mode="learned"))
    assert unproved.rank(ads, query).price_mode == "gsp"
    with pytest.raises(RuntimeError, match="view ad_creatives"):
        unproved.prepare(replace(ads, creatives=None, members="other"))
    with pytest.raises(UnknownCreatives, match="1 of .* ads have no creative"):
        unproved.prepare(replace(ads, creatives=ads.creatives[ads.creatives["ad_id"] != ads.ad_id[0]], members="fewer"))
    with pytest.raises(ValueError, match="has no critical prices: set price_mode to implicit"):
        load_model(trained.bundle, KEY, "critical", False, 8, 1)
    with pytest.raises(ValueError, match="quality_floor must be 0"):
        load_model(trained.bundle, KEY, "gsp", False, 8, 1, quality_floor=0.1)


def test_what_users_do_with_generated_pages_is_training_input(trained: Trained, tmp_path: Path) -> None:
    """Live requests answered by the model, what the market's users do sent back, exported, joined to the logs, validated and sampled: places on the page,
    creatives opened and organic clicks arrive where the next training reads them."""
    config = ServingConfig(home=tmp_path / "service", arms=(Arm(name="none", policy="model"),), events_synchronous="normal")
    cities, policy = load_cities(trained.home), load_model(trained.bundle, KEY, "gsp", True, 8, 1)
    for ads in cities.values():
        policy.prepare(ads)
    ranking = Ranking(config, cities, {"model": policy}, UserReader(lambda user_id: None, 5.0), EventLog(config.event_log, "normal"))
    pages, sent = {}, []
    requests = draw_users(trained.world.live_requests(), 40, seed=1)
    for row in requests.itertuples():
        organic = trained.world.organic_items([row.request_id])
        page = pages[row.request_id] = ranking.rank(RankRequest.model_validate_json(json.dumps(_rank_body(row, organic))))
        shown, creatives, above = ([ad[name] for ad in page["ads"]] for name in ("ad_id", "creative_id", "above"))
        sent += _events_of(row, page, trained.world.respond(row, shown, creatives, above))
    answer = ranking.events(EventsRequest.model_validate_json(json.dumps({"events": sent})))
    assert answer.accepted == len(sent) and {event["type"] for event in sent} >= {"click", "creative_click", "organic_click"}
    ranking.close()

    live, merged, home = tmp_path / "live", tmp_path / "merged", tmp_path / "home"
    visits = trained.world.live_behaviours()
    export_logs(config.event_log, live, ads=trained.world.ad_table(), users=read_table(trained.logs, "users"), creatives=load_creatives(trained.home), behaviours=visits)
    merge_logs(trained.logs, live, merged)
    assert [failure for failure in validate_logs(merged, tmp_path / "validation").failures if failure.severity == "critical"] == []
    build_features(merged, home, behaviours=8)
    sample_requests(merged, home, tmp_path / "samples", SamplingConfig(unexposed=5), seed=5)
    samples = Samples(tmp_path / "samples")
    rows = np.flatnonzero(np.isin(samples.request_id, list(pages)))
    assert len(rows) == len(pages) and set(np.asarray(samples.day)[rows]) == {np.max(samples.day)}
    done = {(event["type"], event["request_id"], event.get("slot", event.get("rank"))) for event in sent}
    creative_id = np.asarray(samples.creative_id)
    for row in rows:
        request = int(samples.request_id[row])
        ads = pages[request]["ads"]
        assert np.asarray(samples.above)[row, : len(ads)].tolist() == [ad["above"] for ad in ads]
        assert creative_id[np.asarray(samples.exposed_creative)[row, : len(ads)]].tolist() == [ad["creative_id"] for ad in ads]
        for kind, name in (("click", "click"), ("creative_click", "creative_click"), ("organic_click", "organic_click")):
            found = np.flatnonzero(np.asarray(getattr(samples, name))[row, : len(ads) if kind != "organic_click" else None]) + 1
            assert set(found.tolist()) == {place for what, which, place in done if (what, which) == (kind, request)}


def test_an_unknown_user_and_a_page_without_organic_results_are_answered(trained: Trained) -> None:
    assert isinstance(trained.policy, GeneratedPages)
    ads, query = trained.query(int(trained.newest_day(1)[0]))
    page = trained.policy.rank(ads, replace(query, user=None, organic=Organic.of([])))
    assert len(page.rows) == 3 and page.above.tolist() == [0, 0, 0]
    assert np.isfinite(page.price).all()
    nobody = trained.policy.rank(ads, replace(query, eligible=np.zeros(len(ads.bid), bool)))
    assert len(nobody.rows) == 0
