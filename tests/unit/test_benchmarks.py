"""Every benchmark runs at a small size and reports finite figures; no time is asserted."""

from __future__ import annotations

import math

import pytest

from benchmarks import latency, speed
from cli.bench import bench


def test_benchmarks_report_finite_figures() -> None:
    results = [
        speed.cluster_attention(tokens=(50, 500), width=16, clusters=4, runs=1),
        speed.auction(ads=500, runs=1),
        speed.sampling(requests=50, ads=200, unexposed=10),
        speed.generator(impressions=5_000),
        speed.oracle(requests=5, ads=50),
        speed.v2_decode(ads=40, slots=2, beams=4, codes=8, behaviours=5, runs=1),
    ]
    for result in results:
        assert all(math.isfinite(value) and value > 0 for value in result.values() if isinstance(value, float))


def test_an_unknown_benchmark_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="cluster-attention"):
        bench("nonsense", None)


def test_latency_lists_every_saving_and_the_floor() -> None:
    result = latency.latency(quick=True)
    table, sizes, _ = (result.pop(name) for name in ("table", "second_table", "third_table"))
    assert [row["fusion after"] for row in table].count("{2,3}") == [row["fusion after"] for row in table].count("{3}") >= 5
    assert table[0]["times faster"] == 1.0 and "matrix products" in table[-1]["one request"]
    for value in [*result.values(), *(row["ms"] for row in [*table, *sizes]), *(row["processor ms"] for row in [*table, *sizes])]:
        assert isinstance(value, str) or math.isfinite(value)
    assert [row["ads"] for row in sizes] == [20, 200, 2000, 2000, 2000, 200, 200] and sum("MCA" in row["network"] for row in sizes) == 2
    assert 0 <= result["bfloat16_same_pages_percent"] <= 100 and result["resident_megabytes"] > 10


def test_the_floor_counts_the_products_of_the_specification() -> None:
    """MODEL.md 5, N=1e5 at the paper's sizes: 59 GF a block, 22 % less where clusters are aggregated first."""

    def after(fusion: tuple[int, ...], activation: str) -> float:
        return latency.gigaflops({**latency.PAPER, "fusion_after": fusion, "qkv_activation": activation}, 100_000)

    block = {name: after((5, 6), name) - after((6,), name) for name in ("dice", "none")}
    fusion = 13.1  # of the second fusion, target attention alone
    assert block["dice"] - fusion == pytest.approx(59 + 3.3, rel=0.03)  # queries are not kept between the two sweeps
    assert block["none"] - fusion == pytest.approx(59 * 0.78, rel=0.03)


def test_only_latency_takes_a_device() -> None:
    with pytest.raises(ValueError, match="only latency can"):
        bench("auction", None, device="cuda")
