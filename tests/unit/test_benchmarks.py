"""Every benchmark runs at a small size and reports finite figures; no time is asserted."""

from __future__ import annotations

import math

import pytest

from benchmarks import speed
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
