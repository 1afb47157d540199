"""A tiny EGA (V2) and random inputs for it; everything seeded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from model.ega_v2.beam import Catalogue, Offers
from model.ega_v2.network import EgaV2, History, NetworkConfig, PageItems, TokenSizes

NETWORK = NetworkConfig(width=16, heads=2, encoder_blocks=1, decoder_blocks=2, feed_forward=2, behaviours=6, slots=4, reward_blocks=1, tower_hidden=(8, 4))
SIZES = TokenSizes(poi_layers=3, poi_codes=5, creative_layers=2, creative_codes=4, behaviour_fields=(4, 3), user_fields=(6,), poi_features=3, creative_features=2)


def network(seed: int = 0, multi_token: bool = True) -> EgaV2:
    """Every parameter shaken, so that layers that start at zero carry a signal too; in evaluation mode."""
    torch.manual_seed(seed)
    model = EgaV2(replace(NETWORK, multi_token=multi_token), SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def history(requests: int = 3, behaviours: int = 6, seed: int = 0) -> History:
    """Histories of different lengths, newest last; some behaviours saw no creative."""
    rng = np.random.default_rng(seed)
    real = np.arange(behaviours)[None] >= behaviours - rng.integers(0, behaviours + 1, (requests, 1))
    real[0] = True
    poi = np.where(real[..., None], rng.integers(0, SIZES.poi_codes, (requests, behaviours, SIZES.poi_layers)), -1)
    seen = real & (rng.random(real.shape) < 0.6)
    creative = np.where(seen[..., None], rng.integers(0, SIZES.creative_codes, (requests, behaviours, SIZES.creative_layers)), -1)
    fields = np.stack([rng.integers(1, size, real.shape) for size in SIZES.behaviour_fields], -1) * real[..., None]
    user = np.stack([rng.integers(1, size, requests) for size in SIZES.user_fields], -1)
    return History(*(torch.from_numpy(values) for values in (poi, creative, fields, user)))


def page(requests: int = 3, slots: int = 4, seed: int = 0, full: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of pages [B, K, C] and [B, K, E]: empty slots at the end, some items without creative."""
    rng = np.random.default_rng(seed)
    real = np.arange(slots)[None] < (slots if full else rng.integers(1, slots + 1, (requests, 1)))
    poi = np.where(real[..., None], rng.integers(0, SIZES.poi_codes, (requests, slots, SIZES.poi_layers)), -1)
    seen = real & (full | (rng.random((requests, slots)) < 0.7))
    creative = np.where(seen[..., None], rng.integers(0, SIZES.creative_codes, (requests, slots, SIZES.creative_layers)), -1)
    return torch.from_numpy(poi), torch.from_numpy(creative)


def page_items(requests: int = 3, slots: int = 4, seed: int = 0, full: bool = False) -> PageItems:
    poi, creative = page(requests, slots, seed, full)
    generator = torch.Generator().manual_seed(seed)
    return PageItems(
        poi, creative, torch.rand(requests, slots, generator=generator) < 0.3, torch.randn(requests, slots, SIZES.poi_features, generator=generator),
        torch.randn(requests, slots, SIZES.creative_features, generator=generator),
    )  # fmt: skip


def market(requests: int = 3, ads: int = 12, organics: int = 2, seed: int = 0) -> tuple[Catalogue, Offers]:
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(ads), 2)
    creative = rng.integers(0, SIZES.creative_codes, (2 * ads, SIZES.creative_layers))
    catalogue = Catalogue(rng.integers(0, SIZES.poi_codes, (ads, SIZES.poi_layers)), SIZES.poi_codes, owner, creative, SIZES.creative_codes)
    bid = rng.exponential(1.0, (requests, ads))
    arrays: tuple[Any, ...] = (
        bid, rng.random((requests, ads)) < 0.9, bid * rng.random((requests, ads)), rng.integers(0, SIZES.poi_codes, (requests, organics, SIZES.poi_layers)),
        rng.integers(0, SIZES.creative_codes, (requests, organics, SIZES.creative_layers)),
    )  # fmt: skip
    return catalogue, Offers(*(torch.from_numpy(values) for values in arrays))
