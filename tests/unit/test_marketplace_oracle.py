"""The limits of a request: against brute force, against the literature, and against what policies really earn."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from marketplace import oracle
from marketplace.click_model import ClickConfig
from marketplace.synthetic import SyntheticConfig
from marketplace.worlds import WorldConfig, build_world


def brute_force(gain: np.ndarray, continuation: np.ndarray, slots: int) -> float:
    """The best page by trying all of them."""
    best = 0.0
    for size in range(1, slots + 1):
        for page in itertools.permutations(range(len(gain)), size):
            total, reading = 0.0, 1.0
            for ad in page:
                total, reading = total + reading * gain[ad], reading * continuation[ad]
            best = max(best, total)
    return best


def draw(rng: np.random.Generator, ads: int) -> tuple[np.ndarray, np.ndarray]:
    """Gains, some of them 0, negative or equal, and continuations with ties, 0 and 1 among them."""
    gain = rng.lognormal(0, 1, ads) * rng.choice([1.0, 0.0, -1.0], ads, p=[0.8, 0.1, 0.1])
    continuation = rng.choice([rng.uniform(0, 1, ads), rng.choice([0.0, 0.5, 0.9, 1.0], ads)], axis=0)
    if ads > 2 and rng.random() < 0.3:
        gain[1], continuation[1] = gain[0], continuation[0]
    return gain, continuation


def test_the_golden_case() -> None:
    """AUCTION.md: p (.3, .2, .25), continuation (.5, .9, .6), value 10, K = 2 -> page (1, 0), value 4.7."""
    found = oracle.best_pages(10 * np.array([[0.3, 0.2, 0.25]]), np.array([[0.5, 0.9, 0.6]]), 2)
    assert found.pages.tolist() == [[1, 0]] and found.total[0] == pytest.approx(4.7, abs=1e-12)


def test_the_best_page_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        slots = int(rng.integers(1, 5))
        gain, continuation = draw(rng, int(rng.integers(1, 8)))
        found = oracle.best_pages(gain[None], continuation[None], slots)
        assert found.total[0] == pytest.approx(brute_force(gain, continuation, slots), abs=1e-12)
        page = found.pages[0][found.pages[0] >= 0]
        assert len(set(page)) == len(page) and (gain[page] > 0).all() and (found.pages[0][len(page):] == -1).all()
        reading = np.concatenate([[1.0], np.cumprod(continuation[page])[:-1]])
        assert (gain[page] * reading).sum() == pytest.approx(found.total[0], abs=1e-12)  # the page really earns it


def test_vcg_equals_its_definition_over_all_pages() -> None:
    rng = np.random.default_rng(1)
    for _ in range(120):
        slots = int(rng.integers(1, 4))
        gain, continuation = draw(rng, int(rng.integers(1, 7)))
        best, paid = oracle.vcg_revenue(gain[None], continuation[None], slots)
        page = best.pages[0][best.pages[0] >= 0]
        reading = np.concatenate([[1.0], np.cumprod(continuation[page])[:-1]])
        owed = 0.0
        for slot, ad in enumerate(page):
            without = gain.copy()
            without[ad] = 0.0
            owed += brute_force(without, continuation, slots) - (best.total[0] - gain[ad] * reading[slot])
        assert paid[0] == pytest.approx(owed, abs=1e-11) and -1e-12 <= paid[0] <= best.total[0] + 1e-12


def test_vcg_positions_of_the_literature() -> None:
    """Edelman, Ostrovsky and Schwarz 2007: values 10, 4, 2, clicks 200 and 100: VCG collects 600 + 200. Here c = 1/2 for every ad."""
    _, paid = oracle.vcg_revenue(np.array([[10.0, 4.0, 2.0]]), np.full((1, 3), 0.5), 2)
    assert 200 * paid[0] == pytest.approx(800.0)


def test_pruning_is_exact_and_a_batch_equals_single_requests() -> None:
    rng = np.random.default_rng(2)
    gain, continuation = rng.lognormal(0, 1, (40, 400)), rng.uniform(0.5, 0.97, (40, 400))
    together = oracle.best_pages(gain, continuation, 5)
    kept = oracle._undominated(np.maximum(gain, 0), continuation, 5)
    assert kept.shape[1] < 100  # it really prunes
    whole = oracle._best(gain, continuation, 5)
    np.testing.assert_array_equal(together.pages, whole.pages)
    for row in range(0, 40, 7):
        single = oracle.best_pages(gain[row : row + 1], continuation[row : row + 1], 5)
        np.testing.assert_array_equal(single.pages[0], together.pages[row])
        assert single.total[0] == together.total[row]


def test_refusals() -> None:
    good = np.full((1, 3), 0.5)
    for gain, continuation, slots, message in (
        (good, good[:, :2], 2, "alike"), (good, good, 0, "slots"), (good * np.nan, good, 2, "finite"), (good, good * 3, 2, r"\[0, 1\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            oracle.best_pages(gain, continuation, slots)
    empty = oracle.best_pages(np.zeros((2, 3)), np.ones((2, 3)), 2)
    assert empty.total.tolist() == [0.0, 0.0] and (empty.pages == -1).all()


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_no_page_beats_the_limits_of_a_world(share: float) -> None:
    config = WorldConfig(kind="synthetic", synthetic=SyntheticConfig(users=150, log_days=4), clicks=ClickConfig(substitution_below=share))
    world = build_world(config, seed=3)
    ids = world.state.requests["request_id"].to_numpy()[::41][:60]
    found = oracle.limits(world, ids)
    assert (found.welfare_reached <= found.welfare * (1 + 1e-12)).all() and (found.vcg_revenue <= found.welfare).all()
    assert (found.optimal_revenue <= found.welfare * (1 + 1e-12)).all()  # virtual values lie below values
    if share == 0.0:
        np.testing.assert_allclose(found.welfare_reached, found.welfare, rtol=1e-12)
    else:
        assert (found.welfare_reached < found.welfare).any()
    rng = np.random.default_rng(0)
    scored = pd.DataFrame({"policy": np.repeat(["logged", "best"], len(ids)), "request_id": np.tile(ids, 2), "welfare": np.append(found.welfare / 2, found.welfare), "revenue": np.append(found.optimal_revenue * 2, found.optimal_revenue)})
    table = oracle.shares(scored, ids, found, "logged")
    assert table["policies"]["best"] == pytest.approx({"welfare_of_limit": 1.0, "gap_closed": 1.0, "revenue_of_optimum": 1.0})
    assert table["policies"]["logged"] == pytest.approx({"welfare_of_limit": 0.5, "gap_closed": 0.0, "revenue_of_optimum": 2.0})
    for rows, ad_ids in world.active_ads(ids):
        for row in rows:
            for _ in range(5):
                page = rng.choice(ad_ids, world.config.slots, replace=False)
                p, c = world.page_truth(ids[row : row + 1], page[None])
                q = p[0] * np.concatenate([[1.0], np.cumprod(c[0])[:-1]])
                assert (q * world.values_per_click(page)).sum() <= found.welfare[row] * (1 + 1e-12)
