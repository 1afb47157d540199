"""External anchors on tiny data of the published schemas: protocols that leak nothing, known answers, models that learn what is there."""

from __future__ import annotations

import gzip
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from marketplace_tiny import write_checkins_folder

from benchmarks import next_poi, sequential, serp
from benchmarks.anchors import find_data
from cli.bench import bench

# ---------------------------------------------------------------------------------------------------------------------
# sequential


def interactions_file(folder: Path, users: int = 60, items: int = 150, seed: int = 0) -> Path:
    """Every user walks the items in a ring from a place of her own: the next item is certain, popularity says nothing."""
    rng = np.random.default_rng(seed)
    lines = []
    for user in range(users):
        first, length = int(rng.integers(items)), int(rng.integers(3, 14))
        lines += [f"u{user} item{(first + step) % items}" for step in range(length)]
    lines.append("short item0")  # nothing of hers can be held out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "interactions.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> sequential.Interactions:
    return sequential.read_interactions(interactions_file(tmp_path_factory.mktemp("ring"), users=400, items=60))


def test_interactions_are_read_in_order_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "interactions.txt").write_text("b  x\na y\nb\tz\na x\n")
    data = sequential.read_interactions(tmp_path)
    assert (data.users, data.count) == (2, 3)
    np.testing.assert_array_equal(data.items, [1, 3, 2, 1])  # b: x z; a: y x
    np.testing.assert_array_equal(data.start, [0, 2, 4])


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "interactions.txt").write_text("")
    with pytest.raises(ValueError, match=r"interactions.txt is empty; it must hold lines"):
        sequential.read_interactions(tmp_path)


def test_settings_follow_the_file(ring: sequential.Interactions) -> None:
    """As published for sparse and for dense files; the same work for small ones; an epoch of a large one is bounded for both models."""
    assert sequential.settings_for(ring).length == 50 and sequential.settings_for(ring).epochs > sequential.SETTINGS.epochs
    dense = sequential.Interactions(np.arange(60 * 100) % 90 + 1, np.arange(61) * 100, 90)
    settings = sequential.settings_for(dense)
    assert (settings.length, settings.dropout) == (200, 0.2)
    settings = replace(settings, width=4, blocks=1, tokens=900, negatives=8)
    for name, bound in (("SASRec", 98), ("EGA-V1 encoder", 98)):
        ranker, seen = sequential.MODELS[name](dense, settings), []
        handle = ranker.network.register_forward_hook(lambda _, given, __: seen.append(int((given[0] != 0).sum())))  # noqa: B023
        for _ in ranker.losses(np.random.default_rng(0)):
            pass
        handle.remove()
        assert 900 - bound <= sum(seen) <= 900


@pytest.mark.parametrize("text", ["1 2 3\n4 5 6\n", "1\n2\n"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "interactions.txt").write_text(text)
    with pytest.raises(ValueError, match="user item"):
        sequential.read_interactions(tmp_path)
    with pytest.raises(FileNotFoundError, match="interactions.txt.gz"):
        sequential.read_interactions(tmp_path / "nowhere")


def test_no_training_batch_holds_a_held_out_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are numbered by position, so that the last two of every user can be told from all others."""
    lengths = np.array([9, 3, 5, 1, 2, 12])
    start = np.concatenate([[0], np.cumsum(lengths)])
    data = sequential.Interactions(np.arange(1, start[-1] + 1), start, int(start[-1]))
    held = {int(data.items[end - back]) for end, n in zip(start[1:], lengths, strict=True) if n >= 3 for back in (1, 2)}
    settings = replace(sequential.Settings(), width=8, heads=2, length=6, positions=5, negatives=4)
    original_loss = sequential.next_item_loss
    for model in sequential.MODELS.values():
        ranker, seen = model(data, settings), set()
        monkeypatch.setattr(sequential, "next_item_loss", lambda state, target, *rest, seen=seen: (seen.update(target.tolist()), original_loss(state, target, *rest))[1])
        original = ranker.network.forward
        ranker.network.forward = lambda sequences, *rest, seen=seen, original=original: (seen.update(sequences.flatten().tolist()), original(sequences, *rest))[1]
        for _ in ranker.losses(np.random.default_rng(0)):
            pass
        assert seen - {0} and not seen & held
    assert data.held(np.array([0]), 1).tolist() == [9] and data.before(np.array([0]), 1, 3).tolist() == [[6, 7, 8]]


def test_negatives_are_uniform_over_what_the_user_never_touched() -> None:
    data = sequential.Interactions(np.array([1, 2, 3, 1, 5]), np.array([0, 3, 5]), 6)
    drawn = sequential.draw_negatives(data, np.array([0, 1]), np.random.default_rng(0), 6000)
    for row, allowed in zip(drawn, ({4, 5, 6}, {2, 3, 4, 6}), strict=True):
        found, count = np.unique(row, return_counts=True)
        assert set(found.tolist()) == allowed
        np.testing.assert_allclose(count / 6000, 1 / len(allowed), atol=0.03)


def test_ranks_and_gains_are_the_textbook_ones() -> None:
    rank = sequential.ranks(np.array([[0.1, 0.9, 0.5], [1.0, 1.0, 1.0]]), np.array([0.6, 1.0]))
    assert rank.tolist() == [1, 3]  # ties fall against the target
    hit, ndcg = sequential.gains(np.array([0, 1, 9, 10]))
    assert hit.tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(ndcg, [1, 1 / math.log2(3), 1 / math.log2(11), 0])


def test_the_loss_on_all_items_is_the_softmax() -> None:
    class Every(np.random.Generator):
        """Draws each item once."""

        def integers(self, low: int, high: int, size: int) -> np.ndarray:  # type: ignore[override]
            assert size == high - low
            return np.arange(low, high)

    item = torch.nn.Embedding(8, 5, padding_idx=0)
    state, target = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4, 7, 3])
    loss = sequential.next_item_loss(state, target, item, 7, 7, Every(np.random.PCG64(0)))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(state @ item.weight[1:].T, target - 1))


def test_batches_hold_every_row_once_and_rows_of_like_length() -> None:
    length = np.random.default_rng(0).integers(0, 40, 500)
    for trained in (length, np.ones(500)):
        parts = list(sequential.batches_by_length(length, trained, 200 if trained is length else 10, np.random.default_rng(1)))
        assert sorted(np.concatenate(parts).tolist()) == np.flatnonzero(length > 0).tolist()
        padding = sum(length[part].max() * len(part) for part in parts) / length.sum()
        assert padding < 1.2
        weight = [trained[part].sum() for part in parts]
        assert max(weight) < 1.4 * np.median(weight)  # every training position counts alike


@pytest.mark.parametrize("name", ["SASRec", "EGA-V1 encoder"])
def test_models_learn_a_ring_and_popularity_does_not(ring: sequential.Interactions, name: str) -> None:
    settings = replace(
        sequential.Settings(), width=16, blocks=1, length=6, dropout=0.0, positions=128, negatives=64, epochs=10,
        every=5, learning_rate=1e-2, validation_users=100,
    )  # fmt: skip
    users = np.flatnonzero(ring.length >= 3)
    negatives = sequential.draw_negatives(ring, users, np.random.default_rng(5))
    ranker = sequential.MODELS[name](ring, settings)
    sequential.fit(ranker, ring, settings, seed=0)
    hit = sequential.gains(sequential.sampled_ranks(ranker, ring, users, 1, negatives))[0].mean()
    chance = sequential.gains(sequential.sampled_ranks(sequential.Popularity(ring, settings), ring, users, 1, negatives))[0].mean()
    assert hit > 0.9 and chance < 0.4
    full = sequential.gains(sequential.full_ranks(ranker, ring, users[:50], 1))[0].mean()
    assert full > 0.8


# ---------------------------------------------------------------------------------------------------------------------
# next-poi


@pytest.fixture(scope="module")
def checkins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkins_folder(tmp_path_factory.mktemp("city"), seed=1)


@pytest.fixture(scope="module")
def city(checkins: Path) -> next_poi.City:
    return next_poi.City(checkins)


def test_a_request_reads_its_users_past_newest_first(city: next_poi.City) -> None:
    rng = np.random.default_rng(0)
    rows = rng.choice(len(city.user), 50, replace=False)
    before = city.rows_before(rows, 6)
    for row, past in zip(rows, before, strict=True):
        expected = [r for r in range(row - 1, row - 7, -1) if r >= city.start[city.user[row]]]
        assert past[past >= 0].tolist() == expected
    behaviours = city.encode(rows, 6, city.homes(city.end))["behaviours"]
    poi = city.vocabulary.index("poi", city.pois["poi_id"].to_numpy()[city.poi_row[before.clip(min=0)]])
    count = (behaviours[..., 0] > 0).sum(1)
    for i in range(len(rows)):  # check-ins of the request's own second, if any, are dropped and the rest moves up
        np.testing.assert_array_equal(behaviours[i, : count[i], 0], poi[i, (before >= 0).sum(1)[i] - count[i] : (before >= 0).sum(1)[i]])


def test_the_check_in_itself_and_later_ones_change_nothing_that_is_read(city: next_poi.City) -> None:
    rows = city.end - 3
    rows = rows[rows > city.start]
    encoded = city.encode(rows, 8, city.homes(rows))
    changed = next_poi.City.__new__(next_poi.City)
    changed.__dict__.update(city.__dict__)
    changed.poi_row = city.poi_row.copy()
    late = np.concatenate([rows, rows + 1, rows + 2])
    changed.poi_row[late] = (changed.poi_row[late] + 1) % len(city.pois)
    for name, values in changed.encode(rows, 8, changed.homes(rows)).items():
        np.testing.assert_array_equal(values, encoded[name], err_msg=name)


def test_training_candidates_hold_the_target_once_and_all_own_places(city: next_poi.City) -> None:
    settings = replace(next_poi.Settings(), own=10, drawn=30)
    rows = np.setdiff1d(np.arange(200), city.start)
    chance = np.full(len(city.pois), 1 / len(city.pois))
    candidate, log_q = next_poi.training_candidates(city, rows, settings, chance, np.random.default_rng(0))
    for i, row in enumerate(rows):
        real = candidate[i][np.isfinite(log_q[i])]
        assert real[0] == city.poi_row[row] and len(set(real)) == len(real)
        before = city.rows_before(rows[i : i + 1], 10)[0]
        assert set(city.poi_row[before[before >= 0]]) <= set(real)


def test_an_encoder_on_top_of_trained_crosses_starts_as_they_are_and_leaves_them_so(city: next_poi.City) -> None:
    settings, visits = replace(next_poi.Settings(), width=8, embedding=4, behaviours=8, history=16, epochs=1, recent=2, validations=1), np.full(len(city.pois) + 2, 5.0)
    alone = next_poi.NextPoiNetwork(city, settings, visits, encoder=False, crosses=True)
    with torch.no_grad():
        alone.crosses.mlp.layers[-1].weight.normal_()
    rows = city.end - 1
    both = next_poi.NextPoiNetwork(city, settings, visits, encoder=True, crosses=True, trained=alone.crosses)
    assert np.array_equal(*(next_poi.scores(network, city, rows, city.homes(rows)) for network in (alone, both)))
    network, found = next_poi.train(city, replace(settings, learning_rate_on_top=0.1), 1, True, True, 0, "both", alone.crosses)
    assert found["course"][0]["step"] == 0 and len(found["course"]) > 1
    assert all(torch.equal(value, network.crosses.state_dict()[name]) for name, value in alone.crosses.state_dict().items())


@torch.no_grad()
def test_crosses_start_as_the_hour_weighted_count(city: next_poi.City) -> None:
    """Before training the explicit crosses rank the user's own places as the baseline does, but for its continuous hours and days."""
    rows = (city.end - 1)[city.end - 1 > city.start]
    network = next_poi.NextPoiNetwork(city, replace(next_poi.Settings(), history=400), np.zeros(len(city.pois) + 2), encoder=False, crosses=True)
    mine = next_poi.scores(network, city, rows, city.homes(rows))
    theirs = next_poi.counting_scores(city, rows, "hour_weighted")
    for score, baseline in zip(mine, theirs, strict=True):
        visited = baseline > 1e-3
        if visited.sum() > 2:
            assert np.corrcoef(score[visited], np.log(baseline[visited]))[0, 1] > 0.8
            assert score[visited].min() > score[~visited].max() - 1e-6 or baseline[visited].min() < 0.1


def test_target_ranks_fall_against_the_target() -> None:
    assert next_poi.target_ranks(np.array([[1.0, 2.0, 2.0], [3.0, 0.0, 1.0]]), np.array([1, 0])).tolist() == [1, 0]
    assert next_poi.target_ranks(np.array([[1.0, 2.0], [np.nan, 0.0], [1.0, np.nan]]), np.array([1, 0, 0])).tolist() == [0, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# serp


def pages_file(folder: Path, pages: int = 400, queries: int = 12, slots: int = 4, seed: int = 0) -> Path:
    """Urls of a query differ a lot in attraction and change places from page to page."""
    rng = np.random.default_rng(seed)
    attraction = rng.uniform(0.02, 0.9, (queries, slots))
    lines = []
    for _ in range(pages):
        query, order = int(rng.integers(queries)), rng.permutation(slots)
        click = rng.random(slots) < attraction[query, order] * 0.8 ** np.arange(slots)
        lines.append(f"{query}\t{' '.join(str(100 * query + url) for url in order)}\t{' '.join('1' if c else '0' for c in click)}\t{' '.join(['-1'] * slots)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pages.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def test_pages_are_read_and_others_refused(tmp_path: Path) -> None:
    pages = serp.read_pages(pages_file(tmp_path, pages=30))
    assert pages.url.shape == pages.pair.shape == pages.click.shape == (30, 4) and len(pages.query) == 30
    assert len(np.unique(pages.pair)) == len(set(zip(np.repeat(pages.query, 4).tolist(), pages.url.ravel().tolist(), strict=True)))
    for line, message in (("1\t2 3\t0 2", "0 or 1"), ("1\t2 3", "got 2 field"), ("1\t2 3\t0", "2 urls and 1 clicks")):
        (tmp_path / "pages.tsv.gz").write_bytes(gzip.compress(line.encode()))
        with pytest.raises(ValueError, match=message):
            serp.read_pages(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pages\.tsv\.gz"):
        serp.read_pages(tmp_path / "nowhere")


def test_perplexity_of_a_fair_coin_is_two() -> None:
    click = np.random.default_rng(0).integers(0, 2, (50, 10))
    assert serp.perplexity(serp.cross_entropy(np.full((50, 10), 0.5), click)) == pytest.approx((2.0, 2.0))
    assert serp.perplexity(serp.cross_entropy(click.astype(float), click))[0] == pytest.approx(1.0)


def test_the_counting_baseline_by_hand() -> None:
    code = np.array([[0, 1], [0, 1]])
    train = serp.Pages(np.zeros(2, int), code, code, np.array([[1, 0], [0, 1]], np.float32))
    test = serp.Pages(np.array([0, 1]), np.array([[1, 0], [2, 3]]), np.array([[1, 0], [2, 3]]), np.zeros((2, 2), np.float32))
    # Slot CTRs are 1/2 and 1/2; both pairs were clicked once of an expected 2 x 1/2.
    np.testing.assert_allclose(serp.slot_times_ctr(train, test, 3.0), [[0.5 * 4 / 4, 0.5 * 4 / 4], [0.5, 0.5]])
    train.click[:] = [[1, 1], [1, 0]]  # slots 1 and 1/2; the first url was clicked twice of an expected 2, the second once of 1
    np.testing.assert_allclose(serp.slot_times_ctr(train, test, 1.0), [[1.0 * 2 / 2, 0.5 * 3 / 3], [1.0, 0.5]])


def test_no_input_of_a_page_depends_on_its_own_clicks(tmp_path: Path) -> None:
    pages = serp.read_pages(pages_file(tmp_path))
    changed = replace(pages, click=1 - pages.click)
    for own in (0, 1):
        before, after = serp.inputs(pages, pages, own), serp.inputs(changed, changed, own)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_evaluator_learns_who_is_clicked_and_meets_unknown_pages_calmly(tmp_path: Path) -> None:
    pages = serp.read_pages(pages_file(tmp_path, pages=700))
    settings = replace(serp.Settings(), steps=40, pair=1.5)
    train, test = np.arange(500), np.arange(500, 700)
    found = serp.one_split(pages, settings, train, test, seed=0)
    assert serp.perplexity(found["evaluator"])[0] < serp.perplexity(found["slot"])[0] - 0.05
    known, unknown = (pages.take(np.flatnonzero(side)) for side in (pages.query < 6, pages.query >= 6))
    model, _ = serp.fit(known, pages, settings, 20, 0)
    p = serp.probabilities(model, serp.inputs(unknown, known, 0))
    assert 0.7 < p.mean() / known.click.mean() < 1.4 and (p > 0.02).all() and (p < 0.9).all()


# ---------------------------------------------------------------------------------------------------------------------
# the commands


@pytest.mark.parametrize(("name", "write"), [("sequential", interactions_file), ("next-poi", lambda folder: write_checkins_folder(folder, seed=2)), ("serp", pages_file)])
def test_quick_commands_write_a_table_with_what_repeats_it(name: str, write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    out = tmp_path / "result.json"
    assert bench(name, out, data=tmp_path / "data", seed=3, quick=True) == 0
    result = json.loads(out.read_text())
    assert result["name"] == name and result["seed"] == 3 and result["quick"] is True and result["config"] and "torch" in result["versions"]
    assert len(result["table"]) >= 2 and "| " in capsys.readouterr().out


def test_missing_data_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGA_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"add --data DIR"):
        find_data("serp", None)
    (tmp_path / "serp").mkdir()
    (tmp_path / "beauty").mkdir()
    assert find_data("serp", None) == tmp_path / "serp" and find_data("sequential", Path("beauty")) == tmp_path / "beauty"
    monkeypatch.delenv("EGA_DATA")
    with pytest.raises(FileNotFoundError, match="EGA_DATA is not set"):
        find_data("serp", None)
    with pytest.raises(ValueError, match="takes no --data"):
        bench("auction", None, data=tmp_path)


def test_published_game_data_has_the_published_size() -> None:
    folder = Path(os.environ.get("EGA_DATA", "")) / "games"
    if not os.environ.get("EGA_DATA") or not folder.exists():
        pytest.skip("EGA_DATA is not set to a folder that holds games/ (real interactions)")
    data = sequential.read_interactions(folder)
    assert (data.users, data.count, len(data.items)) == (31_013, 23_715, 287_107)
