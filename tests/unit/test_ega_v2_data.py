"""EGA (V2) on real samples: codes, logged pages and offers say what the logs say; the stages run and resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from auction.implicit import draws, implicit_price, probe_bids
from features.build import build_features
from features.sampling import SamplingConfig, sample_requests
from marketplace import schema
from marketplace.creatives import CreativeConfig
from marketplace.organic import OrganicConfig
from marketplace.synthetic import SyntheticConfig
from marketplace.worlds import WorldConfig, build_world
from model.ega_v1.network import NetworkConfig
from model.ega_v2.allocation import allocate, page_values
from model.ega_v2.beam import Offers, Pages, search
from model.ega_v2.config import SearchConfig, V2Config
from model.ega_v2.data import PageData, places_of_page
from model.ega_v2.model import AUDIENCE_WIDTH, audiences
from model.ega_v2.payment import RULES, Audit, PaymentConfig, Shown, audit, identity_prices, outcomes, prices, probed, psi_of, regret_of, shown_pages
from model.ega_v2.replay import city_scores, read_logged, read_pages, replay_v2
from model.ega_v2.stages import PretrainConfig, RewardConfig, RlafConfig, V2TrainingConfig, marginal_rewards
from model.ega_v2.tokenizer import TokenizerError
from model.ega_v2.training import audited
from model.evaluation.replay import EvaluationConfig, Incumbent
from model.kinds import STAGES
from model.training.data import Samples
from model.training.run import load_stage, train_stage
from model.training.stages import TrainingConfig

SHORT = {"steps": 3, "batch": 16, "validate_every": 2, "validation_requests": 24}
TRAINING = TrainingConfig(
    ega_v2=V2TrainingConfig(
        pretrain=PretrainConfig(**SHORT), reward=RewardConfig(**SHORT), evaluation=RewardConfig(**SHORT, seed=2),
        rlaf=RlafConfig(**(SHORT | {"batch": 4, "validation_requests": 4}), requests=12, beams=4), payment=PaymentConfig(**(SHORT | {"batch": 4}), requests=6, losers=1, misreports=(0.5, 1.0, 1.5)),
    ),
    threads=1,
)  # fmt: skip
MODEL = NetworkConfig(
    kind="ega_v2", width=16, heads=2, slots=3, ega_v2=V2Config(behaviours=8, encoder_blocks=1, decoder_blocks=1, reward_blocks=1, poi_codes=16, creative_codes=16, creative_width=6, organic_items=2, most_collisions=0.6, search=SearchConfig(beams=4))
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Samples:
    folder = tmp_path_factory.mktemp("v2")
    world = WorldConfig(
        slots=3, synthetic=SyntheticConfig(users=120, places_per_city=200, ads_per_city=40, log_days=5, live_days=1),
        creatives=CreativeConfig(per_ad=3, width=6), organic=OrganicConfig(items=2),
    )  # fmt: skip
    build_world(world, 5).write_logs(folder / "logs")
    build_features(folder / "logs", folder / "home", behaviours=8)
    sample_requests(folder / "logs", folder / "home", folder / "samples", SamplingConfig(unexposed=5), seed=5)
    return Samples(folder / "samples")


@pytest.fixture(scope="module")
def stages(samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    for stage in STAGES["ega_v2"]:
        train_stage(stage, samples.folder, MODEL, TRAINING, folder / "stages", folder / "checkpoints", seed=3)
    return folder / "stages"


@pytest.fixture(scope="module")
def data(samples, stages) -> PageData:
    return PageData(samples, load_stage("payment", samples, MODEL, stages, 3))


def test_stages_are_found_done_and_change_only_what_they_train(samples, stages) -> None:
    again = train_stage("payment", samples.folder, MODEL, TRAINING, stages, stages.parent / "checkpoints", seed=3)
    assert again.result["steps"] >= 1
    before, after = (load_stage(stage, samples, MODEL, stages, 3).state_dict() for stage in ("evaluation", "rlaf"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= {"core.poi_policy.weight", "core.creative_policy.weight"}
    tokens, trained = (load_stage(stage, samples, MODEL, stages, 3).state_dict() for stage in ("tokenize", "evaluation"))
    assert all(torch.equal(tokens[name], trained[name]) for name in ("poi_books", "creative_books", "known_codes", "origin"))


def test_an_unhealthy_tokenizer_stops_the_stage(samples, tmp_path) -> None:
    strict = replace(MODEL, ega_v2=replace(MODEL.ega_v2, poi_codes=2, most_collisions=0.05))
    with pytest.raises(TokenizerError, match="tokenizer of pois .* share their tuple"):
        train_stage("tokenize", samples.folder, strict, TRAINING, tmp_path / "stages", tmp_path / "checkpoints", seed=3)


def test_a_new_place_gets_codes_without_training(data) -> None:
    model = data.model
    known = np.asarray(data.samples.place_category)[:3], np.asarray(data.samples.place_position)[:3]
    codes = model.poi_tokens(np.full(3, schema.UNKNOWN), known[0], known[1] + 1e-3)
    assert codes.shape == (3, 3) and (codes >= 0).all() and (codes < 16).all()
    alone = model.poi_tokens(np.full(1, schema.UNKNOWN), known[0][1:2], known[1][1:2] + 1e-3)
    np.testing.assert_array_equal(alone[0], codes[1])


def test_histories_end_with_the_newest_behaviour(data) -> None:
    rows = data.samples.split_rows(schema.TRAIN)[:40]
    history = data.history(rows)
    place = np.asarray(data.samples.behaviour_place[rows])
    assert torch.equal(history.poi[:, -1][place[:, 0] >= 0], data.place_codes[place[place[:, 0] >= 0, 0]])
    assert bool((history.poi[torch.from_numpy(place[:, ::-1].copy()) < 0] == -1).all())
    assert bool(((history.fields == 0).all(-1) == (history.poi < 0).any(-1)).all())


def test_logged_pages_are_read_in_the_order_of_the_page(data) -> None:
    samples = data.samples
    rows = samples.split_rows(schema.TRAIN)[:60]
    page = data.logged_pages(rows)
    for at, row in enumerate(rows):
        ads = [ad for ad in samples.candidate[row, :3] if ad >= 0]
        items = [item for item in samples.organic_place[row] if item >= 0]
        expected, ad, item = [], 0, 0
        while ad < len(ads) or item < len(items):
            if ad < len(ads) and samples.above[row, ad] <= item:
                expected.append((samples.ad_place_row[ads[ad]], samples.click[row, ad], ads[ad]))
                ad += 1
            else:
                expected.append((items[item], samples.organic_click[row, item], -1))
                item += 1
        assert int(page.mask[at].sum()) == len(expected)
        for place, (poi, click, ad_row) in enumerate(expected):
            assert torch.equal(page.items.poi[at, place], data.place_codes[int(poi)]) and float(page.click[at, place]) == click
            assert int(page.ad_row[at, place]) == ad_row and bool(page.items.organic[at, place]) == (ad_row < 0)


def test_the_past_of_an_ad_ends_the_day_before(data) -> None:
    """Counted anew from the logged pages. A click after midnight on a page shown before belongs to the new day: there the catalogue may know less."""
    samples = data.samples
    active = np.isfinite(np.asarray(samples.bid))
    for day in range(len(active)):
        before = np.asarray(samples.day) < day
        candidate, click = np.asarray(samples.candidate[before, :3]), np.asarray(samples.click[before, :3])
        real = candidate >= 0
        shown, clicks = (np.bincount(candidate[real], weight, minlength=active.shape[1])[active[day]] for weight in (np.ones(real.sum()), click[real]))
        np.testing.assert_array_equal(np.asarray(samples.ad_impressions)[day, active[day]], shown)
        missing = clicks - np.asarray(samples.ad_clicks)[day, active[day]]
        assert (missing >= 0).all() and missing.sum() <= 1


@torch.inference_mode()
def test_pages_hold_active_ads_with_their_own_creatives_and_all_organic_items(data) -> None:
    rows = data.samples.split_rows(schema.TEST)[:12]
    seen = 0
    for mine, history, catalogue, offers, features in data.groups(rows, 3):
        found = data.city_offers(int(data.samples.day[mine[0]]), int(data.samples.city_code[mine[0]]))
        page = allocate(data.model.core, history, catalogue, offers, features, 5, SearchConfig(beams=4))
        seen += len(mine)
        assert bool(((page.ad >= 0).sum(1) == 3).all())
        assert page.organic[page.organic >= 0].view(len(mine), -1).tolist() == [[0, 1]] * len(mine)
        shown = page.ad >= 0
        assert np.array_equal(found.creative_owner[page.creative[shown].numpy()], page.ad[shown].numpy())
        assert bool(torch.gather(offers.active, 1, page.ad.clamp(min=0))[shown].all())
    assert seen == len(rows)


@torch.inference_mode()
def test_trial_bids_regenerate_the_page_and_every_rule_charges_within_bid_and_reserve(data) -> None:
    rows = data.samples.split_rows(schema.TEST)[:3]
    found = audited(data, rows, (0.0, 1.0, 3.0), losers=1, judge=data.model.evaluation)
    shown = found.place >= 0
    assert found.trial_place.shape == (3, 4, 3) and bool(shown[:, :3].all()) and not bool(shown[:, 3].any())
    assert bool((found.ad[:, 3] >= 0).any())  # some other proposed page holds another ad
    # The truthful bid among the trials gives the truthful page again.
    torch.testing.assert_close(found.trial.bid[:, :, 1], found.truth.bid.unsqueeze(1).expand(-1, 4, -1))
    torch.testing.assert_close(found.trial.judged[:, :, 1], found.truth.judged.unsqueeze(1).expand(-1, 4, -1))
    assert not torch.equal(found.truth.judged, found.truth.ctr)
    assert torch.equal(found.trial_place[:, :, 1], found.place)
    assert bool((found.trial_place[:, :, 0] == -1).all())  # below the reserve
    core = data.model.core
    for rule in RULES:
        for pages in (found.truth, found.trial) if rule != "implicit" else ():
            price = prices(core, pages, rule)
            assert bool((price <= pages.bid + 1e-6).all()) and bool((price >= torch.minimum(pages.reserve, pages.bid) - 1e-6).all())
        paid, utility, gained = outcomes(core, found, rule)
        assert bool((paid >= 0).all()) and bool((utility >= -1e-6).all()) and bool((regret_of(utility, gained) >= 0).all())
        assert float(paid[:, 3].abs().max()) == float(utility[:, 3].abs().max()) == 0.0
        assert np.isfinite(psi_of(core, found, rule)["psi"]) or rule == "first_price"
    assert float(outcomes(core, found, "first_price")[1].abs().max()) < 1e-6


def test_gsp_and_regret_by_hand() -> None:
    """Places: ad, organic item, ad, empty. In the first place the second ad would be clicked as often as the first: 1 * .5 = .5 below it."""
    bid, ctr = torch.tensor([[4.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.25, 0.0]])
    state, none = torch.zeros(1, 4, 2), torch.zeros(1, 4)
    page = Shown(state, bid, ctr, ctr, ctr, torch.tensor([[0.1, 0.0, 0.2, 0.0]]), torch.tensor([[0.5, 0.0, 0.01, 0.0]]), none)
    assert prices(None, page, "gsp").tolist() == [[1.0, 0.0, pytest.approx(0.2), 0.0]]
    # Ad 1 lies and stands third at a third of the price: utility (4 - 0.2) * 0.25 = 0.95 against (4 - 1) * 0.5 = 1.5: no regret. Ad 2 lies to the top.
    low = Shown(state, torch.tensor([[0.5, 0.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.0, 0.0, 0.0]]), ctr, ctr, torch.tensor([[0.2, 0.0, 0.0, 0.0]]), none, none)
    high = Shown(state, torch.tensor([[8.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.0, 0.0]]), ctr, ctr, torch.tensor([[0.2, 0.0, 0.0, 0.0]]), none, none)
    trial = Shown(*(torch.stack([a, b], 1).unsqueeze(2) for a, b in zip(vars(low).values(), vars(high).values(), strict=True)))
    found = Audit(page, torch.tensor([[7, 9]]), torch.tensor([[0, 2]]), torch.tensor([[4.0, 1.0]]), torch.tensor([[[0.5], [8.0]]]), trial, torch.tensor([[[0], [0]]]))
    paid, utility, gained = outcomes(None, found, "gsp")
    regret = regret_of(utility, gained)
    assert paid.tolist() == [[0.5, pytest.approx(0.05)]] and utility.tolist() == [[1.5, pytest.approx(0.2)]]
    assert regret.tolist() == [[0.0, pytest.approx((1.0 - 0.2) * 0.5 - 0.2)]]


def test_myersons_price_of_regenerated_pages_by_hand() -> None:
    """One ad worth 2: no clicks at half its bid, .1 at its bid, .3 at twice. Area under x up to 2: .1 * (2 - 1) / 2; p = 2 - .05 / .1 = 1.5; at 4: .05 + .2 * 2 = .45, p = 4 - 1.5."""
    shape = (1, 1, 3, 1)
    ctr = torch.tensor([0.0, 0.1, 0.3]).view(shape)
    trial = Shown(torch.zeros(*shape, 2), torch.tensor([1.0, 2.0, 4.0]).view(shape), ctr, ctr, ctr, torch.full(shape, 0.5), torch.zeros(shape), torch.zeros(shape))
    truth = Shown(*(values[:, 0, 1] for values in vars(trial).values()))
    found = Audit(truth, torch.tensor([[3]]), torch.tensor([[0]]), torch.tensor([[2.0]]), torch.tensor([[[1.0, 2.0, 4.0]]]), trial, torch.tensor([[[-1, 0, 0]]]))
    price, clicks = identity_prices(found)
    assert clicks.flatten().tolist() == pytest.approx([0.0, 0.1, 0.3])
    assert price.flatten()[1:].tolist() == pytest.approx([1.5, 2.5])
    # At these prices no bid of the three gains over the truth: 2 -> (2 - 1.5) * .1 = .05, 4 -> (2 - 2.5) * .3 < 0.
    gained = (2.0 - price) * clicks
    assert gained.argmax() == 1
    # The expected implicit price is this one.
    paid, utility, tried = outcomes(None, found, "implicit")
    assert float(paid) == pytest.approx(1.5 * 0.1) and float(utility) == pytest.approx(0.05) and torch.equal(tried[0, 0], gained[0, 0] * (found.trial_place[0, 0] >= 0))
    with pytest.raises(ValueError, match="see probed"):
        prices(None, truth, "implicit")


@torch.inference_mode()
def test_pivots_are_what_the_others_lose(data) -> None:
    """Against a loop over proposed pages and ads."""
    samples, network, config = data.samples, data.model.core, SearchConfig(beams=6)
    mine, history, catalogue, offers, features = next(iter(data.groups(samples.split_rows(schema.TEST)[:1], 3)))
    found = data.city_offers(int(samples.day[mine[0]]), int(samples.city_code[mine[0]]))
    memory = network.encode(history)
    shown, page, proposed = shown_pages(network, memory, catalogue, offers, features, torch.from_numpy(found.city.reserve), config)
    _, worth = page_values(network, memory, proposed, offers, features)
    real = [r for r in range(config.beams) if np.isfinite(float(proposed.score[0, r]))]
    best = next(r for r in real if torch.equal(proposed.ad[0, r], page.ad[0, 0]) and torch.equal(proposed.creative[0, r], page.creative[0, 0]))
    for place, ad in enumerate(page.ad[0, 0].tolist()):
        if ad < 0:
            assert float(shown.pivot[0, place]) == 0
            continue
        others = {r: float(worth[0, r][proposed.ad[0, r] != ad].sum()) for r in real}
        lost = max(others.values()) - others[best]
        expected = min(lost / float(shown.ctr[0, place]), float(shown.bid[0, place]))
        assert float(shown.pivot[0, place]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@torch.inference_mode()
def test_the_rival_of_a_place_is_read_in_that_place(data) -> None:
    """Against pages written out one by one: the ad below changes places with this one; the last ad gives way to any ad of another proposed page."""
    network, samples, config = data.model.core, data.samples, SearchConfig(beams=6)
    mine, history, catalogue, offers, features = next(iter(data.groups(samples.split_rows(schema.TEST)[:1], 3)))
    found = data.city_offers(int(samples.day[mine[0]]), int(samples.city_code[mine[0]]))
    memory = network.encode(history)
    shown, page, proposed = shown_pages(network, memory, catalogue, offers, features, torch.from_numpy(found.city.reserve), config)
    names = [name for name in vars(page) if name != "score"]

    def worth(changes: dict[int, tuple[Pages, int, int]]) -> torch.Tensor:
        new = {name: getattr(page, name).clone() for name in names}
        for place, (source, beam, at) in changes.items():
            for name in names:
                new[name][0, 0, place] = getattr(source, name)[0, beam, at]
        return page_values(network, memory, Pages(page.score, **new), offers, features)[1][0, 0]

    places = torch.nonzero(page.ad[0, 0] >= 0).squeeze(1).tolist()
    assert len(places) == 3
    for upper, lower in zip(places, places[1:], strict=False):
        swapped = worth({upper: (page, 0, lower), lower: (page, 0, upper)})
        assert float(shown.rival[0, upper]) == pytest.approx(float(swapped[upper]), rel=1e-5)
    on_page, best = set(page.ad[0, 0].tolist()), 0.0
    for ad in set(proposed.ad[0].flatten().tolist()) - on_page - {-1}:
        beam, at = next((b, k) for b in range(config.beams) for k in range(network.config.slots) if int(proposed.ad[0, b, k]) == ad)
        best = max(best, float(worth({places[-1]: (proposed, beam, at)})[places[-1]]))
    assert best > 0 and float(shown.rival[0, places[-1]]) == pytest.approx(best, rel=1e-5)
    assert bool((shown.rival[0][page.ad[0, 0] < 0] == 0).all())


@torch.inference_mode()
def test_what_is_charged_is_what_the_gate_measures(data) -> None:
    """`probed` is a loop of whole pages, bid by bid; the mean of many implicit prices comes near the expected price that regret is measured with."""
    network, samples, config = data.model.core, data.samples, SearchConfig(beams=4, alpha=2.0, beta=0.02)
    mine, history, catalogue, offers, features = next(iter(data.groups(samples.split_rows(schema.TEST)[:1], 3)))
    reserve = torch.from_numpy(data.city_offers(int(samples.day[mine[0]]), int(samples.city_code[mine[0]])).city.reserve)
    memory = network.encode(history)
    shown, page, _ = shown_pages(network, memory, catalogue, offers, features, reserve, config)
    at = torch.nonzero(page.ad[0, 0] >= 0).squeeze(1)
    ad, drawn = page.ad[0, 0][at], np.stack([draws(11, int(one), 8) for one in page.ad[0, 0][at]])
    bid, floor, ctr = (values[0, at].double().numpy() for values in (shown.bid, shown.reserve, shown.ctr))
    less = torch.from_numpy(probe_bids(bid, floor, drawn))
    found = probed(network, memory, catalogue, offers, features, reserve, config, ad, less)
    assert found.shape == (3, 8) and float(found.std()) > 0
    for k in range(len(ad)):
        for s in range(less.shape[1]):
            changed = replace(offers, bid=offers.bid.clone(), value=offers.value.clone())
            changed.bid[0, ad[k]] = less[k, s]
            changed.value[0, ad[k]] *= less[k, s] / offers.bid[0, ad[k]]
            other, there, _ = shown_pages(network, memory, catalogue, changed, features, reserve, config)
            assert float(found[k, s]) == pytest.approx(float((other.ctr[0] * (there.ad[0, 0] == ad[k])).sum()), rel=1e-5)
    factors = tuple(np.linspace(0.02, 1.0, 50).tolist())
    exact = audit(network, history, catalogue, offers, features, reserve, 3, factors, config)
    expected, _ = identity_prices(exact)
    many = torch.from_numpy(probe_bids(bid, floor, np.stack([draws(11, int(one), 60) for one in ad])))
    price = implicit_price(bid, floor, ctr, probed(network, memory, catalogue, offers, features, reserve, config, ad, many).numpy())
    assert exact.ad[0, :3].tolist() == ad.tolist()
    np.testing.assert_allclose(price, expected[0, :3, -1].numpy(), rtol=0.05)
    assert (price < bid).any() and (price > floor).any()


def test_an_incumbent_that_is_the_candidate_earns_the_same(data) -> None:
    """Charged as it was approved: implicit prices, by the same draws."""
    config = EvaluationConfig(requests=6, calibration_requests=20, audited_requests=1, audited_losers=1, recall_at=10)
    for mode in ("implicit", "learned"):
        found = replay_v2(data.model, data.samples, config, Incumbent(data.model, data.samples.vocabulary, mode, "a" * 12))
        revenue = found.per_request.pivot_table(index="request_id", columns="policy", values="revenue")
        np.testing.assert_allclose(revenue["incumbent"], revenue[f"ega_v2/{mode}"], rtol=1e-6)
    with pytest.raises(ValueError, match="rule 'critical' is unknown"):
        prices(data.model.core, None, "critical")


def test_predictions_stand_on_the_clicks_of_the_validation_days(data) -> None:
    rows = data.samples.split_rows(schema.VALIDATION)
    shown = np.asarray(data.samples.candidate[rows, : data.samples.slots]) >= 0
    clicks = np.asarray(data.samples.click[rows, : data.samples.slots])[shown]
    assert clicks.sum() > 0
    for reward in (data.model.core.reward, data.model.evaluation):
        assert read_logged(data, reward, rows)[shown].sum() == pytest.approx(clicks.sum(), rel=1e-4)


def test_replay_measures_every_price_rule_and_reads_pages_as_they_are_shown(data) -> None:
    """The pages of the frame, written out anew from ids, are read as the search read them; sums and regret fit together."""
    samples, config = data.samples, EvaluationConfig(requests=6, calibration_requests=20, audited_requests=2, audited_losers=1, recall_at=10)
    found = replay_v2(data.model, samples, config)
    rows = np.sort(samples.split_rows(schema.TEST)[-6:])
    mine = found.pages[found.pages["policy"] == "ega_v2/gsp"]
    np.testing.assert_allclose(read_pages(data, rows, mine), mine["judged_pctr"], rtol=1e-5)
    logged = found.pages[found.pages["policy"] == "logged"]
    np.testing.assert_allclose(read_pages(data, rows, logged), logged["judged_pctr"], rtol=1e-5)
    assert set(found.pages["policy"]) == {"logged", *(f"ega_v2/{rule}" for rule in RULES)}
    for policy, pages in found.pages.groupby("policy"):
        assert (pages["payment"] <= pages["bid"] * (1 + 1e-6)).all() and np.isfinite(pages["judged_pctr"]).all()
        per_request = found.per_request[found.per_request["policy"] == policy]
        assert len(per_request) == 6 and per_request["revenue"].sum() == pytest.approx((pages["judged_pctr"] * pages["payment"]).sum())
    for rule in RULES:
        assert {"psi_exact", "psi_loser", "psi_paper", "psi_exact_model", "psi_loser_model"} <= set(found.metrics["psi"][rule])
    # Truthful utility is 0 at first prices, so nothing can be divided by it; the others leave something.
    assert not np.isfinite(found.metrics["psi"]["first_price"]["psi_exact_model"]) and found.metrics["psi"]["gsp"]["psi_exact_model"] >= 0
    assert 0 <= found.metrics["ranking"]["auc"] <= 1 and found.metrics["ranking"]["dev"] >= 0
    assert found.plots["lie_bid"].shape == found.plots["lie_learned"].shape and len(found.plots["lie_ad"]) == len(set(found.plots["lie_ad"]))
    truth = int(np.argmin(np.abs(found.plots["lie_bid"][0] - found.plots["lie_value"][0])))
    assert found.plots["lie_gsp"][0, truth] == pytest.approx(0.0, abs=1e-6)  # the truth gains nothing over itself


@torch.inference_mode()
def test_scores_of_a_city_are_the_searchs_own_chances(data) -> None:
    """Over the tuples of a city they sum to 1, and a search without bids for pages of one ad gives the same log chances."""
    samples, rows, network = data.samples, np.sort(data.samples.split_rows(schema.TEST)[:3]), data.model.core
    scores = city_scores(data, rows)
    for mine, history, catalogue, offers, _ in data.groups(rows, 1):
        city = data.city_offers(int(samples.day[mine[0]]), int(samples.city_code[mine[0]])).city.rows
        plain = SearchConfig(beams=256, alpha=0.0)
        ads_only = Offers(offers.bid, torch.ones_like(offers.active), offers.value, offers.organic[:, :0], offers.organic_creative[:, :0])
        pages = search(network.decoder(history, plain.beams, 1), catalogue, ads_only, 1, plain)
        for row, ads, log_z in zip(mine, pages.ad[:, :, 0].tolist(), pages.poi_log_z[:, :, 0].tolist(), strict=True):
            score = scores[int(np.searchsorted(rows, row))]
            codes = data.place_codes[torch.from_numpy(np.asarray(samples.ad_place_row)[city].astype(np.int64))].numpy()
            _, first = np.unique(codes, axis=0, return_index=True)
            assert np.exp(score[city[first]]).sum() == pytest.approx(1.0) and np.isinf(np.delete(score, city)).all()
            found = {city[ad]: z for ad, z in zip(ads, log_z, strict=True) if ad >= 0}
            assert len(found) == len(first)
            np.testing.assert_allclose([score[ad] for ad in found], list(found.values()), rtol=1e-4)


def test_sequences_are_what_users_chose(data) -> None:
    samples, rows = data.samples, data.samples.split_rows(schema.TRAIN)[:80]
    found = data.sequences(rows, 4)
    expected = []
    for row in rows:
        ads = [(samples.ad_place_row[ad], samples.exposed_creative[row, k]) for k, ad in enumerate(samples.candidate[row, :3]) if ad >= 0 and samples.click[row, k]]
        items = [(item, -1) for item, click in zip(samples.organic_place[row], samples.organic_click[row], strict=True) if click]
        chosen = [*ads, *items, *((place, -1) for place in samples.next_place[row] if place >= 0)]
        distinct = list({int(place): (int(place), int(creative)) for place, creative in reversed(chosen)}.values())[::-1]
        order = sorted(distinct, key=lambda pair, chosen=chosen: [int(place) for place, _ in chosen].index(pair[0]))
        if order:
            expected.append(order[:4])
    assert len(found) == len(expected)
    for at, chosen in enumerate(expected):
        for slot, (place, creative) in enumerate(chosen):
            assert torch.equal(found.poi[at, slot], data.place_codes[place])
            assert torch.equal(found.creative[at, slot], data.creative_codes[creative] if creative >= 0 else torch.full((3,), -1))
        assert bool((found.poi[at, len(chosen) :] == -1).all())


def test_places_of_a_page_with_fewer_ads() -> None:
    ad, above = np.array([[True, True, False]]), np.array([[0, 1, 0]])
    at_ad, at_item = places_of_page(ad, above, 2)
    assert at_ad.tolist() == [[0, 2, 4]] and at_item.tolist() == [[1, 3]]


def test_marginal_rewards_by_hand() -> None:
    nothing = torch.zeros(1, 3, 2)
    pages = Pages(torch.tensor([[-1.0, -2.0, -torch.inf]]), torch.tensor([[[0, 1], [0, 2], [-1, -1]]]), nothing, nothing, nothing, nothing, nothing, nothing)
    gain = marginal_rewards(pages, torch.tensor([[5.0, 3.0, 0.0]]), torch.tensor([[[4.0, 1.0], [2.5, 0.5], [0.0, 0.0]]]))
    # Ad 0 is on every page: its own worth. Ad 1: against the page with ad 2, and the other way round.
    assert gain.tolist() == [[[4.0, 2.0], [2.5, -2.0], [0.0, 0.0]]]


def test_audiences_bring_places_of_the_same_users_together() -> None:
    rng = np.random.default_rng(0)
    user = rng.integers(0, 40, 4000)
    place = np.where(user < 20, rng.integers(0, 5, 4000), rng.integers(5, 10, 4000))
    found = audiences(user, place, 11, 1)
    assert found.shape == (11, AUDIENCE_WIDTH) and (found[10] == 0).all()
    direction = found[:, :-1] / np.maximum(np.linalg.norm(found[:, :-1], axis=1, keepdims=True), 1e-9)
    alike = direction @ direction.T
    assert alike[:5, :5].min() > 0.8 and abs(alike[:5, 5:10]).max() < 0.5


def test_sizes_that_do_not_fit_the_logs_are_named(samples, tmp_path) -> None:
    for change, words in (({"organic_items": 1}, "2 organic items, the model reads at most 3 .* and 1"), ({"creative_width": 5}, "embeddings of 6 numbers, the model reads 5")):
        small = replace(MODEL, ega_v2=replace(MODEL.ega_v2, **change))
        with pytest.raises(ValueError, match=words):
            train_stage("tokenize", samples.folder, small, TRAINING, tmp_path / "stages", tmp_path / "checkpoints", seed=3)


def test_logs_without_creatives_are_refused(tmp_path_factory) -> None:
    from samples_fixture import tiny_samples

    folder = tiny_samples(tmp_path_factory.mktemp("plain"))
    with pytest.raises(ValueError, match="without creatives"):
        train_stage("tokenize", folder, MODEL, TRAINING, folder / "stages", folder / "checkpoints", seed=3)
