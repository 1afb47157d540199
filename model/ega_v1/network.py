"""EGA-V1: hybrid features, RecFormer (GCF + MIF) and AucFormer (generator, evaluator, payment network).

Shape letters: B requests, N candidate ads, L behaviours, K slots, D width, F fields. Masks are true where a token is
real. Equation numbers are the paper's. A bid is never a feature: bids enter the allocation score and the payment only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from marketplace import schema
from model.cascade.config import CascadeConfig
from model.ega_v2.config import V2Config
from model.layers import (
    MLP,
    ClusterBlock,
    Clusters,
    CrossAttention,
    FeedForward,
    PointwiseBlock,
    SelfAttentionBlock,
    SplitHead,
    freeze_dice,
    take,
)

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, config=_STRICT)
class NetworkConfig:
    """Kind, sizes and switches of the model; the paper's values are in config/paper.yaml."""

    kind: Literal["ega_v1", "mca", "fs_ltr", "ega_v2"] = "ega_v1"
    """EGA-V1; a cascade: MCA (recall, pre-ranking, ranking, auction), or the same trained on stage labels (FS-LTR); or EGA (V2)."""
    ega_v2: V2Config = V2Config()
    """What only EGA (V2) reads."""
    cascade: CascadeConfig = CascadeConfig()
    """What only the cascades read."""
    width: int = Field(64, ge=8)
    """D, width of every token."""
    embedding: int = Field(16, ge=4)
    """Width of one field's embedding before the projection to D."""
    blocks: int = Field(3, ge=1)
    """m, GCF blocks on ads and on behaviours."""
    auction_blocks: int = Field(2, ge=1)
    """m_e, blocks of the generator and of the evaluator."""
    fusion_after: tuple[int, ...] = (2, 3)
    """Blocks after which MIF exchanges ads and behaviours (paper: m=6, m_k=2 read as 3, 6); 1-based."""
    clusters: int = Field(32, ge=2)
    """C, clusters of a sequence (paper: N_c)."""
    exact_behaviours: int = Field(129, ge=0)
    """Behaviour sequences of at most this many tokens are attended exactly instead of through clusters."""
    heads: int = Field(4, ge=1)
    """H, attention heads."""
    feed_forward: int = Field(4, ge=1)
    """Hidden width of a feed-forward layer in units of D (Appendix A.1 implies 4)."""
    head_hidden: tuple[int, ...] = (128, 32)
    """Hidden layers of the pCTR and pCVR heads."""
    slots: int = Field(5, ge=1, le=50)
    """K, ads on a page."""
    qkv_activation: Literal["dice", "none"] = "dice"
    """Dice on Q, K, V before the split (paper), or none."""
    affinity: Literal["additive", "multiplicative", "both"] = "both"
    """What the generator may add to the separable score: A (paper), e^M as a factor, or both."""
    examination: bool = True
    """Beyond the paper: what each ad leaves of the reader's attention for the ads below, as a term of the evaluator's logits."""
    cross_features: bool = False
    """Explicit user x ad crosses (visited-before, category count, distance) in the heads, for Table 3."""
    gcf_on_ads: bool = True
    """Cluster attention among ads; false: point-wise ads (ablation -gcf)."""
    fusion: Literal["mid", "late", "din"] = "mid"
    """MIF inside the blocks; one exchange after the last; or DIN target attention to raw behaviours (ablation -mif)."""
    target_attention: bool = True
    """Ads attend to behaviours (TA)."""
    context_attention: bool = True
    """Behaviours attend to ads (CA)."""
    payment_inputs: Literal["aware", "literal"] = "aware"
    """Payment network reads the own bid and the critical price, or only Eq. 19's inputs."""
    payment_form: Literal["critical", "rate"] = "critical"
    """Payment = critical price * (1 + delta), or bid * rate; both clipped to [reserve, bid]. `literal` implies rate."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.fusion == "mid" and not (self.fusion_after and all(1 <= block <= self.blocks for block in self.fusion_after)):
            raise ValueError(f"fusion_after {self.fusion_after} must name blocks within 1..{self.blocks}; for no mid-fusion set fusion: late or din")
        if not self.head_hidden or min(self.head_hidden) < 1:
            raise ValueError(f"head_hidden {self.head_hidden} must name at least one hidden width, each above 0")
        if self.payment_inputs == "literal" and self.payment_form != "rate":
            raise ValueError("payment_inputs: literal has no critical price to scale; set payment_form: rate")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class VocabularySizes:
    """Rows of each shared embedding table, padding and unknown included."""

    ad: int
    poi: int
    advertiser: int
    category: int
    geo: int
    creative: int

    def rows(self, field: schema.Encoded) -> int:
        return getattr(self, field.vocabulary) if field.vocabulary else field.size + schema.FIRST_CODE


SHARED_TABLES = ("poi", "category", "geo")
"""Id tables that ads and behaviours (and, for geo, users) share: what makes "been here before" comparable."""


def geo_prior(places_V2: np.ndarray, width: int, generator: torch.Generator) -> Tensor:
    """Starting values of the geo table, [V, width]: random Fourier features of each cell's centre.

    Cells a kilometre apart start alike, cells ten kilometres apart start unrelated (an RBF kernel in the dot product), so
    distance is learnable from cell ids alone; training then moves every row freely. Rows with NaN places stay random.
    """
    places = torch.tensor(np.asarray(places_V2, np.float64))
    known = torch.isfinite(places).all(1)
    centre = places[known].mean(0) if bool(known.any()) else torch.zeros(2, dtype=torch.float64)
    north = (places[:, 0] - centre[0]) * 111.2
    east = (places[:, 1] - centre[1]) * 111.2 * math.cos(math.radians(float(centre[0])))
    kilometres = torch.nan_to_num(torch.stack([north, east], 1)).float()
    half = width // 2
    scale = torch.cat([torch.full((half // 2,), 1.5), torch.full((half - half // 2,), 6.0)])
    phase = kilometres @ (torch.randn(2, half, generator=generator) / scale)
    wave = torch.cat([torch.sin(phase), torch.cos(phase)], 1)
    if wave.shape[1] < width:
        wave = F.pad(wave, (0, width - wave.shape[1]))
    noise = torch.randn(len(places), width, generator=generator)
    return torch.where(known.unsqueeze(1), wave * math.sqrt(2), noise)


class HybridFeatures(nn.Module):
    """Eq. 5-6: one embedding table a field, concatenated, one linear to D. Written as a sum of per-field linears.

    POI, category and geo tables are shared by ads, users and behaviours, and their projections start equal on both sides.
    """

    def __init__(self, config: NetworkConfig, sizes: VocabularySizes, geo_table: Tensor | None = None) -> None:
        super().__init__()
        width = config.embedding
        self.tables = nn.ModuleDict({name: nn.Embedding(getattr(sizes, name), width) for name in schema.VOCABULARIES})
        if geo_table is not None:
            with torch.no_grad():
                self.tables["geo"].weight.copy_(geo_table)
        self.ad_codes = self._codes(schema.AD_FIELDS, sizes, width)
        self.user_codes = self._codes((*schema.USER_FIELDS, *schema.CONTEXT_FIELDS), sizes, width)
        self.behaviour_codes = self._codes(schema.BEHAVIOUR_FIELDS, sizes, width)
        for table in [*self.tables.values(), *self.ad_codes.values(), *self.user_codes.values(), *self.behaviour_codes.values()]:
            with torch.no_grad():
                table.weight[schema.PADDING].zero_()
        self.ad_linear = nn.Linear(width * len(schema.AD_FIELDS), config.width)
        self.behaviour_linear = nn.Linear(width * len(schema.BEHAVIOUR_FIELDS), config.width)
        self.user_linear = nn.Linear(width * (len(schema.USER_FIELDS) + len(schema.CONTEXT_FIELDS)), config.width)
        self.context_linear = nn.Linear(config.width, config.width)
        with torch.no_grad():
            for name in SHARED_TABLES:
                ad = [field.name for field in schema.AD_FIELDS].index(name) * width
                behaviour = [field.name for field in schema.BEHAVIOUR_FIELDS].index(name) * width
                self.behaviour_linear.weight[:, behaviour : behaviour + width].copy_(self.ad_linear.weight[:, ad : ad + width])

    @staticmethod
    def _codes(fields: tuple[schema.Encoded, ...], sizes: VocabularySizes, width: int) -> nn.ModuleDict:
        return nn.ModuleDict({field.name: nn.Embedding(sizes.rows(field), width) for field in fields if not field.vocabulary})

    def _embed(self, values: Tensor, fields: tuple[schema.Encoded, ...], codes: nn.ModuleDict) -> Tensor:
        columns = [
            (self.tables[field.vocabulary] if field.vocabulary else codes[field.name])(values[..., i]) for i, field in enumerate(fields)
        ]
        return torch.cat(columns, -1)

    def ads(self, ad_fields: Tensor) -> Tensor:
        """E_ad of Eq. 6: [..., F_ad] -> [..., D]."""
        return self.ad_linear(self._embed(ad_fields, schema.AD_FIELDS, self.ad_codes))

    def user(self, user_fields: Tensor, context_fields: Tensor) -> Tensor:
        """e_u: profile and context, [B, F_user], [B, F_context] -> [B, D]."""
        fields = (*schema.USER_FIELDS, *schema.CONTEXT_FIELDS)
        values = torch.cat([user_fields, context_fields], -1)

        return self.user_linear(self._embed(values, fields, self.user_codes))

    def behaviours(self, behaviours_BLF: Tensor, user_BD: Tensor) -> tuple[Tensor, Tensor]:
        """E_bhor with the request's own context as first token, [B, 1+L, D], and its mask.

        The context token tells target attention where and when the user is now, and a user without history still has one
        token to attend to.
        """
        tokens = self.behaviour_linear(self._embed(behaviours_BLF, schema.BEHAVIOUR_FIELDS, self.behaviour_codes))
        tokens = torch.cat([self.context_linear(user_BD).unsqueeze(1), tokens], 1)
        mask = torch.cat([torch.ones_like(behaviours_BLF[:, :1, 0], dtype=torch.bool), behaviours_BLF[..., 0] != schema.PADDING], 1)
        return tokens, mask


class RecFormer(nn.Module):
    """GCF blocks on ads and on behaviours with mid-fusion between them (Eq. 7-15, Sec. 3.3)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        size = (config.width, config.clusters, config.heads)
        tail = (config.feed_forward, config.qkv_activation)
        self.ad_blocks = nn.ModuleList(
            ClusterBlock(*size, 0, *tail) if config.gcf_on_ads else PointwiseBlock(config.width, config.feed_forward)
            for _ in range(config.blocks)
        )
        behaviour_blocks = 0 if config.fusion == "din" else config.blocks
        self.behaviour_blocks = nn.ModuleList(ClusterBlock(*size, config.exact_behaviours, *tail) for _ in range(behaviour_blocks))
        self.fusions = {"mid": tuple(sorted(set(config.fusion_after))), "late": (config.blocks,), "din": (config.blocks,)}[config.fusion]
        self.target = nn.ModuleDict()
        self.context = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        for position, block in enumerate(self.fusions):
            last = position == len(self.fusions) - 1
            if config.target_attention:
                self.target[str(block)] = CrossAttention(*size, config.exact_behaviours)
            # The behaviours' last update would be read by nobody: context attention after the final fusion is not built.
            if config.context_attention and config.fusion == "mid" and not last:
                self.context[str(block)] = CrossAttention(*size)
            self.norms[str(block)] = nn.ModuleList([nn.LayerNorm(config.width), nn.LayerNorm(config.width)])
        self.norm = nn.LayerNorm(config.width)

    def ads_before_fusion(self, ad_BND: Tensor, ad_mask_BN: Tensor) -> Tensor:
        """Ad states up to the first fusion: they depend on no user and can be computed once per city."""
        for block in self.ad_blocks[: self.fusions[0]]:
            ad_BND = block(ad_BND, ad_mask_BN)
        return ad_BND

    def after_fusion(
        self, ad_BND: Tensor, ad_mask_BN: Tensor, behaviour_BLD: Tensor, behaviour_mask_BL: Tensor, only_BK: Tensor | None = None
    ) -> Tensor:
        """From the states of `ads_before_fusion` (batch of one city or of B requests) to H_ad, [B, N, D].

        With `only_BK` [B, K], positions of ads, just their rows of H_ad: all ads are seen, but what nobody reads of the last
        block and of the last fusion is not computed.
        """
        first = self.fusions[0]
        for block in self.behaviour_blocks[:first]:
            behaviour_BLD = block(behaviour_BLD, behaviour_mask_BL)
        for number in range(first, self.config.blocks + 1):
            if number == self.config.blocks and only_BK is not None:
                if number > first:
                    ad_BND = self.ad_blocks[number - 1](ad_BND, ad_mask_BN, only_BK)
                else:
                    ad_BND = take(ad_BND.expand(len(only_BK), -1, -1), only_BK)
                ad_mask_BN = torch.gather(ad_mask_BN.expand(len(only_BK), -1), 1, only_BK)
            elif number > first:
                ad_BND = self.ad_blocks[number - 1](ad_BND, ad_mask_BN)
            if number > first and self.behaviour_blocks:
                behaviour_BLD = self.behaviour_blocks[number - 1](behaviour_BLD, behaviour_mask_BL)
            if number in self.fusions:
                ad_BND, behaviour_BLD = self._fuse(str(number), ad_BND, ad_mask_BN, behaviour_BLD, behaviour_mask_BL)
                ad_mask_BN = ad_mask_BN.expand(len(ad_BND), -1)
        return self.norm(ad_BND)

    def _fuse(self, key: str, ad_BND: Tensor, ad_mask: Tensor, behaviour_BLD: Tensor, behaviour_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both directions from the pre-fusion states. At the first fusion the ads may still be one city for all requests (batch 1):
        what depends on the ads alone is then computed once."""
        ad_norm, behaviour_norm = self.norms[key]
        ads, behaviours = ad_norm(ad_BND), behaviour_norm(behaviour_BLD)
        if key in self.target:
            target = self.target[key]
            ad_BND = ad_BND + target(ads, ad_mask, target.keys(behaviours, behaviour_mask))
        ad_BND = ad_BND.expand(len(behaviour_BLD), -1, -1)
        if key in self.context:
            context = self.context[key]
            behaviour_BLD = behaviour_BLD + context(behaviours, behaviour_mask, context.keys(ads, ad_mask))
        return ad_BND, behaviour_BLD

    def forward(self, ad_BND: Tensor, ad_mask_BN: Tensor, behaviour_BLD: Tensor, behaviour_mask_BL: Tensor) -> Tensor:
        return self.after_fusion(self.ads_before_fusion(ad_BND, ad_mask_BN), ad_mask_BN, behaviour_BLD, behaviour_mask_BL)


AD_COLUMNS, BEHAVIOUR_COLUMNS = ([field.name for field in fields] for fields in (schema.AD_FIELDS, schema.BEHAVIOUR_FIELDS))
PAGE_CODES = ("ad", "category")
"""Ad fields, all ids with a vocabulary, that an evaluator reads beside h."""
PAGE_COLUMNS = [AD_COLUMNS.index(name) for name in PAGE_CODES]
CROSS_FEATURES = 3
"""Visited-before count, category count, distance; each as one standardised number per (request, ad)."""


def cross_features(ad_fields: Tensor, behaviours: Tensor, ad_place: Tensor, request_place: Tensor) -> Tensor:
    """Explicit crosses [B, N, 3]: log(1+times visited), log(1+visits to the category), log(1+distance in km).

    Clicks on ads are no visits: they pile up while the logs grow, and with them a count would rise from day to day.
    """
    poi, category = (AD_COLUMNS.index(name) for name in ("poi", "category"))
    visit = behaviours[..., BEHAVIOUR_COLUMNS.index("action")] == schema.ACTION_VISIT + schema.FIRST_CODE

    def count(name: str, column: int) -> Tensor:
        """Visits [B, N] with the ad's id; N log L instead of N L comparisons."""
        visited = torch.where(visit, behaviours[..., BEHAVIOUR_COLUMNS.index(name)], -1).sort(-1).values
        ids = ad_fields[..., column].contiguous()
        return torch.searchsorted(visited, ids, right=True) - torch.searchsorted(visited, ids)

    visited, same = count("poi", poi), count("category", category)
    north = (ad_place[..., 0] - request_place[:, None, 0]) * 111.2
    east = (ad_place[..., 1] - request_place[:, None, 1]) * 111.2 * torch.cos(torch.deg2rad(request_place[:, None, 0]))
    return torch.stack([torch.log1p(visited.float()), torch.log1p(same.float()) / 2, torch.log1p(torch.hypot(north, east)) / 2], -1)


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class Generator(nn.Module):
    """Non-autoregressive generator (Eq. 17): slot tokens read the ads' clusters and give affinities A and log-factors M.

    score_{i,k} = e^{w + M_{i,k}} q_i b_i + A_{i,k}. A and M start at 0: an untrained generator ranks by q*b.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.affinity = config.affinity
        self.slot = nn.Parameter(torch.randn(config.slots, width))
        self.user = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [nn.LayerNorm(width), CrossAttention(width, config.clusters, config.heads), nn.LayerNorm(width), FeedForward(width, config.feed_forward)]
            )
            for _ in range(config.auction_blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.add = nn.Linear(width, width)
        self.scale = nn.Linear(width, width)
        _zero(self.add)
        _zero(self.scale)
        self.bid_log_weight = nn.Parameter(torch.tensor(4.0))
        """w; with q*b around 0.1 the softmax over ads is then neither flat nor one-hot."""

    def clusters(self, h_BND: Tensor, mask_BN: Tensor) -> list[Clusters]:
        """What the slot tokens attend to in each block: clusters of the ads."""
        return [attention.keys(h_BND, mask_BN) for _, attention, _, _ in self.blocks]

    def slot_tokens(self, user_BD: Tensor, clusters: list[Clusters]) -> Tensor:
        """T: [B, K, D]."""
        token = self.slot.unsqueeze(0) + self.user(user_BD).unsqueeze(1)
        mask = torch.ones(token.shape[:2], dtype=torch.bool, device=token.device)
        for (norm_attention, attention, norm_forward, forward), keys in zip(self.blocks, clusters, strict=True):
            token = token + attention(norm_attention(token), mask, keys)
            token = token + forward(norm_forward(token))
        return self.norm(token)

    def weight(self) -> Tensor:
        """w clamped to [-5, 5]."""
        return self.bid_log_weight.clamp(-5.0, 5.0)

    def forward(self, h_BND: Tensor, mask_BN: Tensor, user_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Affinity A [B, N, K] and slopes e^{w+M} [B, N, K]; neither reads a bid."""
        token = self.slot_tokens(user_BD, self.clusters(h_BND, mask_BN))
        root = math.sqrt(h_BND.shape[-1])
        return self.combine(h_BND @ self.add(token).transpose(1, 2) / root, h_BND @ self.scale(token).transpose(1, 2) / root)

    def combine(self, affinity: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """A and e^{w+M} from the products with the slot tokens, by the configured form."""
        if self.affinity == "additive":
            factor = torch.zeros_like(factor)
        elif self.affinity == "multiplicative":
            affinity = torch.zeros_like(affinity)
        # Slopes stay within e^+-3 of e^w: the identity holds for any slope, but prices divide by it.
        return affinity, torch.exp(self.weight() + 3.0 * torch.tanh(factor / 3.0))


class Evaluator(nn.Module):
    """Permutation-aware evaluator (Eq. 18): pCTR and pCVR of every ad of a page, given the page.

    Reads h_i, and without `examination` e_u and the slot, through self-attention over the K ads and starts at the set-aware logits: it
    learns what the page adds. Never reads a bid.

    Beyond the paper (`examination`): logit_k also gains sum_{j<k} g_j, g < 0, because people read from the top and what an
    ad leaves of their attention is shared by all ads below (as in cascade and dynamic Bayesian click models). g has a number of
    its own for every ad and every category beside a linear reading of h: h was trained to say who clicks an ad, not what an ad
    does to its neighbours. Attention alone finds the same in principle, but from ten thousand clicks it learns noise that
    stage 3 then exploits, so beside this term it is damped and does not read the slot: attention says what the company does, g what
    the order does (docs/model.md). g < 0 keeps the order's part falling down the page, which truthful prices need. Nor does it read
    e_u: h knows the user, and e_u holds the weekday, from which it learned to add or take some per cent on whole days.
    """

    EXAMINATION_GAIN, EXAMINATION_START = 40.0, -1.5
    """g = -softplus(gain * (linear + ad + category) + start). Adam moves a weight by about the learning rate a step, and g has
    further to go than that allows; it starts at -0.2 for every ad."""
    ATTENTION_DAMPING = 0.25
    """Factor on what attention adds, and so on its learning rate, where the examination term is there to explain the page."""

    def __init__(self, config: NetworkConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        width = config.width
        self.slot = None if config.examination else nn.Embedding(config.slots, width)
        self.join = nn.Linear((1 if config.examination else 3) * width, width)
        self.blocks = nn.ModuleList(SelfAttentionBlock(width, config.heads, config.feed_forward) for _ in range(config.auction_blocks))
        self.norm = nn.LayerNorm(width)
        self.click = MLP(width, config.head_hidden, 1, zero_last=True)
        self.purchase = MLP(width, config.head_hidden, 1, zero_last=True)
        self.level = nn.Parameter(torch.zeros(()))
        """Added to every click and purchase logit, times the gain: the level that falls with the slots starts higher in the first."""
        self.examination = nn.Linear(width, 1, bias=False) if config.examination else None
        self.examination_tables = nn.ModuleDict({name: nn.Embedding(getattr(sizes, name), 1) for name in PAGE_CODES} if config.examination else {})
        for module in (self.examination, *self.examination_tables.values()):
            if module is not None:
                nn.init.zeros_(module.weight)

    def forward(
        self, h_BKD: Tensor, codes_BK2: Tensor, user_BD: Tensor, click_logit_BK: Tensor, purchase_logit_BK: Tensor, mask_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of pCTR and pCVR, [B, K] each; codes are the PAGE_CODES of the ads."""
        slots = h_BKD.shape[1]
        h_BKD = F.layer_norm(h_BKD, h_BKD.shape[-1:])  # explicit crosses are added behind RecFormer's own norm and can be large
        parts = [h_BKD]
        if self.slot is not None:
            parts += [user_BD.unsqueeze(1).expand(-1, slots, -1), self.slot(torch.arange(slots, device=h_BKD.device)).expand(h_BKD.shape[0], -1, -1)]
        x = self.join(torch.cat(parts, -1))
        # A page shorter than K leaves masked tokens; a row without any ad attends to itself and is ignored by the caller.
        attend = mask_BK | ~mask_BK.any(1, keepdim=True)
        for block in self.blocks:
            x = block(x, attend)
        x = self.norm(x)
        page = self.EXAMINATION_GAIN * self.level + self.attention_left(h_BKD, codes_BK2, mask_BK)
        damping = 1.0 if self.examination is None else self.ATTENTION_DAMPING
        return click_logit_BK + damping * self.click(x).squeeze(-1) + page, purchase_logit_BK + damping * self.purchase(x).squeeze(-1) + page

    def attention_left(self, h_BKD: Tensor, codes_BK2: Tensor, mask_BK: Tensor) -> Tensor:
        """sum_{j<k} g_j: what the ads above leave of the attention for slot k, in logits; [B, K], 0 in the first slot. h is normalised."""
        if self.examination is None:
            return torch.zeros_like(h_BKD[..., 0])
        own = self.examination(h_BKD).squeeze(-1)
        for column, name in enumerate(PAGE_CODES):
            own = own + self.examination_tables[name](codes_BK2[..., column]).squeeze(-1)
        left = -F.softplus(self.EXAMINATION_GAIN * own + self.EXAMINATION_START) * mask_BK
        # Term by term, because a GPU's cumsum is not deterministic. A sum of what is <= 0: it cannot rise, not even by rounding.
        summed = torch.stack(list(accumulate(left.double().unbind(1))), 1).to(left.dtype)
        return F.pad(summed[:, :-1], (1, 0))

    def examination_prior(self, deviation: float) -> Tensor:
        """-log of a Gaussian prior with this standard deviation (in logits) on every weight of g, up to a constant."""
        if self.examination is None:
            return self.level.new_zeros(())
        weights = [self.examination.weight, *(table.weight for table in self.examination_tables.values())]
        squares = torch.stack([(self.EXAMINATION_GAIN * weight).square().sum() for weight in weights])
        return squares.sum() / (2 * deviation**2)


class PaymentNetwork(nn.Module):
    """Payment of every winner (Eq. 19); individually rational by construction: reserve <= p <= b.

    `literal` reads (h, q, bids of the others on the page); `aware` adds the own bid, the score margin and the critical price.
    Money enters as log1p of bids over the city's median bid.
    """

    MARKUP_RANGE = 0.5

    def __init__(self, config: NetworkConfig, initial_markup: float = 0.2) -> None:
        super().__init__()
        self.inputs, self.form = config.payment_inputs, config.payment_form
        self.reduce = nn.Linear(config.width, 16)
        extra = 3 if self.inputs == "aware" else 0
        self.mlp = MLP(16 + 1 + (config.slots - 1) + extra, config.head_hidden, 1, zero_last=True)
        if self.form == "critical":
            # Starts above the truthful price, where revenue is; the regret constraint has to bring it down.
            nn.init.constant_(self.mlp.layers[-1].bias, math.atanh(initial_markup / self.MARKUP_RANGE))

    def forward(self, h: Tensor, ctr: Tensor, others: Tensor, bid: Tensor, critical: Tensor, margin: Tensor, reserve: Tensor) -> Tensor:
        """Payments per click [...] in the units of `bid`; h [..., D], others [..., K-1] bids of the page's other ads in page order.

        Rows without an ad have bid 0 and pay 0.
        """
        columns = [self.reduce(h), ctr.unsqueeze(-1), torch.log1p(others)]
        if self.inputs == "aware":
            columns.append(torch.stack([torch.log1p(bid), torch.log1p(critical), torch.log1p(margin)], -1))
        g = self.mlp(torch.cat(columns, -1)).squeeze(-1)
        price = critical * (1.0 + self.MARKUP_RANGE * torch.tanh(g)) if self.form == "critical" else bid * torch.sigmoid(g)
        return torch.minimum(torch.maximum(price, reserve), bid)


@dataclass(config=ConfigDict(arbitrary_types_allowed=True))
class Batch:
    """Tensors of B requests; see schema.SAMPLE_ARRAYS for the meaning of each. Ads may have batch size 1 (one city)."""

    ad_fields: Tensor
    ad_mask: Tensor
    ad_place: Tensor
    user_fields: Tensor
    context_fields: Tensor
    behaviours: Tensor
    request_place: Tensor


class RankingModel(nn.Module, ABC):
    """What every kind of model offers to training, replay and serving: click probabilities, evaluators, and which ads it ranked.

    A kind adds `encode`, `encode_from`, `city_states`, `survey` and `stage_modules`. Training and replay ask for nothing else.
    """

    generator: Generator | None
    """Affinities; None ranks by q*b."""
    payment: PaymentNetwork | None
    """Learned prices; None has none."""
    evaluator: nn.Module
    """pCTR of ads on a page, which prices rest on."""
    evaluation_evaluator: Evaluator
    """Trained on other days with another seed; never a training signal of the policy, so that gates can use it."""

    def __init__(self, config: NetworkConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes

    def add_heads(self, prior_ctr: float) -> None:
        """The parts that read h; `prior_ctr` is where pCTR starts."""
        config, prior = self.config, math.log(prior_ctr / (1 - prior_ctr))
        self.click_head = SplitHead(config.width, config.head_hidden, prior)
        self.purchase_head = SplitHead(config.width, config.head_hidden, prior)
        self.cross = nn.Linear(CROSS_FEATURES, config.width) if config.cross_features else None
        self.unexposed = nn.Parameter(torch.zeros(2, 4))
        self.slot_bias = nn.Parameter(torch.zeros(config.slots))
        self.register_buffer("unexposed_start", torch.zeros(2))
        self.register_buffer("unexposed_knee", torch.tensor(prior + 1.0))

    def encode(self, batch: Batch, only_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """High-order ad representations h [B, N, D], or those at positions `only_BK` alone [B, K, D], and e_u [B, D]."""
        return self.encode_from(self.city_states(batch.ad_fields, batch.ad_mask), batch, only_BK)

    @abstractmethod
    def encode_from(self, ad_states: Tensor, batch: Batch, only_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`encode` from cached ad states (`city_states`), which may have batch size 1."""

    @abstractmethod
    def city_states(self, ad_fields: Tensor, ad_mask: Tensor) -> Tensor:
        """User-independent ad states of a whole city, [1, N, .]: computed once per (model, city, snapshot)."""

    @property
    def state_width(self) -> int:
        """Width of `city_states`."""
        return self.config.width

    @abstractmethod
    def survey(self, ad_states: Tensor, batch: Batch, also_BK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, N, D] and e_u of a whole city, and [B, N] which ads reach the auction. h of others is 0, but for those at `also_BK`."""

    @abstractmethod
    def stage_modules(self, stage: str) -> list[nn.Module]:
        """What a training stage learns."""

    def add_crosses(self, h_BND: Tensor, batch: Batch, only_BK: Tensor | None) -> Tensor:
        """h with the explicit user x ad crosses, where the configuration has them."""
        if self.cross is None:
            return h_BND
        ad_fields, ad_place = (x.expand(h_BND.shape[0], -1, -1) for x in (batch.ad_fields, batch.ad_place))
        if only_BK is not None:
            ad_fields, ad_place = take(ad_fields, only_BK), take(ad_place, only_BK)
        return h_BND + self.cross(cross_features(ad_fields, batch.behaviours, ad_place, batch.request_place))

    def heads(self, h_BND: Tensor, user_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Set-aware logits of click and purchase (Eq. 16), [B, N] each."""
        return self.click_head(h_BND, user_BD), self.purchase_head(h_BND, user_BD)

    UNEXPOSED_GAIN = 10.0
    """Adam moves a weight by about the learning rate a step; these scalars (and `slot_bias`) have further to go than that allows."""

    def slot_logits(self) -> Tensor:
        """[K] what the slot of an exposed ad adds to its log-odds of a click, mean 0.

        Learned in pre-training, and read by its calibration, by a cascade's evaluator and where separable clicks are wanted: what is shown first is clicked more because it is shown first, and
        without this term q would credit that to the ads that the logging policy likes. q is then the pCTR in an average slot;
        what a slot is worth on a given page is the evaluator's to say.
        """
        return self.UNEXPOSED_GAIN * (self.slot_bias - self.slot_bias.mean())

    def unexposed_logits(self, logit: Tensor, task: int) -> Tensor:
        """Log-odds of "clicked or visited elsewhere in the session" from those of "clicked when shown"; task 0 click, 1 purchase.

        An increasing convex curve, learned: level + a*z + d*softplus(z - z0). A habit makes a visit far more likely than it
        makes a click, so one probability for both would promise clicks that never come.
        """
        slope, level, bend, knee = self.UNEXPOSED_GAIN * self.unexposed[task]
        return slope.exp() * logit + self.unexposed_start[task] + level + bend.exp() * F.softplus(logit - self.unexposed_knee + knee)

    @torch.no_grad()
    def scale_clicks(self, slope: float, level: float) -> None:
        """Multiply every click logit by `slope` and add `level`. What was learned of unexposed ads (`unexposed_logits`) has done its work then."""
        last = self.click_head.rest.layers[-1]
        last.weight.mul_(slope)
        last.bias.mul_(slope).add_(level)

    def enter_stage(self, stage: str) -> list[nn.Parameter]:
        """Freeze all but the stage's parameters; returns those. Dice statistics move where their own layers learn and never again."""
        self.requires_grad_(False)
        modules = self.stage_modules(stage)
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if stage == "pretrain":
            parameters += [self.unexposed, self.slot_bias]
        for parameter in parameters:
            parameter.requires_grad_(True)
        freeze_dice(self, True)
        if stage in DICE_STAGES:
            for module in modules:
                freeze_dice(module, False)
        return parameters


DICE_STAGES = ("recall", "prerank", "pretrain", "relabel")
"""Stages that learn representations; what comes after them reads frozen ones."""


class EgaV1(RankingModel):
    """The whole network. `encode` gives (h, e_u); heads, generator, evaluators and payment read those."""

    generator: Generator
    payment: PaymentNetwork
    evaluator: Evaluator

    def __init__(self, config: NetworkConfig, sizes: VocabularySizes, geo_table: Tensor | None = None, prior_ctr: float = 0.05) -> None:
        super().__init__(config, sizes)
        self.features = HybridFeatures(config, sizes, geo_table)
        self.recformer = RecFormer(config)
        self.add_heads(prior_ctr)
        self.generator = Generator(config)
        self.evaluator = Evaluator(config, sizes)
        self.evaluation_evaluator = Evaluator(config, sizes)
        self.payment = PaymentNetwork(config)

    def encode_from(self, ad_states: Tensor, batch: Batch, only_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        user = self.features.user(batch.user_fields, batch.context_fields)
        behaviours, mask = self.features.behaviours(batch.behaviours, user)
        h = self.recformer.after_fusion(ad_states, batch.ad_mask, behaviours, mask, only_BK)
        return self.add_crosses(h, batch, only_BK), user

    def city_states(self, ad_fields: Tensor, ad_mask: Tensor) -> Tensor:
        """[1, N, D], up to the first fusion."""
        return self.recformer.ads_before_fusion(self.features.ads(ad_fields), ad_mask)

    def survey(self, ad_states: Tensor, batch: Batch, also_BK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Every ad of the city reaches the auction."""
        h, user = self.encode_from(ad_states, batch)
        return h, user, batch.ad_mask.expand(len(h), -1)

    def stage_modules(self, stage: str) -> list[nn.Module]:
        return {
            "pretrain": [self.features, self.recformer, self.click_head, self.purchase_head, *([self.cross] if self.cross is not None else [])],
            "reward": [self.evaluator],
            "evaluation": [self.evaluation_evaluator],
            "rlaf": [self.generator],
            "payment": [self.payment],
        }[stage]


def allocation_scores(ctr_BN: Tensor, bid_BN: Tensor, affinity_BNK: Tensor, slopes_BNK: Tensor) -> Tensor:
    """Score of every ad for every slot, Eq. 17 before the softmax, with bids over the city's median; [B, N, K].

    Non-decreasing in the own bid for every slot, whatever the learned affinity and slopes: that is what prices rest on.
    """
    return slopes_BNK * (ctr_BN * bid_BN).unsqueeze(-1) + affinity_BNK


__all__ = ["Batch", "Clusters", "EgaV1", "Evaluator", "Generator", "NetworkConfig", "PaymentNetwork", "RankingModel", "RecFormer", "VocabularySizes", "allocation_scores", "geo_prior"]
