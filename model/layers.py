"""Building blocks of RecFormer and AucFormer.

Shape letters: B requests, N query tokens, M key tokens, C clusters (paper: N_c), D width, H heads, E = D / H.
Masks are true where a token is real. Every layer ignores masked tokens exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dice(nn.Module):
    """Data-adaptive activation p*x + (1-p)*alpha*x with p = sigma(BN(x)), BN without affine (Zhou et al. 2018, DIN).

    Statistics run over real tokens only. `frozen` stops them from moving whatever the training mode: later stages of
    training and serving use the statistics of pre-training.
    """

    def __init__(self, width: int, momentum: float = 0.02, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.momentum, self.epsilon = momentum, epsilon
        self.frozen = False

    def forward(self, x_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        if self.training and not self.frozen:
            self._observe(x_BND.detach(), mask_BN)
        # The running statistics are used in training too: gradients then do not couple the requests of a batch, and
        # a request scores alike alone and in company.
        scale = torch.rsqrt(self.variance + self.epsilon)
        constants = self.mean.to(x_BND.dtype), scale.to(x_BND.dtype), self.alpha.to(x_BND.dtype)
        return _Dice.apply(x_BND, *constants) if torch.is_grad_enabled() else _dice(x_BND, *constants)[0]

    @torch.no_grad()
    def _observe(self, x_BND: Tensor, mask_BN: Tensor | None) -> None:
        """Move the statistics towards this batch's real tokens; as two matrix-vector products, which is what they cost least as."""
        rows = x_BND.reshape(-1, x_BND.shape[-1]).float()
        weight = torch.ones(len(rows), device=rows.device) if mask_BN is None else mask_BN.expand(x_BND.shape[:2]).reshape(-1).float()
        weight = weight / weight.sum().clamp(min=1.0)
        with torch.autocast(rows.device.type, enabled=False):  # a difference of squares needs float32
            mean = weight @ rows
            variance = (weight @ rows.square() - mean.square()).clamp(min=0.0)
        self.mean.lerp_(mean, self.momentum)
        self.variance.lerp_(variance, self.momentum)


def _dice(x: Tensor, mean: Tensor, scale: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x * (alpha + gate * (1 - alpha)), gate = sigma((x - mean) * scale), a cache's worth of rows at a time on a CPU: it is bound by memory, and as
    single operations every one of a dozen would read and write all of x. Also x as rows and the shift -mean * scale."""
    rows, out = x.reshape(-1, x.shape[-1]), torch.empty_like(x, memory_format=torch.contiguous_format)
    flat, shift, rest = out.view(-1, x.shape[-1]), -mean * scale, 1.0 - alpha
    for part in _cache_parts(rows):
        gate = torch.addcmul(shift, rows[part], scale).sigmoid_()
        torch.mul(rows[part], torch.addcmul(alpha, gate, rest, out=gate), out=flat[part])
    return out, rows, shift


class _Dice(torch.autograd.Function):
    """`_dice` with its gradients; mean and scale are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, alpha: Tensor) -> Tensor:
        out, rows, shift = _dice(x, mean, scale, alpha)
        ctx.save_for_backward(rows, shift, scale, alpha)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, shift, scale, alpha = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape)
        to_x, to_alpha, rest = torch.empty_like(rows), torch.zeros(rows.shape[1], dtype=torch.float32, device=rows.device), 1.0 - alpha
        slope = rest * scale
        for part in _cache_parts(rows):
            gate = torch.addcmul(shift, rows[part], scale).sigmoid_()
            torch.mul(grad[part], torch.addcmul(alpha, gate, rest), out=to_x[part])
            closed = (grad[part] * rows[part]).mul_(1.0 - gate)  # what alpha multiplies
            to_alpha += closed.sum(0, dtype=torch.float32)
            to_x[part].addcmul_(closed.mul_(gate), slope)
        return to_x.view(grads[0].shape), None, None, to_alpha.to(alpha.dtype)


def _cache_parts(rows: Tensor) -> list[slice]:
    """Slices of rows that fit a CPU's cache several times over; all at once elsewhere."""
    count = len(rows) if rows.device.type != "cpu" else max(256, 65_536 // max(1, rows.shape[1]))
    return [slice(start, start + count) for start in range(0, len(rows), max(1, count))]


def in_float32(scores: Callable[..., Any], *inputs: Tensor) -> Any:
    """`scores` of representations, outside of autocast: near the log-odds of a rare click bfloat16 has steps of .03."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return scores(*(x.float() for x in inputs))


def multi_head_attention(query_BND: Tensor, key_BMD: Tensor, value_BMD: Tensor, heads: int, mask_BM: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention with `heads` heads of width D/H, scaled by sqrt(D/H) (Eq. 9 per head), its weights dropped at random by `dropout`; returns [B, N, D]."""
    batch, tokens, width = query_BND.shape
    query, key, value = (x.reshape(x.shape[0], x.shape[1], heads, width // heads).transpose(1, 2) for x in (query_BND, key_BMD, value_BMD))
    mask = None if mask_BM is None else mask_BM[:, None, None, :]
    heads_BHNE = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return heads_BHNE.transpose(1, 2).reshape(batch, tokens, width)


@dataclass(frozen=True)
class Clusters:
    """Keys and values that queries attend to. `mask_BM` is None when every row is real (clusters always are)."""

    key_BMD: Tensor
    value_BMD: Tensor
    mask_BM: Tensor | None


def cluster_weights(x_BND: Tensor, prototypes_CD: Tensor, mask_BN: Tensor) -> Tensor:
    """S: softmax over the *tokens* of X P^T / sqrt(D), so every cluster is a convex combination of real tokens; [B, N, C].

    Our reading of the paper's learnable S in R^{N x N_c}, which could not fit a varying N.
    """
    logits = x_BND @ prototypes_CD.T / math.sqrt(x_BND.shape[-1])
    return torch.softmax(logits.masked_fill(~mask_BN.unsqueeze(-1), float("-inf")), 1)


class ClusterAttention(nn.Module):
    """Attention of every token to clusters of its own sequence: Eq. 7-14, cost O(N C D).

    With at most `exact_up_to` tokens the tokens themselves are keys and values: clusters could only blur them.
    """

    def __init__(self, width: int, clusters: int, heads: int, exact_up_to: int = 0, qkv_activation: str = "dice", dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.clusters, self.exact_up_to, self.dropout = heads, clusters, exact_up_to, dropout
        self.prototypes = nn.Parameter(torch.randn(clusters, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv_dice = Dice(3 * width) if qkv_activation == "dice" else None
        self.key_ratio = nn.Linear(clusters, 1)
        self.value_ratio = nn.Linear(clusters, 1)
        self.key_map = nn.Linear(width, width)
        self.value_map = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.out_dice = Dice(width)

    def project(self, x_BND: Tensor, mask_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K, V of Eq. 7."""
        qkv = self.qkv(x_BND)
        if self.qkv_dice is not None:
            qkv = self.qkv_dice(qkv, mask_BN)
        query, key, value = qkv.chunk(3, -1)
        return query, key, value

    def mix(self, query_BCD: Tensor, key_BCD: Tensor, value_BCD: Tensor) -> Clusters:
        """K' and V' of Eq. 12-14 from the surrogate tokens A_q, A_k, A_v of Eq. 11."""
        inner = query_BCD @ key_BCD.transpose(-1, -2) / math.sqrt(query_BCD.shape[-1])
        key_ratio, value_ratio = torch.sigmoid(self.key_ratio(inner)), torch.sigmoid(self.value_ratio(inner))
        key = key_ratio * self.key_map(query_BCD) + (1 - key_ratio) * self.key_map(key_BCD)
        value = value_ratio * self.value_map(query_BCD) + (1 - value_ratio) * self.value_map(value_BCD)
        return Clusters(key, value, None)

    def finish(self, query_BND: Tensor, clusters: Clusters, mask_BN: Tensor) -> Tensor:
        """Eq. 9-10: attention of the queries to the clusters, output projection, Dice."""
        heads = multi_head_attention(query_BND, clusters.key_BMD, clusters.value_BMD, self.heads, clusters.mask_BM, self.dropout if self.training else 0.0)
        return self.out_dice(self.out(heads), mask_BN)

    def forward(self, x_BND: Tensor, mask_BN: Tensor, only_BK: Tensor | None = None) -> Tensor:
        """[B, N, D], or [B, K, D]: what the tokens at positions `only_BK` get from all."""
        query, key, value = self.project(x_BND, mask_BN)
        if x_BND.shape[1] <= self.exact_up_to:
            clusters = Clusters(self.key_map(key), self.value_map(value), mask_BN)
        else:
            weight = cluster_weights(x_BND, self.prototypes, mask_BN).transpose(1, 2)
            clusters = self.mix(weight @ query, weight @ key, weight @ value)
        if only_BK is None:
            return self.finish(query, clusters, mask_BN)
        return self.finish(take(query, only_BK), clusters, torch.gather(mask_BN, 1, only_BK))

    def forward_chunked(self, x_BND: Tensor, mask_BN: Tensor, chunk: int) -> Tensor:
        """The same result in two passes over chunks of tokens with an online softmax; memory O(chunk), evaluation only."""
        if x_BND.shape[1] <= self.exact_up_to:
            return self.forward(x_BND, mask_BN)
        batch, _, width = x_BND.shape
        summed = x_BND.new_zeros(batch, self.clusters, 3 * width)
        total = x_BND.new_zeros(batch, self.clusters, 1)
        peak = x_BND.new_full((batch, self.clusters, 1), float("-inf"))
        for x, mask in _chunks(x_BND, mask_BN, chunk):
            logits = (x @ self.prototypes.T / math.sqrt(width)).masked_fill(~mask.unsqueeze(-1), float("-inf")).transpose(1, 2)
            new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True))
            shift = torch.where(torch.isinf(new_peak), torch.zeros_like(new_peak), new_peak)  # a chunk of padding only
            weight = torch.exp(logits - shift)
            fade = torch.exp(peak - shift)
            summed = summed * fade + weight @ torch.cat(self.project(x, mask), -1)
            total = total * fade + weight.sum(-1, keepdim=True)
            peak = new_peak
        clusters = self.mix(*(summed / total).chunk(3, -1))
        out = torch.empty_like(x_BND)
        start = 0
        for x, mask in _chunks(x_BND, mask_BN, chunk):
            out[:, start : start + x.shape[1]] = self.finish(self.project(x, mask)[0], clusters, mask)
            start += x.shape[1]
        return out


def take(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """Tokens at positions [B, K] of [B, N, D]."""
    return torch.gather(x_BND, 1, index_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def _chunks(x_BND: Tensor, mask_BN: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, x_BND.shape[1], chunk):
        yield x_BND[:, start : start + chunk], mask_BN[:, start : start + chunk]


class CrossAttention(nn.Module):
    """Queries of one sequence attend to clusters of another (MIF): K' = f_k2(A_k), V' = f_v2(A_v), own prototypes.

    Query and key projections start equal, so a candidate and a behaviour that share their place start aligned: "been
    exactly here" is then visible to target attention from the first step instead of having to be discovered.
    """

    def __init__(self, width: int, clusters: int, heads: int, exact_up_to: int = 0) -> None:
        super().__init__()
        self.heads, self.exact_up_to = heads, exact_up_to
        self.prototypes = nn.Parameter(torch.randn(clusters, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.key_map = nn.Linear(width, width)
        self.value_map = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.out_dice = Dice(width)
        with torch.no_grad():
            nn.init.orthogonal_(self.query.weight)
            self.key_value.weight[:width].copy_(self.query.weight)
            nn.init.eye_(self.key_map.weight)
            for layer in (self.query, self.key_value, self.key_map):
                layer.bias.zero_()

    def keys(self, x_BMD: Tensor, mask_BM: Tensor) -> Clusters:
        """Clusters of the attended sequence (the tokens themselves when there are few)."""
        key, value = self.key_value(x_BMD).chunk(2, -1)
        mask: Tensor | None = mask_BM
        if x_BMD.shape[1] > self.exact_up_to:
            weight = cluster_weights(x_BMD, self.prototypes, mask_BM).transpose(1, 2)
            key, value, mask = weight @ key, weight @ value, None
        return Clusters(self.key_map(key), self.value_map(value), mask)

    def forward(self, x_BND: Tensor, mask_BN: Tensor, keys: Clusters) -> Tensor:
        """[B, N, D]; where one of the two has batch 1 it serves all B of the other."""
        batch = max(len(x_BND), len(keys.key_BMD))
        keys = Clusters(*(None if part is None else part.expand(batch, *part.shape[1:]) for part in (keys.key_BMD, keys.value_BMD, keys.mask_BM)))
        mask_BN = mask_BN.expand(batch, -1)
        heads = multi_head_attention(self.query(x_BND).expand(batch, -1, -1), keys.key_BMD, keys.value_BMD, self.heads, keys.mask_BM)
        return self.out_dice(self.out(heads), mask_BN)


class FeedForward(nn.Module):
    """Second sub-layer of a block, Eq. 15: D -> factor*D -> D with ReLU."""

    def __init__(self, width: int, factor: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, factor * width), nn.Linear(factor * width, width), nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.down(self.dropout(F.relu(self.up(x_BND))))


class ClusterBlock(nn.Module):
    """One GCF layer: cluster attention and feed-forward, pre-LN with residuals. `dropout`: on attention weights, hidden units and both sub-layers."""

    def __init__(self, width: int, clusters: int, heads: int, exact_up_to: int, factor: int, qkv_activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = ClusterAttention(width, clusters, heads, exact_up_to, qkv_activation, dropout)
        self.forward_layer = FeedForward(width, factor, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor, mask_BN: Tensor, only_BK: Tensor | None = None) -> Tensor:
        change = self.attention(self.norm_attention(x_BND), mask_BN, only_BK)
        x_BND = (x_BND if only_BK is None else take(x_BND, only_BK)) + self.dropout(change)
        return x_BND + self.dropout(self.forward_layer(self.norm_forward(x_BND)))


class PointwiseBlock(nn.Module):
    """The ablation of GCF on ads: the feed-forward sub-layer alone, so no ad sees another."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.forward_layer = FeedForward(width, factor)

    def forward(self, x_BND: Tensor, mask_BN: Tensor, only_BK: Tensor | None = None) -> Tensor:
        x_BND = x_BND if only_BK is None else take(x_BND, only_BK)
        return x_BND + self.forward_layer(self.norm(x_BND))


class SelfAttentionBlock(nn.Module):
    """Ordinary self-attention over the K tokens of a page (evaluator): with so few tokens clusters are pointless."""

    def __init__(self, width: int, heads: int, factor: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.forward_layer = FeedForward(width, factor)

    def forward(self, x_BKD: Tensor, mask_BK: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm_attention(x_BKD)).chunk(3, -1)
        x_BKD = x_BKD + self.out(multi_head_attention(query, key, value, self.heads, mask_BK))
        return x_BKD + self.forward_layer(self.norm_forward(x_BKD))


class MLP(nn.Module):
    """Linear layers with ReLU between; `zero_last` starts the output at its bias, so the network starts at its prior."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], outputs: int, zero_last: bool = False) -> None:
        super().__init__()
        sizes = (inputs, *hidden, outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        if zero_last:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class SplitHead(nn.Module):
    """MLP over (h_i, e_u), Eq. 16, with the first weight split so that e_u is multiplied once per request."""

    def __init__(self, width: int, hidden: tuple[int, ...], bias: float = 0.0) -> None:
        super().__init__()
        self.item, self.user = nn.Linear(width, hidden[0]), nn.Linear(width, hidden[0], bias=False)
        self.rest = MLP(hidden[0], hidden[1:], 1)
        nn.init.constant_(self.rest.layers[-1].bias, bias)

    def forward(self, h_BND: Tensor, user_BD: Tensor) -> Tensor:
        """Logits [B, N]."""
        return self.rest(F.relu(self.item(h_BND) + self.user(user_BD).unsqueeze(1))).squeeze(-1)


def freeze_dice(module: nn.Module, frozen: bool = True) -> None:
    """Stop (or resume) the moving statistics of every Dice in `module`."""
    for layer in module.modules():
        if isinstance(layer, Dice):
            layer.frozen = frozen


def masked_bce(logit: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """Mean binary cross-entropy of the places where `mask` is true; 0 where there is none."""
    return (F.binary_cross_entropy_with_logits(logit, label, reduction="none") * mask).sum() / mask.sum().clamp(min=1)
