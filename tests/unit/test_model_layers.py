"""Layers of the network: Dice, cluster attention, cross attention, split heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.layers import MLP, ClusterAttention, ClusterBlock, CrossAttention, Dice, SplitHead, cluster_weights, freeze_dice, multi_head_attention

WIDTH, CLUSTERS, HEADS = 16, 5, 4


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def attention(seed: int = 0, exact: int = 0, activation: str = "dice") -> ClusterAttention:
    torch.manual_seed(seed)
    layer = ClusterAttention(WIDTH, CLUSTERS, HEADS, exact, activation)
    for dice in layer.modules():
        if isinstance(dice, Dice):
            dice.alpha.data.uniform_(-0.3, 0.3)
            dice.mean.normal_()
            dice.variance.uniform_(0.5, 2.0)
    return layer.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Dice


def test_dice_is_its_formula() -> None:
    dice = Dice(WIDTH).eval()
    dice.alpha.data.uniform_(-1, 1)
    dice.mean.normal_()
    dice.variance.uniform_(0.5, 2.0)
    x = tokens(2, 7)
    p = torch.sigmoid((x - dice.mean) / torch.sqrt(dice.variance + dice.epsilon))
    torch.testing.assert_close(dice(x), p * x + (1 - p) * dice.alpha * x)


@pytest.mark.parametrize("masked", [True, False])
def test_dice_moves_towards_the_moments_of_real_tokens(masked: bool) -> None:
    dice, x = Dice(WIDTH, momentum=0.25).train(), 3 + 2 * tokens(3, 9)
    mask = torch.arange(9)[None] < torch.tensor([9, 4, 1])[:, None]
    x[~mask] = 1e3 if masked else x[~mask]
    dice(x, mask if masked else None)
    real = x[mask] if masked else x.reshape(-1, WIDTH)
    torch.testing.assert_close(dice.mean, 0.25 * real.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dice.variance, 0.75 + 0.25 * real.var(0, unbiased=False), rtol=1e-3, atol=1e-3)


def test_dice_mask_of_one_row_counts_for_every_request() -> None:
    whole, shared = Dice(WIDTH).train(), Dice(WIDTH).train()
    x, mask = tokens(3, 6), torch.tensor([[True, True, True, False, True, False]])
    whole(x, mask.expand(3, -1))
    shared(x, mask)
    torch.testing.assert_close(shared.mean, whole.mean)


@pytest.mark.parametrize("why", ["frozen", "eval"])
def test_dice_stands_still(why: str) -> None:
    dice = Dice(WIDTH)
    dice.train(why == "frozen")
    freeze_dice(dice, why == "frozen")
    dice(tokens(2, 5))
    assert torch.equal(dice.mean, torch.zeros(WIDTH)) and torch.equal(dice.variance, torch.ones(WIDTH))


def test_freezing_reaches_every_dice_and_can_be_undone() -> None:
    block = ClusterBlock(WIDTH, CLUSTERS, HEADS, 0, 2, "dice")
    freeze_dice(block)
    assert all(layer.frozen for layer in block.modules() if isinstance(layer, Dice))
    freeze_dice(block, False)
    assert not any(layer.frozen for layer in block.modules() if isinstance(layer, Dice))


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def reference_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Eq. 9, one request, head and query at a time."""
    out = torch.zeros_like(query)
    each = query.shape[-1] // heads
    for b in range(query.shape[0]):
        real = torch.ones(key.shape[1], dtype=torch.bool) if mask is None else mask[b]
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            for i in range(query.shape[1]):
                weight = torch.softmax(key[b, real, part] @ query[b, i, part] / each**0.5, 0)
                out[b, i, part] = weight @ value[b, real, part]
    return out


@pytest.mark.parametrize("masked", [True, False])
def test_multi_head_attention_equals_plain_loops(masked: bool) -> None:
    query, key, value = (tokens(3, n, seed=n).requires_grad_() for n in (4, 6, 6))
    key.data, value.data = tokens(3, 6, 1), tokens(3, 6, 2)
    mask = torch.arange(6)[None] < torch.tensor([6, 3, 1])[:, None] if masked else None
    fast, slow = multi_head_attention(query, key, value, HEADS, mask), reference_attention(query, key, value, HEADS, mask)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    pull = tokens(3, 4, 9)
    for a, b in zip(torch.autograd.grad(fast, (query, key, value), pull), torch.autograd.grad(slow, (query, key, value), pull), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_cluster_attention_is_equations_7_to_14() -> None:
    layer = attention(activation="none")
    x = tokens(1, 11)
    q, k, v = layer.qkv(x[0]).chunk(3, -1)
    s = torch.softmax(x[0] @ layer.prototypes.T / WIDTH**0.5, 0)
    a_q, a_k, a_v = s.T @ q, s.T @ k, s.T @ v
    inner = a_q @ a_k.T / WIDTH**0.5
    phi_k, phi_v = torch.sigmoid(layer.key_ratio(inner)), torch.sigmoid(layer.value_ratio(inner))
    key = phi_k * layer.key_map(a_q) + (1 - phi_k) * layer.key_map(a_k)
    value = phi_v * layer.value_map(a_q) + (1 - phi_v) * layer.value_map(a_v)
    expected = layer.out_dice(layer.out(reference_attention(q[None], key[None], value[None], HEADS, None)))
    torch.testing.assert_close(layer(x, torch.ones(1, 11, dtype=torch.bool)), expected, rtol=1e-4, atol=1e-5)


def test_clusters_are_convex_combinations_of_real_tokens() -> None:
    x, mask = tokens(3, 20), torch.arange(20)[None] < torch.tensor([20, 7, 1])[:, None]
    s = cluster_weights(x, attention().prototypes, mask)
    assert s.shape == (3, 20, CLUSTERS) and bool((s >= 0).all())
    torch.testing.assert_close(s.sum(1), torch.ones(3, CLUSTERS))
    assert bool((s[~mask] == 0).all())


def test_few_tokens_are_attended_exactly() -> None:
    layer, x = attention(exact=12), tokens(2, 12)
    mask = torch.arange(12)[None] < torch.tensor([12, 5])[:, None]
    q, k, v = layer.project(x, mask)
    exact = layer.out_dice(layer.out(reference_attention(q, layer.key_map(k), layer.value_map(v), HEADS, mask)))
    torch.testing.assert_close(layer(x, mask), exact, rtol=1e-4, atol=1e-5)
    more = torch.cat([x, tokens(2, 1, 5)], 1)
    clustered = ClusterAttention.forward(layer, more, torch.ones(2, 13, dtype=torch.bool))
    layer.exact_up_to = 13
    assert not torch.allclose(clustered, layer(more, torch.ones(2, 13, dtype=torch.bool)), atol=1e-3)


def test_cross_attention_reads_only_real_keys_and_starts_aligned() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(WIDTH, CLUSTERS, HEADS, exact_up_to=8).eval()
    x = tokens(2, 6)
    torch.testing.assert_close(layer.query(x), layer.keys(x, torch.ones(2, 6, dtype=torch.bool)).key_BMD)
    for count in (8, 9):  # tokens themselves, then clusters
        keys, mask = tokens(2, count, 3), torch.arange(count)[None] < torch.tensor([count, 3])[:, None]
        other = torch.where(mask.unsqueeze(-1), keys, torch.full_like(keys, 50.0))
        real = torch.ones(2, 6, dtype=torch.bool)
        assert torch.equal(layer(x, real, layer.keys(keys, mask)), layer(x, real, layer.keys(other, mask)))
        assert layer.keys(keys, mask).key_BMD.shape[1] == (8 if count == 8 else CLUSTERS)


def test_split_head_equals_a_concatenated_mlp_values_and_gradients() -> None:
    torch.manual_seed(0)
    split, whole = SplitHead(WIDTH, (12, 6), bias=-2.0), MLP(2 * WIDTH, (12, 6), 1)
    with torch.no_grad():
        whole.layers[0].weight.copy_(torch.cat([split.item.weight, split.user.weight], 1))
        whole.layers[0].bias.copy_(split.item.bias)
        for mine, theirs in zip(whole.layers[1:], split.rest.layers, strict=True):
            mine.load_state_dict(theirs.state_dict())
    h, user = tokens(3, 7).requires_grad_(), tokens(3, 1, 4)[:, 0].requires_grad_()
    joined = whole(torch.cat([h, user.unsqueeze(1).expand(-1, 7, -1)], -1)).squeeze(-1)
    torch.testing.assert_close(split(h, user), joined, rtol=1e-5, atol=1e-6)
    pull = torch.randn(3, 7)
    for a, b in zip(torch.autograd.grad(split(h, user), (h, user), pull), torch.autograd.grad(joined, (h, user), pull), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_mlp_can_start_at_its_prior() -> None:
    assert torch.equal(MLP(8, (4,), 2, zero_last=True)(torch.randn(3, 8)), torch.zeros(3, 2))


def test_cost_is_linear_in_tokens() -> None:
    """Multiply-adds as PyTorch counts them: exact and free of the machine's load."""
    block = ClusterBlock(WIDTH, CLUSTERS, HEADS, 0, 4, "dice").eval()
    flops = []
    for count in (10_000, 100_000):
        # The fused CPU kernel escapes the counter; the plain one multiplies the same.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            block(torch.zeros(1, count, WIDTH), torch.ones(1, count, dtype=torch.bool))
        flops.append(counter.get_total_flops())
    assert 9.9 < flops[1] / flops[0] < 10.1
    per_token = flops[1] / 100_000
    dense = 2 * WIDTH * WIDTH * (3 + 1 + 8)  # QKV, output, feed-forward of factor 4
    attention_and_clusters = 2 * WIDTH * CLUSTERS * (1 + 3 + 2)  # prototypes; A_q, A_k, A_v; logits and values
    assert per_token == pytest.approx(dense + attention_and_clusters, rel=0.01)


def test_block_normalises_first_and_adds_to_its_input() -> None:
    """Pre-LN with residuals: without the two inner layers a block is the identity."""
    block = ClusterBlock(WIDTH, CLUSTERS, HEADS, 0, 2, "none").eval()
    for layer in (block.attention.out, block.forward_layer.down):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x = tokens(2, 9)
    assert torch.equal(block(x, torch.ones(2, 9, dtype=torch.bool)), x)


def test_softmax_over_tokens_survives_huge_logits() -> None:
    x = tokens(1, 30) * 1e3
    layer, mask = attention(), torch.ones(1, 30, dtype=torch.bool)
    assert bool(torch.isfinite(layer(x, mask)).all())
    assert bool(torch.isfinite(layer.forward_chunked(x, mask, 7)).all())
    assert np.isfinite(F.softmax(x @ layer.prototypes.T, 1).detach().numpy()).all()


def test_dice_and_its_gradients_are_those_of_the_formula() -> None:
    """The fused function against the formula under autograd, over more rows than a cache holds at once; and by finite differences."""
    torch.manual_seed(0)
    dice = Dice(5).double().eval()
    dice.mean.copy_(torch.randn(5))
    dice.variance.copy_(torch.rand(5) + 0.2)
    with torch.no_grad():
        dice.alpha.copy_(torch.randn(5))
    x = torch.randn(3, 9_000, 5, dtype=torch.float64, requires_grad=True)
    gate = torch.sigmoid((x - dice.mean) * torch.rsqrt(dice.variance + dice.epsilon))
    expected = x * (dice.alpha + gate * (1 - dice.alpha))
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), (x, dice.alpha))
    found = dice(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad((found * weight).sum(), (x, dice.alpha)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(lambda y: dice(y), torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True))
