"""EGA (V2): encoder of behaviours, POI decoder, multi-token-prediction creative decoder, reward model and payment network.

P(page | S) = product over slots of P(poi | S, pois before) P(creative | poi, S). Both factors are products over codes. A bid is a feature
of the payment network alone: it enters generation as a code's weight in the search (model/ega_v2/beam.py).
Shape letters: B requests, L behaviours, K slots, C codes of a POI, E codes of a creative, W codes a layer, D width, R beams, T tokens.
Equation numbers are V2's (arXiv 2505.17549v3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from model.layers import MLP, FeedForward

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

NONE = -1
"""Stands for a code that is not there: a behaviour or organic item without creative, an empty slot, padding."""


@config_dataclass(frozen=True, config=_STRICT)
class NetworkConfig:
    """Sizes of EGA (V2)."""

    width: int = Field(64, ge=8)
    """D, width of every token."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    encoder_blocks: int = Field(3, ge=1)
    """Blocks of the encoder (paper: 3)."""
    decoder_blocks: int = Field(3, ge=1)
    """Blocks of the POI decoder (paper: 3)."""
    multi_token: bool = True
    """Creatives have a decoder of their own (multi-token prediction, as in DeepSeek-V3); false: their codes stand among those of the POIs in one sequence (ablation)."""
    creative_blocks: int = Field(1, ge=1)
    """Blocks of the creative decoder: one, as in multi-token prediction."""
    feed_forward: int = Field(4, ge=1)
    """Hidden width of a feed-forward layer in units of D."""
    behaviours: int = Field(256, ge=1)
    """L, newest behaviours that are read (paper: 256); every request is padded to as many."""
    slots: int = Field(10, ge=1, le=50)
    """K, longest page (paper: 10)."""
    reward_blocks: int = Field(2, ge=1)
    """Blocks of the reward model."""
    tower_hidden: tuple[int, ...] = (128, 32, 10)
    """Hidden layers of the reward towers and of the payment network (paper: 128, 32, 10)."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if not self.tower_hidden or min(self.tower_hidden) < 1:
            raise ValueError(f"tower_hidden {self.tower_hidden} must name at least one hidden width, each above 0")


@config_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TokenSizes:
    """What the tokens of a catalogue and of its logs look like; comes with the data."""

    poi_layers: int
    """C (paper: 3)."""
    poi_codes: int
    """W of POIs (paper: 1024)."""
    creative_layers: int
    """E (paper: 3)."""
    creative_codes: int
    """W of creatives."""
    behaviour_fields: tuple[int, ...] = ()
    """Number of values of each categorical field of a behaviour; value 0 is padding."""
    user_fields: tuple[int, ...] = ()
    """The same of user and context."""
    poi_features: int = 0
    """Numeric features of a POI that the reward model reads beside its codes: items of one tuple differ."""
    creative_features: int = 0
    """The same of a creative."""


@dataclass(frozen=True)
class History:
    """What is known of B users when they ask. Behaviours are newest last; padding has POI codes -1 and may lie anywhere."""

    poi: Tensor
    """[B, L', C] POI codes."""
    creative: Tensor
    """[B, L', E] codes of the creative that was seen, -1: none."""
    fields: Tensor
    """[B, L', F] categorical fields of the behaviour."""
    user: Tensor
    """[B, F] categorical fields of user and context."""

    def rows(self, part: slice) -> History:
        """Some of the requests."""
        return History(self.poi[part], self.creative[part], self.fields[part], self.user[part])


@dataclass(frozen=True)
class Memory:
    """What the encoder made of a history: the first token is user and context."""

    token: Tensor
    """[B, 1 + L, D]"""
    mask: Tensor
    """[B, 1 + L]"""

    @property
    def bias(self) -> Tensor:
        """[B, 1 + L] what attention adds to its logits: 0, or -inf where there is no token."""
        return torch.where(self.mask, self.token.new_zeros(()), -torch.inf)


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """[B, T, D] to [B, H, T, D / H]."""
    return x_BTD.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head softmax attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None, causal: bool = False) -> Tensor:
        """[B, T, D]; tokens read those where the mask is true, or with `causal` those before and themselves."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x_BTD).chunk(3, -1))
        mask = None if mask_BT is None else mask_BT[:, None, None, :]
        return self.out(F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal).transpose(1, 2).flatten(2))

    def step(self, x_XD: Tensor, past_TXE: Tensor, at: int) -> Tensor:
        """The token at place `at` of X sequences, [X, D]; `past_TXE` [T, X, 2 D] holds keys and values and gains this token's."""
        rows, width = x_XD.shape
        query, new = self.qkv(x_XD).split((width, 2 * width), -1)
        past_TXE[at] = new
        key, value = past_TXE[: at + 1].view(at + 1, rows, 2, self.heads, -1).permute(2, 1, 3, 0, 4)
        return self.out(F.scaled_dot_product_attention(query.view(rows, self.heads, 1, -1), key, value).view(rows, width))


class MemoryAttention(nn.Module):
    """Multi-head softmax attention of a sequence to the encoder's memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def keys(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Keys and values, [B, H, L, D / H] each: computed once for all steps."""
        key, value = (split_heads(part, self.heads) for part in self.key_value(memory.token).chunk(2, -1))
        return key, value

    def forward(self, x_BTD: Tensor, keys: tuple[Tensor, Tensor], bias_BL: Tensor) -> Tensor:
        """[B, T, D]; `bias_BL` is `Memory.bias`."""
        heads = F.scaled_dot_product_attention(split_heads(self.query(x_BTD), self.heads), *keys, bias_BL[:, None, None, :])
        return self.out(heads.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Self-attention in both directions and a feed-forward layer, pre-LN with residuals."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.norm_attention, self.norm_forward = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.width, config.heads)
        self.forward_layer = FeedForward(config.width, config.feed_forward)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm_attention(x_BTD), mask_BT)
        return x_BTD + self.forward_layer(self.norm_forward(x_BTD))


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the memory, feed-forward; pre-LN with residuals."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.norm_self, self.norm_memory, self.norm_forward = (nn.LayerNorm(config.width) for _ in range(3))
        self.self_attention, self.memory_attention = SelfAttention(config.width, config.heads), MemoryAttention(config.width, config.heads)
        self.forward_layer = FeedForward(config.width, config.feed_forward)

    def forward(self, x_BTD: Tensor, memory: Memory) -> Tensor:
        """All tokens of a page at once."""
        x_BTD = x_BTD + self.self_attention(self.norm_self(x_BTD), causal=True)
        return self._rest(x_BTD, self.memory_attention.keys(memory), memory.bias)

    def _rest(self, x_BTD: Tensor, keys: tuple[Tensor, Tensor], bias_BL: Tensor) -> Tensor:
        tokens = self.norm_memory(x_BTD).view(len(bias_BL), -1, x_BTD.shape[-1])  # where all read one memory they are so many tokens to it
        x_BTD = x_BTD + self.memory_attention(tokens, keys, bias_BL).view(x_BTD.shape)
        return x_BTD + self.forward_layer(self.norm_forward(x_BTD))

    def step(self, x_BRD: Tensor, past_TXE: Tensor, at: int, keys: tuple[Tensor, Tensor], bias_BL: Tensor) -> Tensor:
        """The token at place `at` of every beam, [B, R, D]; X = B * R. To the memory a request's beams are so many tokens."""
        x_BRD = x_BRD + self.self_attention.step(self.norm_self(x_BRD).flatten(0, 1), past_TXE, at).view(x_BRD.shape)
        return self._rest(x_BRD, keys, bias_BL)


class CodeTables(nn.Module):
    """One embedding table a layer of codes, with a row for "none"; the decoder's output weights are the same rows."""

    def __init__(self, layers: int, codes: int, width: int) -> None:
        super().__init__()
        self.layers, self.codes = layers, codes
        self.tables = nn.ModuleList(nn.Embedding(codes + 1, width) for _ in range(layers))
        for table in self.tables:
            nn.init.normal_(table.weight, std=width**-0.5)

    def code(self, layer: int, codes: Tensor) -> Tensor:
        """Embeddings of one layer's codes [...], -1 or W: none."""
        return self.tables[layer](torch.where(codes < 0, self.codes, codes))

    def item(self, codes: Tensor) -> Tensor:
        """Embedding of tuples [..., layers]: the sum of its codes', as an item's features are the sum of its centres."""
        return torch.stack([self.code(layer, codes[..., layer]) for layer in range(self.layers)]).sum(0)

    def logits(self, layer: int, state: Tensor) -> Tensor:
        """[..., W] of states [..., D]."""
        return state @ self.tables[layer].weight[: self.codes].T


class Encoder(nn.Module):
    """Behaviours as POI, creative and fields, one token each; user and context are the first token."""

    def __init__(self, config: NetworkConfig, sizes: TokenSizes) -> None:
        super().__init__()
        width = config.width
        self.length = config.behaviours
        self.fields = nn.ModuleList(nn.Embedding(values, width, padding_idx=0) for values in sizes.behaviour_fields)
        self.user = nn.ModuleList(nn.Embedding(values, width, padding_idx=0) for values in sizes.user_fields)
        self.start = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.age = nn.Embedding(config.behaviours, width)
        """By place counted from the newest behaviour."""
        nn.init.normal_(self.age.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, history: History, poi_codes: CodeTables, creative_codes: CodeTables) -> Memory:
        """Memory of B requests: the newest L behaviours, always padded to L, so that a request's numbers do not depend on its company."""
        missing = max(0, self.length - history.poi.shape[1])

        def fitted(values: Tensor, padding: int) -> Tensor:
            return F.pad(values[:, -self.length :], (0, 0, missing, 0), value=padding)

        poi, creative, fields = fitted(history.poi, NONE), fitted(history.creative, NONE), fitted(history.fields, 0)
        mask = (poi >= 0).all(-1)
        token = poi_codes.item(poi) + creative_codes.item(creative) + self.age.weight.flip(0)
        for column, table in enumerate(self.fields):
            token = token + table(fields[..., column])
        first = self.start.expand(len(token), -1)
        for column, table in enumerate(self.user):
            first = first + table(history.user[:, column])
        token = torch.cat([first.unsqueeze(1), token], 1)
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        for block in self.blocks:
            token = block(token, mask)
        return Memory(self.norm(token), mask)


@dataclass(frozen=True)
class PageLogits:
    """Logits of every code of given pages, each code given those before it."""

    poi: Tensor
    """[B, K, C, W]"""
    creative: Tensor
    """[B, K, E, W]"""


class EgaV2(nn.Module):
    """The whole network; `Decoding` drives it step by step, `page_logits` scores given pages at once."""

    def __init__(self, config: NetworkConfig, sizes: TokenSizes, prior_ctr: float = 0.05) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        width = config.width
        self.poi_codes = CodeTables(sizes.poi_layers, sizes.poi_codes, width)
        self.creative_codes = CodeTables(sizes.creative_layers, sizes.creative_codes, width)
        self.encoder = Encoder(config, sizes)
        self.page_start = nn.Parameter(torch.randn(width) / math.sqrt(width))
        one_sequence = 0 if config.multi_token else sizes.creative_layers
        self.poi_place = nn.Parameter(torch.randn(config.slots * (sizes.poi_layers + one_sequence), width) / math.sqrt(width))
        self.poi_blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_blocks))
        self.poi_norm = nn.LayerNorm(width)
        if config.multi_token:
            self.state_norm, self.next_norm = nn.RMSNorm(width), nn.RMSNorm(width)
            self.join = nn.Linear(2 * width, width, bias=False)
            self.creative_place = nn.Parameter(torch.randn(config.slots * sizes.creative_layers, width) / math.sqrt(width))
            self.creative_blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.creative_blocks))
            self.creative_norm = nn.LayerNorm(width)
        self.poi_policy, self.creative_policy = (nn.Linear(width, width, bias=False) for _ in range(2))
        """All that the policy gradient moves: added to the decoders' states before they become logits; pre-training leaves them at 0."""
        for policy in (self.poi_policy, self.creative_policy):
            nn.init.zeros_(policy.weight)
        self.reward = RewardModel(config, sizes, prior_ctr)
        self.payment = PaymentNetwork(config)

    def encode(self, history: History) -> Memory:
        """What decoders and reward model read of B requests."""
        return self.encoder(history, self.poi_codes, self.creative_codes)

    def creative_start(self, state: Tensor, poi_codes: Tensor) -> Tensor:
        """Input of the creative decoder for the next POI: [RMSNorm(h); RMSNorm(embedding of the POI)], projected.

        `state` [..., D] is h, the POI decoder's at the place from which the POI's first code was predicted; `poi_codes` [..., C].
        """
        return self.join(torch.cat([self.state_norm(state), self.next_norm(self.poi_codes.item(poi_codes))], -1))

    def page_logits(self, memory: Memory, poi_BKC: Tensor, creative_BKE: Tensor) -> PageLogits:
        """Logits of the codes of B pages of K slots, teacher-forced: every code sees those before it, and no other.

        Empty slots (-1) may only follow full ones; their logits mean nothing and no other logit reads them.
        """
        slots, layers, parts = *poi_BKC.shape[1:], creative_BKE.shape[-1]
        before = [self.poi_codes.code(layer, poi_BKC[..., layer]) for layer in range(layers)]
        if not self.config.multi_token:
            before += [self.creative_codes.code(layer, creative_BKE[..., layer]) for layer in range(parts)]
        x = self._decode(torch.stack(before, 2).flatten(1, 2), memory).unflatten(1, (slots, -1))
        if self.config.multi_token:
            tokens = [self.creative_start(x[:, :, 0], poi_BKC), *(self.creative_codes.code(layer, creative_BKE[..., layer]) for layer in range(parts - 1))]
            y = torch.stack(tokens, 2).flatten(1, 2) + self.creative_place[: slots * parts]
            for block in self.creative_blocks:
                y = block(y, memory)
            y = self.creative_norm(y).unflatten(1, (slots, parts))
        else:
            y = x[:, :, layers:]
        poi = torch.stack([self.poi_logits(layer, x[:, :, layer]) for layer in range(layers)], 2)
        return PageLogits(poi, torch.stack([self.creative_logits(layer, y[:, :, layer]) for layer in range(parts)], 2))

    def _decode(self, codes_BTD: Tensor, memory: Memory) -> Tensor:
        """States of the POI decoder before each of the given codes, [B, T, D]."""
        first = self.page_start.expand(len(codes_BTD), 1, -1)
        x = torch.cat([first, codes_BTD[:, :-1]], 1) + self.poi_place[: codes_BTD.shape[1]]
        for block in self.poi_blocks:
            x = block(x, memory)
        return self.poi_norm(x)

    def poi_logits(self, layer: int, state: Tensor) -> Tensor:
        """[..., W] of the POI decoder's normalised states [..., D]."""
        return self.poi_codes.logits(layer, state + self.poi_policy(state))

    def creative_logits(self, layer: int, state: Tensor) -> Tensor:
        """[..., W] of the creative decoder's normalised states [..., D]."""
        return self.creative_codes.logits(layer, state + self.creative_policy(state))

    def decoder(self, history: History, beams: int, slots: int) -> Callable[[slice], Decoding]:
        """What `beam.search` asks for: encodes some of the requests and decodes their pages."""
        return lambda part: Decoding(self, self.encode(history.rows(part)), beams, slots)

    def stage_parameters(self, stage: str) -> list[nn.Parameter]:
        """What each training stage learns; everything else is frozen."""
        if stage == "pretrain":
            return [parameter for name, parameter in self.named_parameters() if not name.startswith(("reward.", "payment.", "poi_policy.", "creative_policy."))]
        if stage == "rlaf":
            return [*self.poi_policy.parameters(), *self.creative_policy.parameters()]
        return list({"reward": self.reward, "payment": self.payment}[stage].parameters())

    def enter_stage(self, stage: str) -> list[nn.Parameter]:
        """Freeze all but the stage's parameters; returns those."""
        self.requires_grad_(False)
        parameters = self.stage_parameters(stage)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters


def generation_losses(logits: PageLogits, poi_BKC: Tensor, creative_BKE: Tensor) -> tuple[Tensor, Tensor]:
    """L_NTP and L_MTP (Eq. 27-29): mean cross-entropy of the POI codes and of the creative codes that are there (not -1).

    Their sum is the loss of pre-training. Without any such code a loss is 0.
    """

    def mean(logit: Tensor, code: Tensor) -> Tensor:
        total = F.cross_entropy(logit.flatten(0, -2).float(), code.flatten(), ignore_index=NONE, reduction="sum")
        return total / (code != NONE).sum().clamp(min=1)

    return mean(logits.poi, poi_BKC), mean(logits.creative, creative_BKE)


class Decoding:
    """`EgaV2` as a `beam.Decoder`: one token a step, keys and values of the tokens so far.

    Searches for one request differ in bids, and with multi-token prediction beams that hold the same POIs differ in creatives; the network reads no bids, and the POI decoder then
    no creatives. So every prefix is computed once, however many beams have it.
    """

    def __init__(self, network: EgaV2, memory: Memory, beams: int, slots: int, batch: int | None = None) -> None:
        """`batch`: so many searches for the one request of `memory`, e.g. with other bids; by default one for each of its requests."""
        if batch is not None and len(memory.token) != 1:
            raise ValueError(f"{batch} searches were asked for one request, and the memory is of {len(memory.token)}")
        if slots > network.config.slots:
            raise ValueError(f"a page of {slots} slots was asked of a network for {network.config.slots}")
        self.network, self.beams, self.batch = network, beams, len(memory.token) if batch is None else batch
        sizes, multi_token = network.sizes, network.config.multi_token
        self.layers = sizes.poi_layers if multi_token else sizes.poi_layers + sizes.creative_layers
        """Codes a slot in the POI decoder's sequence."""
        self.poi = _Prefixes(network.poi_blocks, memory, self.batch * beams, slots * self.layers)
        self.creative = _Prefixes(network.creative_blocks, memory, self.batch * beams, slots * sizes.creative_layers) if multi_token else self.poi
        self.state = memory.token.new_zeros(0)
        """h of every prefix of POIs at the place from which the slot's first code was predicted; for a creative decoder of its own."""

    def poi_logits(self, previous_BR: Tensor | None, creative_BR: Tensor | None) -> Tensor:
        """See `beam.Decoder`."""
        network, place = self.network, self.poi.length
        layer = place % self.layers
        if previous_BR is None:
            x = network.page_start.expand(*self.poi.grow(torch.zeros_like(self.poi.row), 1).shape, -1)
        elif layer == 0 and not network.config.multi_token:
            assert creative_BR is not None
            x = self._creative_code(network.sizes.creative_layers - 1, creative_BR)
        else:
            x = self._poi_code(layer - 1 if layer else network.sizes.poi_layers - 1, previous_BR)
        x = network.poi_norm(self.poi.step(x + network.poi_place[place]))
        if network.config.multi_token:
            self.state = x.flatten(0, 1) if layer == 0 else self.state[self.poi.parent]
        return network.poi_logits(layer, x).flatten(0, 1)[self.poi.row].view(self.batch, self.beams, -1)

    def creative_logits(self, poi_BRC: Tensor, previous_BR: Tensor | None) -> Tensor:
        """See `beam.Decoder`."""
        network, place = self.network, self.creative.length
        if network.config.multi_token:
            layer = place % network.sizes.creative_layers
            x = self._creative_start(poi_BRC.flatten(0, 1)) if previous_BR is None else self._creative_code(layer - 1, previous_BR)
            x = network.creative_norm(self.creative.step(x + network.creative_place[place]))
        else:
            layer = place % self.layers - network.sizes.poi_layers
            x = self._poi_code(network.sizes.poi_layers - 1, poi_BRC[..., -1].clamp(min=0)) if previous_BR is None else self._creative_code(layer - 1, previous_BR)
            x = network.poi_norm(self.poi.step(x + network.poi_place[place]))
        return network.creative_logits(layer, x).flatten(0, 1)[self.creative.row].view(self.batch, self.beams, -1)

    def _poi_code(self, layer: int, code_BR: Tensor) -> Tensor:
        """Prefixes of POIs grow by a code: its embedding in each that differs, [M, U, D]."""
        code = code_BR.reshape(-1)
        return self.network.poi_codes.code(layer, code[self.poi.grow(code, self.network.sizes.poi_codes)])

    def _creative_code(self, layer: int, code_BR: Tensor) -> Tensor:
        """The same by a code of a creative, which may be none (-1 or W)."""
        code = code_BR.reshape(-1)
        return self.network.creative_codes.code(layer, code[self.creative.grow(code + 1, self.network.sizes.creative_codes + 2)])

    def _creative_start(self, poi_XC: Tensor) -> Tensor:
        """Prefixes of creatives grow by the page of POIs so far: its last code is in no prefix of POIs yet."""
        codes, poi_XC = self.network.sizes.poi_codes, poi_XC.clamp(min=0)
        beam = self.creative.grow(self.poi.row * codes + poi_XC[:, -1], len(self.state) * codes)
        return self.network.creative_start(self.state[self.poi.row[beam]], poi_XC[beam])

    def keep(self, parent_BR: Tensor) -> None:
        """See `beam.Decoder`."""
        row = (parent_BR + torch.arange(self.batch).unsqueeze(1) * self.beams).view(-1)
        self.poi.row = self.poi.row[row]
        if self.creative is not self.poi:
            self.creative.row = self.creative.row[row]


class _Prefixes:
    """Blocks of one decoder with keys and values of all prefixes that some beam has. Shape letters: M memories, U prefixes of each, X beams of all."""

    def __init__(self, blocks: nn.ModuleList, memory: Memory, beams: int, length: int) -> None:
        self.blocks, self.length, self.bias, self.memories = blocks, 0, memory.bias, len(memory.token)
        self.keys = [block.memory_attention.keys(memory) for block in blocks]
        self.width = 2 * memory.token.shape[-1]
        self.past, self.spare = ([memory.token.new_empty(length * beams * self.width) for _ in blocks] for _ in range(2))
        self.group = torch.arange(self.memories).repeat_interleave(beams // self.memories)
        """[X] whose memory a beam reads."""
        self.row = self.group
        """[X] the prefix of every beam, in [M * U]."""
        self.count = 1
        """U"""
        self.parent = torch.arange(self.memories)
        """[M * U] the prefix that each prefix goes on from, among those before it."""
        self.stored = self.memories
        """How many prefixes `past` holds."""

    def grow(self, code_X: Tensor, codes: int) -> Tensor:
        """Every beam's prefix grows by a code, 0 <= code < `codes`: finds those that differ. Returns a beam for each of them, [M, U].

        Where memories have fewer than U some are repeated.
        """
        key = self.row * codes + code_X  # prefixes of one memory lie together, so their keys do too
        found, place = torch.unique(key, return_inverse=True)
        beam = torch.zeros(len(found), dtype=torch.int64).scatter_(0, place, torch.arange(len(key)))
        if self.memories > 1:
            group = self.group[beam]
            number = torch.bincount(group, minlength=self.memories)
            start = number.cumsum(0) - number
            self.count = int(number.max())
            within = torch.arange(len(found)) - start[group]
            every = beam[start].unsqueeze(1).repeat(1, self.count)
            every[group, within] = beam
            place, beam = (group * self.count + within)[place], every
        else:
            self.count, beam = len(found), beam.unsqueeze(0)
        self.parent, self.row = self.row[beam.flatten()], place
        return beam

    def step(self, x_MUD: Tensor) -> Tensor:
        """The next token of every prefix, [M, U, D]."""
        rows, before = self.memories * self.count, self.length
        for number, block in enumerate(self.blocks):
            if before:
                old = self.past[number][: before * self.stored * self.width].view(before, self.stored, self.width)
                torch.index_select(old, 1, self.parent, out=self.spare[number][: before * rows * self.width].view(before, rows, self.width))
            past = self.spare[number][: (before + 1) * rows * self.width].view(before + 1, rows, self.width)
            x_MUD = block.step(x_MUD, past, before, self.keys[number], self.bias)
        self.past, self.spare, self.stored, self.length = self.spare, self.past, rows, before + 1
        return x_MUD


@dataclass(frozen=True)
class PageItems:
    """Pages of B requests as the reward model reads them; empty slots have POI codes -1."""

    poi: Tensor
    """[B, K, C]"""
    creative: Tensor
    """[B, K, E], -1: none."""
    organic: Tensor
    """[B, K] bool"""
    poi_features: Tensor
    """[B, K, F]"""
    creative_features: Tensor
    """[B, K, F]"""


@dataclass(frozen=True)
class Rewards:
    """Logits of the three towers, [B, K] each: click on the POI, click on the creative, purchase after a click."""

    poi_click: Tensor
    creative_click: Tensor
    purchase: Tensor


class RewardModel(nn.Module):
    """Permutation-aware: every item is read in its slot, beside its neighbours, through attention over the page. Never reads a bid.

    It has code tables of its own: those of the generator go on answering "what comes next", these "is it clicked here".
    """

    def __init__(self, config: NetworkConfig, sizes: TokenSizes, prior_ctr: float) -> None:
        super().__init__()
        width = config.width
        self.poi_codes = CodeTables(sizes.poi_layers, sizes.poi_codes, width)
        self.creative_codes = CodeTables(sizes.creative_layers, sizes.creative_codes, width)
        self.features = nn.Linear(sizes.poi_features + sizes.creative_features, width, bias=False) if sizes.poi_features + sizes.creative_features else None
        self.slot = nn.Embedding(config.slots, width)
        self.organic = nn.Embedding(2, width)
        self.blocks = nn.ModuleList(PageBlock(config) for _ in range(config.reward_blocks))
        self.norm = nn.LayerNorm(width)
        self.towers = nn.ModuleList(MLP(width, config.tower_hidden, 1, zero_last=True) for _ in range(3))
        for tower in self.towers:
            nn.init.constant_(tower.layers[-1].bias, math.log(prior_ctr / (1 - prior_ctr)))

    def states(self, memory: Memory, page: PageItems) -> Tensor:
        """What attention made of every item, [B, K, D]. There may be several pages a request, R * B in the order of the requests."""
        slots = page.poi.shape[1]
        mask = (page.poi >= 0).all(-1)
        x = self.poi_codes.item(page.poi) + self.creative_codes.item(page.creative) + self.slot.weight[:slots] + self.organic(page.organic.long())
        if self.features is not None:
            x = x + self.features(torch.cat([page.poi_features, page.creative_features], -1))
        # A page without any item attends to its empty slots and is ignored by the caller.
        attend = mask | ~mask.any(1, keepdim=True)
        for block in self.blocks:
            x = block(x, attend, memory)
        return self.norm(x)

    def forward(self, memory: Memory, page: PageItems) -> Rewards:
        """Three logits an item; those of empty slots mean nothing."""
        x = self.states(memory, page)
        return Rewards(*(tower(x).squeeze(-1) for tower in self.towers))


class PageBlock(nn.Module):
    """Attention to the memory, self-attention over the page, feed-forward; pre-LN with residuals."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.encoder = EncoderBlock(config)
        self.norm_memory = nn.LayerNorm(config.width)
        self.memory_attention = MemoryAttention(config.width, config.heads)

    def forward(self, x_BKD: Tensor, mask_BK: Tensor, memory: Memory) -> Tensor:
        tokens = self.norm_memory(x_BKD).reshape(len(memory.token), -1, x_BKD.shape[-1])  # a request's pages are so many tokens to its memory
        x_BKD = x_BKD + self.memory_attention(tokens, self.memory_attention.keys(memory), memory.bias).view(x_BKD.shape)
        return self.encoder(x_BKD, mask_BK)


class PaymentNetwork(nn.Module):
    """Price per click of every ad of a page, at the level of POIs; 0 <= p <= b by construction, and an organic item pays 0.

    Reads the item's state on the page, the other items' bids in page order and z * pCTR. Those alone are blind to the own bid, and a
    price rate that is blind to it makes shading pay always; `forward` therefore reads the own bid too. And it reads two prices that come with the search,
    over the own bid: the next ad's bid in this place and Clarke's price over the proposed pages; both say how far down the ad could have bid.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.slots = config.slots
        self.reduce = nn.Linear(config.width, 16)
        self.mlp = MLP(16 + 1 + (config.slots - 1) + 3, config.tower_hidden, 1, zero_last=True)

    def forward(self, state_BKD: Tensor, bid_BK: Tensor, exposure_BK: Tensor, reserve_BK: Tensor, rival_BK: Tensor, pivot_BK: Tensor) -> Tensor:
        """Payments per click [B, K] in the unit of `bid`; bids over the city's median, 0 in organic and empty slots; exposure is z * pCTR; rival and
        pivot: what the next ad and the other pages would have paid per click."""
        batch, slots = bid_BK.shape
        others = bid_BK.unsqueeze(1).expand(-1, slots, -1)
        others = others[:, ~torch.eye(slots, dtype=torch.bool)].view(batch, slots, slots - 1)
        others = F.pad(others, (0, self.slots - slots))
        shares = torch.stack([(price / bid_BK.clamp(min=1e-6)).clamp(0.0, 1.0) for price in (rival_BK, pivot_BK)], -1)
        x = torch.cat([self.reduce(state_BKD), exposure_BK.unsqueeze(-1), torch.log1p(others), torch.log1p(bid_BK).unsqueeze(-1), shares], -1)
        price = bid_BK * torch.sigmoid(self.mlp(x).squeeze(-1))
        return torch.minimum(torch.maximum(price, reserve_BK), bid_BK)
