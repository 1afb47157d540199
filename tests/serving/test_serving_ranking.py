"""The way of a request, without HTTP: laws of a page, idempotency, refusals, degraded answers, arms, readers."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_world import BODY, NOW, bootstrap_ranking, catalogue, model_ranking

from auction.receipt import difference
from serving import users
from serving.assignment import assign_arm
from serving.catalogue import CityAds, split_by_city
from serving.errors import Refusal
from serving.event_log import EventLog, read_impressions, read_receipts, read_requests
from serving.invariants import PricedPage, broken_invariant, gsp_of_page
from serving.messages import EventsRequest, RankRequest
from serving.policies import Query
from serving.ranking import PAGE_FALLBACK, PRICE_FALLBACK, Ranking
from serving.settings import Arm, ServingConfig, SettingsError, load_settings, save_settings
from serving.users import UserReader


@pytest.fixture(scope="module")
def ranking(tmp_path_factory: pytest.TempPathFactory) -> Ranking:
    return bootstrap_ranking(tmp_path_factory.mktemp("home"), events_synchronous="normal")


def ask(**fields: object) -> RankRequest:
    return RankRequest.model_validate({**BODY, **fields})


CITY = catalogue().query("city_id == 0").set_index("ad_id")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Ranking:
    return model_ranking(tmp_path_factory.mktemp("model"))


MARKETS = {
    "bids": st.dictionaries(st.sampled_from(sorted(CITY.index)), st.floats(1e-300, 1e6) | st.sampled_from([5e-324, 1e6, 0.05, 0.049])),
    "exclude": st.sets(st.sampled_from(sorted(CITY.index)), max_size=25),
    "candidates": st.none() | st.sets(st.sampled_from(sorted(CITY.index)), min_size=1),
    "slots": st.integers(1, 50),
    "latitude": st.floats(-90, 90),
    "longitude": st.floats(-180, 180),
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**MARKETS)
def test_the_bootstrap_arm_keeps_the_laws(ranking: Ranking, **market: object) -> None:
    assert check_laws(ranking, **market)["degraded"] == []


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mode=st.sampled_from(["critical", "learned", "gsp", "vcg", "first_price"]), **MARKETS)
def test_the_model_arm_keeps_the_laws(model: Ranking, mode: str, **market: object) -> None:
    answer = check_laws(model, price_mode=mode, **market)
    assert answer["degraded"] == [users.UNKNOWN] and answer["price_mode"] == mode  # no fallback was needed


def check_laws(ranking: Ranking, bids, exclude, candidates, slots, latitude, longitude, **fields: object) -> dict:  # noqa: ANN001
    overrides = [{"ad_id": ad, "bid": bid} for ad, bid in bids.items()]
    asked = ask(bids=overrides, exclude=sorted(exclude), candidates=candidates and sorted(candidates), slots=slots, latitude=latitude, longitude=longitude, **fields)
    answer = ranking.rank(asked)
    shown = [ad["ad_id"] for ad in answer["ads"]]
    assert len(set(shown)) == len(shown) <= slots and not set(shown) & exclude and (candidates is None or set(shown) <= candidates)
    assert [ad["slot"] for ad in answer["ads"]] == list(range(1, len(shown) + 1))
    for ad in answer["ads"]:
        bid = bids.get(ad["ad_id"], CITY.loc[ad["ad_id"], "bid"])
        assert ad["bid"] == bid and CITY.loc[ad["ad_id"], "reserve"] <= ad["price"] <= bid
    return answer


def test_the_model_arm_is_deterministic_and_leaves_receipts(model: Ranking) -> None:
    first, second = model.rank(ask()), model.rank(ask())
    assert first["ads"] == second["ads"] and len(first["ads"]) == 5
    receipts = {receipt["slot"]: receipt for receipt in read_receipts(model._log.path) if receipt["request_id"] == first["request_id"]}
    for ad in first["ads"]:
        receipt = receipts[ad["slot"]]
        assert receipt["price"] == ad["price"] and receipt["critical_price"] == pytest.approx(ad["price"], abs=1.0001e-4) and len(receipt["theta"]) == len(receipt["affinity"]) == 5
        assert receipt["price"] == pytest.approx(round(receipt["price"], 4), abs=1e-12)  # whole currency steps


def test_every_receipt_replays_to_its_charge(model: Ranking, ranking: Ranking) -> None:
    """All pages that the tests above had, under every mode: the receipt alone, through JSON, gives the charge to the bit."""
    for mode in ("critical", "learned", "gsp", "vcg", "first_price"):
        model.rank(ask(price_mode=mode, candidates=[1000, 1002, 1004]))  # fewer ads than slots
    ranking.rank(ask())
    receipts = [receipt for source in (model, ranking) for receipt in read_receipts(source._log.path)]
    assert {receipt["mode"] for receipt in receipts} == {"critical", "learned", "gsp", "vcg", "first_price"} and len(receipts) > 20
    assert [difference(receipt) for receipt in receipts] == [None] * len(receipts)
    for receipt in receipts[-5:]:
        assert difference({**receipt, "price": receipt["price"] + 1e-4}) is not None


def test_features_move_the_page_of_a_known_user(tmp_path: Path) -> None:
    from features.encoding import Histories, Profiles
    from features.store import UserFeatures

    count = np.array([1])
    arrays = {"behaviour_id": 1, "poi_id": 110, "category_id": 2, "action": 1, "latitude": 40.0, "longitude": -74.0, "creative_id": 0, "time_us": 1_780_000_000_000_000}
    rows = {name: np.array([[value] + [0] * 15]) for name, value in arrays.items()}
    profile = Profiles(np.array([True]), np.array([3]), np.array([1]), np.array([40.0]), np.array([-74.0]))
    known = model_ranking(tmp_path, lambda user: UserFeatures(profile, Histories(count, **rows), rows["time_us"][:, 0]) if user == 7 else None)
    seen, unseen = known.rank(ask(user_id=7)), known.rank(ask(user_id=8))
    assert seen["degraded"] == [] and unseen["degraded"] == [users.UNKNOWN]
    assert [ad["pctr"] for ad in seen["ads"]] != [ad["pctr"] for ad in unseen["ads"]]


def test_a_repeated_request_is_one_page(ranking: Ranking) -> None:
    first = ranking.rank(ask(request_id=11, user_id=3))
    assert ranking.rank(ask(request_id=11, user_id=3)) == first
    assert (read_requests(ranking._log.path)["request_id"] == 11).sum() == 1
    with pytest.raises(Refusal) as refused:
        ranking.rank(ask(request_id=11, user_id=4))
    assert refused.value.status == 409


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"city_id": 99}, "unknown_city", "city_id"),
        ({"candidates": [1000, 1001]}, "unknown_ad", "candidates.1"),  # 1001 is in city 1
        ({"exclude": [5]}, "unknown_ad", "exclude.0"),
        ({"bids": [{"ad_id": 2**63 - 1, "bid": 1.0}]}, "unknown_ad", "bids.0"),
    ],
)
def test_unknown_ids_are_named(ranking: Ranking, fields: dict, code: str, field: str) -> None:
    with pytest.raises(Refusal) as refused:
        ranking.rank(ask(**fields))
    assert (refused.value.status, refused.value.code, refused.value.field) == (422, code, field)


def test_no_eligible_ad_is_an_empty_page_on_record(ranking: Ranking) -> None:
    answer = ranking.rank(ask(candidates=[1000], exclude=[1000]))
    assert answer["ads"] == [] and (read_requests(ranking._log.path)["request_id"] == answer["request_id"]).any()


def test_limits_of_the_settings(tmp_path: Path) -> None:
    small = bootstrap_ranking(tmp_path, max_candidates=2, max_events=1)
    with pytest.raises(Refusal, match="at most 2"):
        small.rank(ask(candidates=[1000, 1002, 1004]))
    with pytest.raises(Refusal, match="at most 1"):
        small.events(EventsRequest.model_validate({"events": [{"type": "click", "request_id": 1, "slot": 1}] * 2}))


# -- laws of a page ---------------------------------------------------------------------------------------------------


def page(**changes: object) -> PricedPage:
    good = {
        "rows": np.array([2, 0]), "pctr": np.array([0.2, 0.1]), "price": np.array([0.5, 0.3]), "critical_price": np.full(2, np.nan),
        "propensity": np.ones(2), "price_mode": "learned",
    }  # fmt: skip
    return PricedPage(**{**good, **{name: np.asarray(value) if isinstance(value, list) and name != "basis" else value for name, value in changes.items()}})


MARKET = {"bids": np.array([1.0, 1.0, 1.0]), "reserves": np.array([0.1, 0.1, 0.1]), "eligible": np.array([True, False, True]), "slots": 2}

BROKEN = [
    ({"rows": [2, 2]}, "repeated_ad"), ({"rows": [2, 3]}, "unknown_ad"), ({"rows": [2, -1]}, "unknown_ad"), ({"rows": [2, 1]}, "ineligible_ad"),
    ({"pctr": [0.2, float("nan")]}, "pctr"), ({"pctr": [1.2, 0.1]}, "pctr"), ({"price": [0.5, float("nan")]}, "price_not_finite"),
    ({"price": [float("inf"), 0.3]}, "price_not_finite"), ({"price": [-0.1, 0.3]}, "price_not_finite"), ({"price": [1.0000001, 0.3]}, "price_above_bid"),
    ({"price": [0.5, 0.09]}, "price_below_reserve"), ({"propensity": [0.0, 1.0]}, "propensity"), ({"price": [0.5]}, "length"),
    ({"price_mode": "critical", "basis": [{"theta": [0.5, 0.4], "slot_ctr": [0.2, 0.1], "currency_step": 0.0}] * 2}, "price_not_truthful"),
    ({"price_mode": "implicit", "price": [0.55, 0.7], "basis": [{"probe_ctr": [0.1, 0.1], "rank_ctr": 0.2, "currency_step": 0.0}] * 2}, "price_not_truthful"),
    ({"rows": [0, 2, 1], "pctr": [0.1] * 3, "price": [0.3] * 3, "critical_price": [0.3] * 3, "propensity": [1.0] * 3}, "length"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "law"), BROKEN)
def test_every_broken_law_is_named(changes: dict, law: str) -> None:
    assert broken_invariant(page(**changes), **MARKET) == law
    assert broken_invariant(page(), **MARKET) is None


def test_gsp_of_a_page_keeps_the_laws() -> None:
    replaced = gsp_of_page(page(price=[9.0, float("nan")]), MARKET["bids"], MARKET["reserves"], 0.0)
    assert broken_invariant(replaced, **MARKET) is None and replaced.price.tolist() == [0.5, 0.1] and replaced.price_mode == "gsp"


class Broken:
    """A policy whose pages are broken in a chosen way."""

    version, reads_user = "broken-1", False

    def __init__(self, changes: dict | None) -> None:
        self.changes = changes

    def prepare(self, ads: CityAds) -> None:
        pass

    def rank(self, ads: CityAds, query: Query) -> PricedPage:
        if self.changes is None:
            raise ZeroDivisionError
        if query.request_id == 0:  # the golden requests of the warm-up
            return page(price=ads.reserve[[2, 0]])
        return page(**{"price": ads.reserve[[2, 0]], **self.changes})


@pytest.mark.parametrize("changes", [None, {"rows": [2, 99]}, {"rows": [2, 29]}, {"price": [0.5, 0.01]}, *(c for c, law in BROKEN if law not in ("unknown_ad", "ineligible_ad", "price_below_reserve"))])
def test_a_broken_answer_never_leaves(tmp_path: Path, changes: dict | None) -> None:
    config = ServingConfig(home=tmp_path, arms=(Arm(name="a", policy="model"),))
    broken = Ranking(config, split_by_city(catalogue()), {"model": Broken(changes)}, UserReader(lambda _: None, 0.05), EventLog(config.event_log))
    if changes is None:
        with pytest.raises(ZeroDivisionError):  # not ready: the golden request fails
            broken.warm_up()
    else:
        broken.warm_up()
    last = int(CITY.index[29])  # row 29, which one of the broken pages shows all the same
    answer = broken.rank(ask(slots=2, exclude=[last], bids=[{"ad_id": 1000, "bid": 0.9}, {"ad_id": 1004, "bid": 0.9}]))
    assert answer["degraded"] in ([PAGE_FALLBACK], [PRICE_FALLBACK]) and answer["price_mode"] == "gsp"
    assert answer["model_version"] == ("bootstrap-1" if answer["degraded"] == [PAGE_FALLBACK] else "broken-1")
    assert answer["ads"] and all(0.05 <= ad["price"] <= ad["bid"] for ad in answer["ads"])
    assert len(read_impressions(config.event_log)) == len(answer["ads"])


# -- users, arms, settings --------------------------------------------------------------------------------------------


def test_features_late_failing_or_missing_degrade_in_time() -> None:
    slow = UserReader(lambda _: time.sleep(0.5), 0.02)
    reasons = [slow(1)[1] for _ in range(5)]  # the first hangs, the others do not even wait
    assert reasons == [users.LATE] * 5
    time.sleep(0.6)
    assert slow(1)[1] == users.LATE and slow(1)[1] == users.LATE  # probes again once the thread is free
    assert UserReader(lambda _: None, 20.0)(1) == (None, users.UNKNOWN)
    assert UserReader(lambda _: 1 / 0, 20.0)(1) == (None, users.FAILED)
    assert UserReader(lambda user: user + 1, 20.0)(1) == (2, None)


def test_arms_are_stable_and_as_large_as_asked() -> None:
    arms = (Arm(name="control", policy="bootstrap", share=1.0), Arm(name="ega", policy="model", share=3.0), Arm(name="idle", policy="model", share=0.0))
    names = [assign_arm(user, "salt", arms) for user in range(20_000)]
    assert names == [assign_arm(user, "salt", arms) for user in range(20_000)] and "idle" not in names
    assert abs(names.count("ega") / 20_000 - 0.75) < 0.01
    other = [assign_arm(user, "other", arms) for user in range(20_000)]
    both = sum(a == b == "control" for a, b in zip(names, other, strict=True)) / 20_000
    assert abs(both - 1 / 16) < 0.01  # a new salt draws anew
    assert assign_arm(17, "salt", arms) == "ega"  # frozen: a change here would move users between arms


def test_settings_round_trip_and_name_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServingConfig(home=tmp_path, arms=(Arm(name="a", policy="bootstrap"),), default_slots=3)
    assert load_settings(save_settings(config, tmp_path / "s.json")) == config
    (tmp_path / "bad.json").write_text('{"home": "x", "admision_limit": 3}')
    with pytest.raises(SettingsError, match="admision_limit"):
        load_settings(tmp_path / "bad.json")
    monkeypatch.delenv("EGA_SERVING", raising=False)
    with pytest.raises(SettingsError, match="EGA_SERVING is not set"):
        load_settings()
    for wrong in ({"arms": ()}, {"default_slots": 51}, {"feature_deadline_ms": float("nan")}, {"arms": (Arm(name="a", policy="model"),) * 2}):
        with pytest.raises(ValueError):  # noqa: PT011 - pydantic's own type
            ServingConfig(home=tmp_path, **wrong)  # type: ignore[arg-type]


def test_catalogue_refuses_what_cannot_be_priced() -> None:
    for change in ({"bid": float("nan")}, {"bid": 0.0}, {"reserve": -1.0}, {"ad_id": 1001}):
        frame = catalogue()
        frame.loc[0, list(change)] = list(change.values())
        with pytest.raises(ValueError, match="ad "):
            split_by_city(frame)


def test_request_times_are_kept(ranking: Ranking) -> None:
    by_default = ranking.rank(ask())["request_id"]
    given_time = ranking.rank(ask(timestamp=1_700_000_000.25))["request_id"]
    times = read_requests(ranking._log.path).set_index("request_id")["event_timestamp"]
    assert times[by_default].to_pydatetime() == NOW and times[given_time].timestamp() == 1_700_000_000.25
