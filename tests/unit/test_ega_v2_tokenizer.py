"""Residual k-means: known answers, health, freezing, storage, hostile input."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from model.ega_v2.tokenizer import CODEBOOKS, MANIFEST, Tokenizer, TokenizerConfig, TokenizerError, fit, health_of, require_healthy


def catalogue(items: int = 600, features: int = 12, seed: int = 0, groups: int = 24) -> np.ndarray:
    """Items around centres, as embeddings of places are."""
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (groups, features))[rng.integers(0, groups, items)] + rng.normal(0, 0.4, (items, features))).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return fit(catalogue(), TokenizerConfig(seed=3))


def test_an_exact_hierarchy_is_recovered() -> None:
    """Four far groups of four nearer ones of four points: each layer finds one level, and nothing is left."""
    levels = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) - 0.5
    points = (100 * levels[:, None, None] + 10 * levels[None, :, None] + levels[None, None]).reshape(-1, 2)
    found = fit(points, TokenizerConfig(codes=4))
    codes = found.encode(points)
    assert len(np.unique(codes, axis=0)) == 64 and found.health.collisions == 0 and found.health.use == (1.0, 1.0, 1.0)
    for level, size in ((0, 16), (1, 4)):  # items of one group share the prefix
        prefixes = np.unique(codes[:, : level + 1], axis=0, return_inverse=True)[1].ravel()
        assert all(len(set(prefixes[start : start + size].tolist())) == 1 for start in range(0, 64, size))
    np.testing.assert_allclose(found.decode(codes), points, atol=1e-4)
    assert found.health.entropy == pytest.approx((1.0, 1.0, 1.0)) and found.health.error[-1] < 1e-9


def test_the_smallest_healthy_number_of_codes_is_taken(tokenizer: Tokenizer) -> None:
    assert not tokenizer.health.faults(tokenizer.config)
    require_healthy(tokenizer)
    assert min(tokenizer.health.use) >= 0.8 and tokenizer.health.collisions < 0.05
    smaller = fit(catalogue(), replace(tokenizer.config, codes=tokenizer.codes // 2))
    with pytest.raises(TokenizerError, match="share their tuple"):
        require_healthy(smaller)


def test_errors_fall_layer_by_layer(tokenizer: Tokenizer) -> None:
    error = tokenizer.health.error
    assert 1 > error[0] > error[1] > error[2] >= 0


def test_equal_seeds_give_equal_bytes_and_row_order_does_not_matter(tokenizer: Tokenizer) -> None:
    order = np.random.default_rng(1).permutation(600)
    again = fit(catalogue()[order], TokenizerConfig(seed=3))
    assert again.codebooks.tobytes() == tokenizer.codebooks.tobytes()
    assert fit(catalogue(), TokenizerConfig(seed=4)).codebooks.tobytes() != tokenizer.codebooks.tobytes()


def test_codes_of_an_item_do_not_depend_on_its_company(tokenizer: Tokenizer) -> None:
    items = np.concatenate([catalogue(40, seed=9), catalogue(40)])
    codes = tokenizer.encode(items)
    assert codes.shape == (80, 3) and codes.min() >= 0 and codes.max() < tokenizer.codes
    assert np.array_equal(codes, np.concatenate([tokenizer.encode(items[i : i + 1]) for i in range(80)]))
    nearest = [int(((tokenizer.codebooks[0] - item) ** 2).sum(1).argmin()) for item in items]
    assert codes[:, 0].tolist() == nearest


def test_new_items_get_codes_without_moving_the_codebooks(tokenizer: Tokenizer) -> None:
    before = tokenizer.codebooks.copy()
    old, new = tokenizer.encode(catalogue()), tokenizer.encode(catalogue(200, seed=5))
    assert np.array_equal(before, tokenizer.codebooks) and np.array_equal(old, tokenizer.encode(catalogue()))
    assert tokenizer.encode(np.zeros((0, 12))).shape == (0, 3)
    health = health_of(np.concatenate([catalogue(), catalogue(200, seed=5)]), tokenizer.codebooks)
    both = np.concatenate([old, new])
    _, group = np.unique(both, axis=0, return_counts=True)
    assert health.collisions == pytest.approx(group[group > 1].sum() / 800) and health.largest_group == group.max()
    assert health.use == pytest.approx(tuple(len(set(both[:, layer])) / tokenizer.codes for layer in range(3)))


def test_equal_items_count_once() -> None:
    points = catalogue(300)
    doubled = fit(np.concatenate([points, points[:100]]), TokenizerConfig(seed=3))
    assert doubled.health.duplicates == 100 and doubled.health.items == 300
    assert doubled.codebooks.tobytes() == fit(points, TokenizerConfig(seed=3)).codebooks.tobytes()


def test_no_number_of_codes_is_healthy_where_all_items_are_on_a_line_of_few_points() -> None:
    with pytest.raises(TokenizerError, match="no number of codes"):
        fit(np.arange(9.0)[:, None], TokenizerConfig(most_collisions=0.0))
    few = fit(np.arange(9.0)[:, None], TokenizerConfig(codes=16))
    with pytest.raises(TokenizerError, match="layer 1 uses 56.2% of its codes"):
        require_healthy(few)


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path) -> None:
    version = tokenizer.save(tmp_path / "tokens")
    loaded = Tokenizer.load(tmp_path / "tokens")
    assert loaded.codebooks.tobytes() == tokenizer.codebooks.tobytes() and loaded.config == tokenizer.config and loaded.health == tokenizer.health
    manifest = json.loads((tmp_path / "tokens" / MANIFEST).read_text())
    assert manifest["version"] == version and manifest["codes"] == tokenizer.codes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens"]
    with pytest.raises(TokenizerError, match="exists already"):
        tokenizer.save(tmp_path / "tokens")


@pytest.mark.parametrize(("name", "change", "message"), [
    (CODEBOOKS, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "not the file that was saved"),
    (CODEBOOKS, lambda data: data[:-4], "not the file that was saved"),
    (MANIFEST, lambda data: data[:40], "cannot be read"),
    (MANIFEST, lambda data: data.replace(b'"format":1', b'"format":2'), "format 2"),
    (MANIFEST, lambda data: data.replace(b'"layers":3', b'"layers":4'), "shape"),
    (MANIFEST, lambda data: b"[]", "cannot be read"),
    (MANIFEST, lambda data: data.replace(b'"seed":3', b'"seed":"x"'), "cannot be read"),
])  # fmt: skip
def test_a_damaged_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path, name, change, message) -> None:
    tokenizer.save(tmp_path / "tokens")
    path = tmp_path / "tokens" / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path / "tokens")


def test_a_missing_tokenizer_is_named(tmp_path) -> None:
    with pytest.raises(TokenizerError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("features", "message"), [
    (np.zeros(3), "matrix"), (np.zeros((2, 2), complex), "real numbers"), (np.array([["a"]]), "real numbers"),
    (np.array([[1.0], [np.nan]]), "item 1"), (np.zeros((4, 2)), "two items with different features"), (np.zeros((0, 2)), "two items"),
])  # fmt: skip
def test_features_that_cannot_be_meant_are_refused(features, message) -> None:
    with pytest.raises(TokenizerError, match=message):
        fit(features)


def test_features_of_another_width_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="fitted on 12"):
        tokenizer.encode(np.zeros((1, 11)))
