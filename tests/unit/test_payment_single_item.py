"""The payment network on the one market whose optimum is known: one item, two bidders with values U[0, 1], reserve 1/2 (Myerson 1981: 5/12)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from model_tiny import NETWORK, SIZES

from model.ega_v1.mechanism import Pool, allocate, learned_prices, truthful, try_bids
from model.ega_v1.network import EgaV1
from model.training.stages import PaymentConfig, payment_loss, regret_of

RESERVE, OPTIMUM = 0.5, 5 / 12


def market(requests: int, seed: int, width: int) -> Pool:
    bids = torch.from_numpy(np.random.default_rng(seed).random((requests, 2))).float()
    return Pool(
        np.arange(requests), torch.zeros(requests, 2, width), torch.zeros(requests, 2, 2, dtype=torch.int64), torch.zeros(requests, width), torch.full((requests, 2), 20.0), torch.zeros(requests, 2),
        bids, torch.full_like(bids, RESERVE), torch.ones(requests, 2, dtype=torch.bool), np.zeros((requests, 2), np.int64), np.ones(requests),
    )  # fmt: skip


def test_payment_network_finds_the_optimal_auction() -> None:
    torch.manual_seed(0)
    network = EgaV1(replace(NETWORK, slots=1), SIZES)
    config = PaymentConfig()
    optimiser = torch.optim.Adam(network.enter_stage("payment"), lr=3e-3)
    multipliers, budget = torch.full((1,), config.multiplier), torch.tensor(config.budget[0])

    def measure() -> tuple[float, float]:
        """Revenue a request, and mean exact regret: trial bids every 1/200 of the range and just above the threshold."""
        pool = market(4000, 99, network.config.width)
        with torch.no_grad():
            pages = allocate(network, pool)
            edge = np.maximum(pages.theta, RESERVE) * (1 + 1e-6)
            trial = np.concatenate([np.broadcast_to(np.linspace(0.005, 1.2, 240), (*pages.bid.shape, 240)), np.where(np.isfinite(edge), edge, 1.0)], 2)
            truth, trials = truthful(pool, pages), try_bids(pool, pages, trial)
            price = learned_prices(network, pool, pages, truth)
            _, regret = regret_of(price, learned_prices(network, pool, pages, trials), truth, trials)
        return float((price[..., 0].numpy() * pages.ctr).sum(1).mean()), float(regret.sum(1).mean())

    assert measure()[1] > 0.01  # it starts above the truthful price, where shading pays
    for step in range(400):
        loss, _ = payment_loss(network, market(128, step, network.config.width), config, multipliers, budget)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    revenue, regret = measure()
    assert abs(revenue / OPTIMUM - 1) < 0.02
    assert regret < 1e-3
