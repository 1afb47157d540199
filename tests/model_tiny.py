"""Tiny networks and random requests for the tests of the model room; everything seeded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from marketplace import schema
from model.cascade.config import CascadeConfig
from model.ega_v1.mechanism import Pool
from model.ega_v1.network import Batch, EgaV1, Evaluator, NetworkConfig, VocabularySizes
from model.training.stages import PaymentConfig, PretrainConfig, RelabelConfig, RewardConfig, RlafConfig, TowerConfig, TrainingConfig

NETWORK = NetworkConfig(
    width=16, embedding=8, blocks=2, auction_blocks=1, fusion_after=(1, 2), clusters=4, heads=2, exact_behaviours=16, feed_forward=2, head_hidden=(16, 8), slots=5
)
CASCADE = replace(NETWORK, kind="fs_ltr", cascade=CascadeConfig(recall=12, prerank=8, behaviours=6, blocks=1, tower_hidden=(16,), attention_hidden=(8,)))
SIZES = VocabularySizes(ad=40, poi=40, advertiser=12, category=8, geo=20, creative=40)

_LOOP: dict[str, Any] = {"steps": 8, "batch": 24, "validate_every": 4, "warmup": 2, "validation_requests": 40, "patience": 20}
TRAINING = TrainingConfig(
    recall=TowerConfig(**_LOOP, recall_at=10),
    prerank=TowerConfig(**_LOOP, recall_at=10),
    relabel=RelabelConfig(**_LOOP, recall_at=10),
    pretrain=PretrainConfig(**_LOOP, calibration_requests=64),
    reward=RewardConfig(**_LOOP),
    evaluation=RewardConfig(**_LOOP, seed=2),
    rlaf=RlafConfig(**_LOOP, requests=64, candidates=24),
    payment=PaymentConfig(**{**_LOOP, "batch": 8}, requests=48, candidates=24),
    threads=1,
)
"""Eight steps a stage with a checkpoint after steps 0, 4 and 8 and one when the stage is done."""


def tiny_network(seed: int = 0, noise: float = 0.2, **change: Any) -> EgaV1:
    """A network whose zero-started layers are shaken by `noise`, so that every path carries a signal; in evaluation mode."""
    torch.manual_seed(seed)
    network = EgaV1(replace(NETWORK, **change), SIZES)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            gained = "examination" in name or name.endswith("evaluator.level")  # these count EXAMINATION_GAIN times
            parameter.add_(noise * torch.randn(parameter.shape) / (Evaluator.EXAMINATION_GAIN if gained else 1.0))
    return network.eval()


def random_batch(requests: int = 6, ads: int = 24, behaviours: int = 7, seed: int = 0, padded: bool = True) -> Batch:
    """Requests with different numbers of real candidates and behaviours."""
    rng = np.random.default_rng(seed)

    def fields(columns: tuple[schema.Encoded, ...], *shape: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([rng.integers(1, SIZES.rows(column), shape) for column in columns], -1))

    mask = np.arange(ads)[None] < (rng.integers(NETWORK.slots, ads + 1, (requests, 1)) if padded else ads)
    mask = torch.from_numpy(np.broadcast_to(mask, (requests, ads)).copy())
    history = fields(schema.BEHAVIOUR_FIELDS, requests, behaviours)
    history[np.arange(behaviours)[None] >= rng.integers(0, behaviours + 1, (requests, 1))] = schema.PADDING
    place = torch.tensor([40.7, -74.0])
    return Batch(
        ad_fields=fields(schema.AD_FIELDS, requests, ads) * mask.unsqueeze(-1),
        ad_mask=mask,
        ad_place=place + 0.1 * torch.from_numpy(rng.random((requests, ads, 2))).float(),
        user_fields=fields(schema.USER_FIELDS, requests),
        context_fields=fields(schema.CONTEXT_FIELDS, requests),
        behaviours=history,
        request_place=place.expand(requests, 2).clone(),
    )


def random_pool(network: EgaV1, requests: int = 12, ads: int = 14, seed: int = 0, padded: bool = True, reserve: float = 0.3) -> Pool:
    """Random representations with bids around 1 and reserves that exclude some ads."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    width = network.config.width
    mask = np.arange(ads)[None] < (rng.integers(network.config.slots + 1, ads + 1, (requests, 1)) if padded else ads)
    mask = torch.from_numpy(np.broadcast_to(mask, (requests, ads)).copy())
    bid = torch.from_numpy(np.exp(rng.normal(0, 0.5, (requests, ads)))).float() * mask
    rows = np.where(mask.numpy(), np.arange(ads)[None], -1)
    return Pool(
        requests=np.arange(requests),
        h=torch.randn(requests, ads, width, generator=generator),
        codes=torch.from_numpy(np.stack([rng.integers(1, size, (requests, ads)) for size in (SIZES.ad, SIZES.category)], -1)) * mask.unsqueeze(-1),
        user=torch.randn(requests, width, generator=generator),
        click=torch.randn(requests, ads, generator=generator) - 1.5,
        purchase=torch.randn(requests, ads, generator=generator) - 3,
        bid=bid,
        reserve=torch.from_numpy(reserve * rng.random((requests, ads))).float() * mask,
        mask=mask,
        ad_rows=rows,
        unit=np.ones(requests),
    )
