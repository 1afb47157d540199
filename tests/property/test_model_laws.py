"""Laws of the network's attention and of its payments, on drawn inputs."""

from __future__ import annotations

import functools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_tiny import NETWORK, tiny_network

from auction.critical import step_prices_everywhere
from model.ega_v1.network import PaymentNetwork, allocation_scores
from model.layers import ClusterAttention, ClusterBlock, Dice

WIDTH, CLUSTERS, HEADS = 16, 5, 4
LAW = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31 - 1)


@functools.cache
def block(activation: str, exact: int, dtype: torch.dtype = torch.float32) -> ClusterBlock:
    torch.manual_seed(1)
    layer = ClusterBlock(WIDTH, CLUSTERS, HEADS, exact, 2, activation)
    for dice in layer.modules():
        if isinstance(dice, Dice):
            dice.alpha.data.uniform_(-0.3, 0.3)
            dice.mean.normal_()
            dice.variance.uniform_(0.5, 2.0)
    return layer.eval().to(dtype)


def tokens(batch: int, count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed))


@LAW
@given(seeds, st.integers(1, 30), st.integers(1, 20), st.sampled_from(["dice", "none"]), st.sampled_from([0, 64]), st.sampled_from([0.0, 1.0, 1e4]))
@torch.no_grad()
def test_padding_is_exactly_ignored(seed: int, real: int, padding: int, activation: str, exact: int, junk: float) -> None:
    layer, mask = block(activation, exact), torch.arange(real + padding)[None].expand(2, -1) < real
    x = torch.cat([tokens(2, real, seed), tokens(2, padding, seed + 1, junk)], 1)
    zeroed = torch.cat([x[:, :real], torch.zeros(2, padding, WIDTH)], 1)
    assert torch.equal(layer(x, mask)[:, :real], layer(zeroed, mask)[:, :real])
    alone = layer(x[:, :real], mask[:, :real])
    torch.testing.assert_close(layer(x, mask)[:, :real], alone, rtol=1e-5, atol=2e-6)


@LAW
@given(seeds, st.integers(1, 40), st.sampled_from([0, 64]))
@torch.no_grad()
def test_order_of_tokens_does_not_matter(seed: int, count: int, exact: int) -> None:
    layer, x = block("dice", exact), tokens(2, count, seed)
    mask = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[:, 0] = True
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(x[:, order], mask[:, order])[mask[:, order]], layer(x, mask)[:, order][mask[:, order]], rtol=1e-4, atol=5e-6)


@LAW
@given(seeds, st.integers(1, 50), st.integers(1, 60), st.sampled_from(["dice", "none"]), st.sampled_from([(torch.float32, 1.0, 1e-5), (torch.float64, 100.0, 1e-9)]))
@torch.no_grad()
def test_chunked_equals_whole(seed: int, count: int, chunk: int, activation: str, kind: tuple[torch.dtype, float, float]) -> None:
    """To 1e-5 on normalised tokens, as blocks feed them; with logits in the thousands in float64, where only the method can differ."""
    dtype, scale, tolerance = kind
    attention: ClusterAttention = block(activation, 0, dtype).attention
    x = tokens(2, count, seed, scale).to(dtype)
    mask = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)) < 0.5  # chunks of padding only do occur
    mask[:, seed % count] = True
    whole, parts = attention(x, mask), attention.forward_chunked(x, mask, chunk)
    assert bool(torch.isfinite(parts).all())
    torch.testing.assert_close(parts[mask], whole[mask], rtol=tolerance, atol=tolerance * scale)


@LAW
@given(seeds, st.integers(1, 300))
@torch.no_grad()
def test_any_number_of_tokens_and_company_change_nothing(seed: int, count: int) -> None:
    layer, x, mask = block("dice", 0), tokens(3, count, seed), torch.ones(3, count, dtype=torch.bool)
    out = layer(x, mask)
    assert out.shape == x.shape and bool(torch.isfinite(out).all())
    torch.testing.assert_close(layer(x[1:2], mask[1:2]), out[1:2], rtol=1e-5, atol=2e-6)


@functools.cache
def payment(inputs: str, form: str) -> PaymentNetwork:
    return tiny_network(noise=1.5, payment_inputs=inputs, payment_form=form).payment


@LAW
@given(seeds, st.sampled_from([("aware", "critical"), ("aware", "rate"), ("literal", "rate")]), st.sampled_from([1e-3, 1.0, 1e4]))
@torch.no_grad()
def test_payments_lie_between_reserve_and_bid(seed: int, form: tuple[str, str], scale: float) -> None:
    rng = np.random.default_rng(seed)
    network = payment(*form)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(scale * rng.exponential(1.0, shape)).float()

    bid, slots = draw(9), NETWORK.slots
    bid[0] = 0.0
    reserve = bid * torch.from_numpy(rng.random(9)).float()
    critical, margin = torch.minimum(draw(9), bid), torch.minimum(draw(9), bid)
    h = torch.from_numpy(rng.normal(0, 3, (9, NETWORK.width))).float()
    price = network(h, torch.from_numpy(rng.random(9)).float(), draw(9, slots - 1), bid, critical, margin, reserve)
    assert bool(torch.isfinite(price).all())
    assert bool((price >= reserve).all()) and bool((price <= bid).all()) and bool((reserve >= 0).all())
    assert float(price[0]) == 0.0
    above = network(h, torch.ones(9) / 2, draw(9, slots - 1), bid, critical, margin, bid + 1)  # a reserve above the bid never charges more than the bid
    assert torch.equal(above, bid)


@LAW
@given(seeds, st.floats(0, 5), st.floats(0, 5))
@torch.no_grad()
def test_score_never_falls_in_the_own_bid(seed: int, bid: float, more: float) -> None:
    rng = np.random.default_rng(seed)
    network = tiny_network(seed=3, noise=1.0)
    h, user = torch.from_numpy(rng.normal(size=(1, 6, 16))).float(), torch.from_numpy(rng.normal(size=(1, 16))).float()
    affinity, slopes = network.generator(h, torch.ones(1, 6, dtype=torch.bool), user)
    ctr, bids = torch.from_numpy(rng.random((1, 6))).float(), torch.from_numpy(rng.random((1, 6))).float()
    bids[0, 2] = bid
    raised = bids.clone()
    raised[0, 2] = bid + more
    low, high = allocation_scores(ctr, bids, affinity, slopes), allocation_scores(ctr, raised, affinity, slopes)
    assert bool((high[0, 2] >= low[0, 2]).all())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(high[0, others], low[0, others])
    assert bool((slopes > 0).all())


@LAW
@given(seeds, st.integers(1, 6))
def test_truthful_price_lies_between_reserve_and_the_threshold_of_its_slot(seed: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    theta = np.minimum.accumulate(rng.normal(1, 1, (4, slots, slots)), axis=2)
    theta[rng.random(theta.shape) < 0.1] = np.inf
    theta = np.minimum.accumulate(theta, axis=2)
    reserve, ctr = rng.random((4, slots)) * 0.5, rng.random((4, slots, slots))
    price = step_prices_everywhere(theta, ctr, reserve)
    finite = np.isfinite(price)
    assert (price >= reserve[..., None] - 1e-12)[finite].all()
    assert (price <= np.maximum(theta, reserve[..., None]) + 1e-12)[finite].all()
