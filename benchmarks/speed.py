"""Speed measurements: `ega bench NAME`. Medians and ratios within one run; nothing here passes or fails."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.latency import latency


def _seconds(function: Callable[[], Any], runs: int) -> float:
    """Median wall time of `runs` calls, after one to warm up."""
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cluster_attention(tokens: tuple[int, ...] = (1_000, 10_000, 100_000), width: int = 64, clusters: int = 32, runs: int = 5) -> dict[str, Any]:
    """Chunked cluster attention at growing N: the ratio of times for ten times the tokens should be near 10."""
    import torch

    from model.layers import ClusterAttention

    layer = ClusterAttention(width, clusters, 4).eval()
    result: dict[str, Any] = {"width": width, "clusters": clusters, "threads": torch.get_num_threads()}
    with torch.inference_mode():
        for n in tokens:
            x, mask = torch.randn(1, n, width), torch.ones(1, n, dtype=torch.bool)
            result[f"seconds_at_{n}"] = _seconds(lambda x=x, mask=mask: layer.forward_chunked(x, mask, 4096), runs)
    for small, large in zip(tokens, tokens[1:], strict=False):
        result[f"ratio_{large}_to_{small}"] = result[f"seconds_at_{large}"] / result[f"seconds_at_{small}"]
    return result


def auction(ads: int = 100_000, slots: int = 5, runs: int = 25) -> dict[str, Any]:
    """Allocation alone, and with all critical bids and prices, for one request; and 1,000 requests of 1,000 ads in a batch."""
    import auction as rules
    from auction import batch

    rng = np.random.default_rng(0)
    pctr, bids, affinity, keys = rng.beta(2, 30, ads), rng.lognormal(0, 0.5, ads), rng.normal(0, 0.02, (ads, slots)), rules.tie_keys(np.arange(ads))

    def ctr(pages: np.ndarray) -> np.ndarray:
        return pctr[pages] * 0.8 ** np.arange(slots)

    alone = _seconds(lambda: rules.greedy_allocation(pctr, bids, affinity, 1.0, slots, None, keys), runs)
    priced = _seconds(lambda: rules.priced_page(pctr, bids, affinity, 1.0, slots, ctr, tie_key=keys, page_ctr_batch=ctr), runs)
    many = rng.beta(2, 30, (1_000, 1_000)), rng.lognormal(0, 0.5, (1_000, 1_000)), rng.normal(0, 0.02, (1_000, 1_000, slots))
    batched = _seconds(lambda: batch.counterfactuals(*many, 1.0, slots, None, rules.tie_keys(np.arange(1_000))), 3)
    return {"ads": ads, "allocation_ms": 1e3 * alone, "allocation_and_prices_ms": 1e3 * priced, "ratio": priced / alone, "batch_of_1000_x_1000_s": batched}


def sampling(requests: int = 5_000, ads: int = 20_000, unexposed: int = 95) -> dict[str, Any]:
    """Popularity sampling without replacement, with inclusion probabilities: candidates a second."""
    from features.sampling import draw_unexposed, inclusion_scale

    rng = np.random.default_rng(6)
    weights = (rng.zipf(1.5, ads).clip(max=50_000) + 1.0) ** 0.75
    excluded = np.sort(rng.integers(0, ads, (requests, 5)), axis=1)
    excluded[:, 1:][excluded[:, 1:] == excluded[:, :-1]] = -1
    wanted = np.full(requests, unexposed)

    def draw() -> None:
        draw_unexposed(weights, excluded, wanted, inclusion_scale(weights, excluded, wanted), np.random.default_rng(1))

    seconds = _seconds(draw, 3)
    return {"requests": requests, "ads": ads, "unexposed": unexposed, "candidates_a_second": requests * unexposed / seconds}


def generator(impressions: int = 1_000_000) -> dict[str, Any]:
    """The synthetic market: seconds to build a world and write about a million impressions."""
    import dataclasses

    from marketplace.synthetic import SyntheticConfig
    from marketplace.worlds import WorldConfig, build_world

    users = round(2500 * impressions / 225_000)
    config = dataclasses.replace(WorldConfig(), synthetic=dataclasses.replace(SyntheticConfig(), users=users))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        world = build_world(config, 1, None)
        built = time.perf_counter()
        manifest = world.write_logs(Path(folder) / "logs")
        seconds = time.perf_counter() - start
    return {"rows": manifest.get("rows"), "build_seconds": built - start, "total_seconds": seconds}


def oracle(requests: int = 1_000, ads: int = 3_000, slots: int = 5) -> dict[str, Any]:
    """Limits of a market: best pages and VCG of `requests` pages over `ads` ads, p, c and values drawn."""
    from marketplace.oracle import best_pages, vcg_revenue

    rng = np.random.default_rng(0)
    gain, continuation = rng.beta(2, 30, (requests, ads)) * rng.lognormal(0, 0.85, ads), rng.uniform(0.5, 0.97, (requests, ads))
    return {
        "best_pages_seconds": _seconds(lambda: best_pages(gain, continuation, slots), 1),
        "with_vcg_seconds": _seconds(lambda: vcg_revenue(gain, continuation, slots), 1),
    }


BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "cluster-attention": cluster_attention,
    "auction": auction,
    "sampling": sampling,
    "generator": generator,
    "oracle": oracle,
    "latency": latency,
}
