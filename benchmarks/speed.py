"""Speed measurements: `ega bench NAME`. Medians and ratios within one run; nothing here passes or fails."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.latency import latency


def _seconds(function: Callable[[], Any], runs: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median time of `runs` calls by `clock` (default: wall time), after one to warm up."""
    function()
    times = []
    for _ in range(runs):
        start = clock()
        function()
        times.append(clock() - start)
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
        "requests": requests, "ads": ads,
        "best_pages_seconds": _seconds(lambda: best_pages(gain, continuation, slots), 1),
        "with_vcg_seconds": _seconds(lambda: vcg_revenue(gain, continuation, slots), 1),
    }


def v2_decode(ads: int = 3_000, creatives: int = 2, slots: int = 5, organics: int = 5, beams: int = 64, codes: int = 1024, behaviours: int = 256, runs: int = 31) -> dict[str, Any]:
    """EGA (V2): history to ranked pages for one request, untrained weights of the default width; and its distance to the matrix-multiply floor.

    The floor is the time of all matrix products of one decoding, those of attention included, each alone and repeated on warm memory.
    """
    import torch

    from model.ega_v2.beam import Catalogue, Offers, search
    from model.ega_v2.config import SearchConfig
    from model.ega_v2.network import EgaV2, History, NetworkConfig, TokenSizes

    rng, layers = np.random.default_rng(0), 3
    torch.manual_seed(0)

    def tuples(*shape: int) -> Any:
        return rng.integers(0, codes, (*shape, layers))

    network = EgaV2(NetworkConfig(behaviours=behaviours, slots=max(slots, NetworkConfig().slots)), TokenSizes(layers, codes, layers, codes)).eval()
    catalogue = Catalogue(tuples(ads), codes, np.repeat(np.arange(ads), creatives), tuples(ads * creatives), codes)
    nothing = torch.zeros(1, behaviours, 0, dtype=torch.int64)
    history = History(torch.from_numpy(tuples(1, behaviours)), torch.from_numpy(tuples(1, behaviours)), nothing, nothing[:, 0])
    bid = torch.from_numpy(rng.lognormal(0, 0.5, (1, ads)))
    offers = Offers(bid, torch.ones(1, ads, dtype=torch.bool), bid * 0.05, torch.from_numpy(tuples(1, organics)), torch.from_numpy(tuples(1, organics)))
    config = SearchConfig(beams=beams)

    def decode() -> None:
        with torch.inference_mode():
            search(network.decoder(history, beams, slots), catalogue, offers, slots, config)

    with torch.inference_mode():
        encoder = _seconds(lambda: network.encode(history), runs)
    whole = _seconds(decode, runs)
    shapes = _matrix_products(decode)
    products = [
        (torch.randn(batch, rows, inner), torch.randn(batch, inner, columns), torch.empty(batch, rows, columns), count)
        for (batch, rows, inner, columns), count in shapes.items()
    ]

    def multiply() -> None:
        with torch.inference_mode():
            for left, right, out, count in products:
                for _ in range(count):
                    torch.bmm(left, right, out=out)

    floor = _seconds(multiply, runs)
    work = sum(2 * math.prod(shape) * count for shape, count in shapes.items())
    return {
        "ads": ads, "creatives": ads * creatives, "slots": slots, "organic_items": organics, "beams": beams, "codes": codes, "behaviours": behaviours,
        "threads": torch.get_num_threads(), "decode_ms": 1e3 * whole, "decode_cpu_ms": 1e3 * _seconds(decode, runs, time.process_time),
        "encoder_ms": 1e3 * encoder, "matrix_products": sum(shapes.values()),
        "gigaflops": work / 1e9, "floor_ms": 1e3 * floor, "ratio_to_floor": whole / floor,
    }  # fmt: skip


def _matrix_products(function: Callable[[], Any]) -> dict[tuple[int, int, int, int], int]:
    """Shapes (batch, rows, inner, columns) of every matrix product that a call makes, and how often; an attention is two."""
    from collections import Counter

    from torch.utils._python_dispatch import TorchDispatchMode

    shapes: Counter[tuple[int, int, int, int]] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            name = operation.overloadpacket.__name__
            if name == "linear":
                left, weight = arguments[:2]
                shapes[(1, left.shape[:-1].numel(), left.shape[-1], len(weight))] += 1
            elif name in ("mm", "addmm", "bmm", "matmul"):
                left, right = arguments[-2:]
                shapes[(left.shape[0] if name == "bmm" else 1, left.shape[:-1].numel() if name == "matmul" else left.shape[-2], left.shape[-1], right.shape[-1])] += 1
            elif "scaled_dot_product" in name:
                query, key = arguments[:2]
                batch, (rows, width), keys = math.prod(query.shape[:-2]), query.shape[-2:], key.shape[-2]
                shapes[(batch, rows, width, keys)] += 1
                shapes[(batch, rows, keys, width)] += 1
            return operation(*arguments, **(keywords or {}))

    with Watch():
        function()
    return dict(shapes)


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "cluster-attention": cluster_attention,
    "auction": auction,
    "sampling": sampling,
    "generator": generator,
    "oracle": oracle,
    "v2-decode": v2_decode,
    "latency": latency,
}
