"""`ega bench latency`: one request over a whole city at the paper's sizes, from the plain network to what serving runs.

Weights are random: a request costs the same whatever they say. Medians and ratios within one run; nothing here passes or fails.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import flops

PAPER: dict[str, Any] = {**flops.PAPER, "embedding": 16, "feed_forward": 4, "slots": 5}
QUICKSTART: dict[str, Any] = {
    "width": 64, "embedding": 24, "blocks": 2, "auction_blocks": 2, "clusters": 16, "heads": 2, "feed_forward": 2, "head_hidden": (128, 32), "slots": 5,
    "fusion_after": (1, 2), "qkv_activation": "none", "cross_features": True,
}  # fmt: skip
"""The network of config/quickstart.yaml."""


class Setting:
    """A random model, a random city and one request, run in several ways."""

    def __init__(self, ads: int, behaviours: int, network: dict[str, Any], seed: int = 0) -> None:
        import torch

        from marketplace import schema
        from model.bundle import Bundle
        from model.ega_v1.network import EgaV1, NetworkConfig, VocabularySizes
        from model.kinds import create

        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        sizes = VocabularySizes(ad=ads + 2, poi=ads + 2, advertiser=ads // 10 + 3, category=200, geo=2000, creative=ads + 2)
        model = create(NetworkConfig(**network), sizes).eval()
        if isinstance(model, EgaV1):
            with torch.no_grad():
                for layer in (model.generator.add, model.generator.scale):  # zero before stage 3, and then slots would not differ
                    layer.weight.normal_(std=0.02)
        self.bundle = Bundle("0" * 12, model, {}, {}, {}, {})

        def fields(columns: Any, *shape: int) -> np.ndarray:
            return np.stack([rng.integers(schema.FIRST_CODE, sizes.rows(column), shape) for column in columns], -1)

        self.ads, self.ad_fields = ads, fields(schema.AD_FIELDS, ads)
        self.ad_place = np.float32([40.7, -74.0]) + rng.uniform(-0.2, 0.2, (ads, 2)).astype(np.float32)
        self.request = {
            "user_fields": fields(schema.USER_FIELDS), "context_fields": fields(schema.CONTEXT_FIELDS), "behaviours": fields(schema.BEHAVIOUR_FIELDS, behaviours),
            "request_place": np.float32([40.7, -74.0]), "bids": rng.lognormal(0, 0.5, ads), "reserves": np.full(ads, 0.05), "eligible": np.ones(ads, bool),
        }  # fmt: skip

    def engine(self, **execution: Any) -> tuple[Any, Any]:
        """A ranking engine and its city."""
        from model.ega_v1.engine import RankingEngine
        from model.ega_v1.inference import Execution

        engine = RankingEngine(self.bundle, execution=Execution(**execution))
        return engine, engine.prepare_city(np.arange(self.ads), self.ad_fields, self.ad_place)

    def ranking(self, **execution: Any) -> Callable[[], Any]:
        """One request, from encoded features to a priced page."""
        engine, city = self.engine(**execution)
        return lambda: engine.rank(city, **self.request)

    def another_user(self, seed: int) -> None:
        """The request of somebody else at the same time and place."""
        rng = np.random.default_rng(seed)
        shuffled = rng.permutation(self.request["behaviours"].ravel()[: len(self.request["behaviours"])])
        self.request["behaviours"] = self.request["behaviours"][np.argsort(shuffled, kind="stable")]
        self.request["bids"] = rng.lognormal(0, 0.5, self.ads)

    def plain(self, kept_states: bool) -> Callable[[], Any]:
        """The network as it was trained, all ads at once in float32, allocation and prices over all of them."""
        import torch

        from model.ega_v1.mechanism import Pool, allocate
        from model.ega_v1.network import PAGE_COLUMNS, Batch

        network, everyone = self.bundle.network, torch.ones(1, self.ads, dtype=torch.bool)
        fields, place = torch.from_numpy(self.ad_fields).unsqueeze(0), torch.from_numpy(self.ad_place).unsqueeze(0)
        user, context, behaviours = (torch.from_numpy(self.request[name]).unsqueeze(0) for name in ("user_fields", "context_fields", "behaviours"))
        batch = Batch(fields, everyone, place, user, context, behaviours, torch.from_numpy(self.request["request_place"]).unsqueeze(0))
        bids, reserves = (torch.from_numpy(self.request[name]).unsqueeze(0) for name in ("bids", "reserves"))
        with torch.inference_mode():
            states = network.city_states(fields, everyone) if kept_states else None

        def forward() -> Any:
            with torch.inference_mode():
                h, person = network.encode(batch) if states is None else network.encode_from(states, batch)
                click, purchase = network.heads(h, person)
                pool = Pool(np.zeros(1, np.int64), h, fields[..., PAGE_COLUMNS], person, click, purchase, bids, reserves, everyone, np.arange(self.ads)[None], np.ones(1))
                return allocate(network, pool)

        return forward


def _milliseconds(function: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Median wall and processor time of a call, milliseconds, after one to warm up. The processor's is over all threads; on a machine
    that others use it says what the wall clock cannot."""
    function()
    wall, busy = [], []
    for _ in range(runs):
        start, cpu = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    return 1e3 * statistics.median(wall), 1e3 * statistics.median(busy)


def products(network: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Matrix products of one ad in one request of the serving path: (kind, inner size, outer size). `rows`: ads times a weight;
    `sum`: gathered over the ads; `heads`: attention to as many keys as there are clusters, both products."""
    width, clusters, blocks = network["width"], network["clusters"], network["blocks"]
    fusions, aggregated = sorted(network["fusion_after"]), network["qkv_activation"] == "none"
    attend = [("heads", width, clusters), ("rows", width, width)]
    gather = [("rows", width, clusters), ("sum", clusters, width)]
    one = [("rows", width, width), *attend, ("rows", width, 4 * width), ("rows", 4 * width, width)]
    one += gather if aggregated else [("rows", width, 3 * width), ("rows", width, clusters), ("sum", clusters, 3 * width)]
    found = one * (blocks - fusions[0]) + attend
    for fusion in fusions[1:]:
        found += [("rows", width, width), *attend] + ([] if fusion == fusions[-1] else gather)
    hidden = (width, *network["head_hidden"])
    found += [("rows", a, b) for a, b in zip(hidden, hidden[1:], strict=False)]
    all_clusters = network["auction_blocks"] * clusters
    return [*found, ("rows", width, all_clusters), ("sum", all_clusters, width), ("rows", width, 2 * network["slots"])]


def gigaflops(network: dict[str, Any], ads: int) -> float:
    """Billions of floating-point operations of one request's ads, a multiplication and an addition counting as two."""
    return sum((4 if kind == "heads" else 2) * inner * outer for kind, inner, outer in products(network)) * ads / 1e9


def floor(whole_city: Any, network: dict[str, Any], ads: int) -> Callable[[], Any]:
    """Nothing but `products` on the engine's chunks, threads and dtype: what a request would take if all else were free."""
    import torch

    options: dict[str, Any] = {"dtype": whole_city.dtype, "device": whole_city.device}
    shapes, heads = products(network), network["heads"]
    tokens = torch.randn(ads, max(max(inner, outer) for _, inner, outer in shapes), **options)
    weights = {(inner, outer): torch.randn(outer, inner, **options).T for kind, inner, outer in shapes if kind == "rows"}
    keys = torch.randn(heads, network["clusters"], network["width"] // heads, **options)

    def multiply(rows: slice) -> None:
        part = tokens[rows]
        for kind, inner, outer in shapes:
            if kind == "rows":
                part[:, :inner] @ weights[inner, outer]
            elif kind == "sum":
                part[:, :inner].T @ part[:, :outer]
            else:
                queries = part[:, :inner].unflatten(1, (heads, -1)).transpose(0, 1)
                torch.bmm(torch.bmm(queries, keys.transpose(1, 2)), keys)

    def run() -> None:
        whole_city._sweep(ads, [], multiply)
        if whole_city.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def resident_megabytes(ads: int, behaviours: int, network: dict[str, Any], execution: dict[str, Any]) -> float:
    """Peak resident memory of a fresh process that prepares the city and answers three requests."""
    arguments = json.dumps([ads, behaviours, network, execution])
    code = (
        "import json, sys; from benchmarks.experiments import peak_bytes; from benchmarks.latency import Setting; ads, behaviours, network, execution = json.loads(sys.argv[1])\n"
        "rank = Setting(ads, behaviours, network).ranking(**execution)\n"
        "for _ in range(3): rank()\n"
        "print(peak_bytes() / 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=True)
    return float(done.stdout)


def latency(
    device: str = "cpu", ads: int = 100_000, behaviours: int = 1_000, fusions: tuple[tuple[int, ...], ...] = ((3, 6), (6,)), runs: int = 5,
    network: dict[str, Any] | None = None, quickstart_ads: int = 3_000, rounding_requests: int = 20, quick: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One request at the paper's sizes: plain network, each saving, the matrix-multiply floor, growth with N, the served cascade, memory."""
    if quick:
        return latency(device, 2_000, 140, ((2, 3), (3,)), 1, {**PAPER, "width": 16, "clusters": 4, "blocks": 3, "auction_blocks": 1, "heads": 2}, 200, 2)
    import torch

    from model.ega_v1.inference import Execution

    paper = PAPER if network is None else network
    execution: dict[str, Any] = {"device": device}
    dtype = str(Execution(device=device).resolved()).removeprefix("torch.")  # type: ignore[arg-type]
    result: dict[str, Any] = {"device": device if device == "cpu" else torch.cuda.get_device_name(), "dtype": dtype, "threads": torch.get_num_threads(), "ads": ads}
    table: list[dict[str, Any]] = []
    for fusion in fusions:
        aggregated, activated = ({**paper, "fusion_after": fusion, "qkv_activation": name} for name in ("none", "dice"))
        setting, name = Setting(ads, behaviours, aggregated), _braces(fusion)
        engine, city = setting.engine(**execution)
        steps: list[tuple[str, Callable[[], Any], int]] = [
            ("plain network, all ads at once, float32", setting.plain(False), max(1, runs // 2)),
            ("+ city states kept up to the first fusion", setting.plain(True), max(1, runs // 2)),
            ("+ sweeps over chunks, Dice on q, k, v", Setting(ads, behaviours, activated).ranking(**execution, dtype="float32"), runs),
            ("+ clusters aggregated, then projected", setting.ranking(**execution, dtype="float32"), runs),
        ]
        if dtype != "float32":
            steps.append((f"+ {dtype}", lambda engine=engine, city=city, setting=setting: engine.rank(city, **setting.request), runs))
        steps.append(("matrix products alone", floor(engine._whole_city, aggregated, ads), runs))
        times = {label: _milliseconds(call, count) for label, call, count in steps}
        plain, served, bare = (times[steps[i][0]] for i in (0, -2, -1))
        before = plain[0]
        for label, (wall, busy) in times.items():
            table.append({
                "fusion after": name, "one request": label, "ms": wall, "processor ms": busy, "times faster": plain[0] / wall,
                "by processor": plain[1] / busy, "saved, % of plain": float("nan") if label == steps[-1][0] else 100 * (before - wall) / plain[0],
            })  # fmt: skip
            before = wall
        key = "_".join(map(str, fusion))
        result |= {
            f"served_ms_{key}": served[0], f"plain_over_served_{key}": plain[0] / served[0], f"served_over_floor_{key}": served[0] / bare[0],
            f"served_over_floor_processor_{key}": served[1] / bare[1], f"gigaflops_{key}": gigaflops(aggregated, ads),
            f"floor_gigaflops_a_second_{key}": 1e3 * gigaflops(aggregated, ads) / bare[0],
        }  # fmt: skip
    served = [{**paper, "fusion_after": fusion, "qkv_activation": "none"} for fusion in fusions]
    main, sizes = served[0], []

    def size(label: str, network: dict[str, Any], count: int, history: int, times: int) -> float:
        """A row of the second table; its wall milliseconds."""
        wall, busy = _milliseconds(Setting(count, history, network).ranking(**execution), times)
        sizes.append({"network": label, "ads": count, "behaviours": history, "ms": wall, "processor ms": busy})
        return wall

    for count in (ads // 100, ads // 10):
        result[f"served_ms_at_{count}"] = size(f"EGA-V1, fusion after {_braces(fusions[0])}", main, count, behaviours, runs)
    whole = [size(f"EGA-V1, fusion after {_braces(network['fusion_after'])}", network, ads, behaviours, runs) for network in served]
    result[f"served_ms_at_{ads}"] = whole[0]
    cascade = size("MCA: SASRec, DSSM, DIN", {**main, "kind": "mca"}, ads, behaviours, runs)
    result |= {f"over_cascade_{'_'.join(map(str, fusion))}": wall / cascade for fusion, wall in zip(fusions, whole, strict=True)}
    if quickstart_ads:
        result[f"quickstart_ms_at_{quickstart_ads}"] = size("EGA-V1, config/quickstart.yaml", QUICKSTART, quickstart_ads, 48, 4 * runs)
        size("MCA, config/quickstart.yaml", {**QUICKSTART, "kind": "mca"}, quickstart_ads, 48, 4 * runs)
    result["resident_megabytes"] = resident_megabytes(ads, behaviours, main, execution)
    if rounding_requests:
        result |= rounding(Setting(ads // 10, behaviours, main), rounding_requests, execution)
    machine = ("device", "dtype", "threads", "resident_megabytes", "bfloat16_same_pages_percent", "bfloat16_pctr_off_by_percent")
    return {**result, "table": table, "second_table": sizes, "third_table": [{name.replace("_", " "): result[name] for name in machine if name in result}]}


def _braces(numbers: tuple[int, ...]) -> str:
    return "{" + ",".join(map(str, numbers)) + "}"


def rounding(setting: Setting, requests: int, execution: dict[str, Any]) -> dict[str, Any]:
    """How often bfloat16 shows the page of float32, and how far the pCTR of an ad shown by both moves at most."""
    rounded, exact = (setting.engine(**execution, dtype=dtype) for dtype in ("bfloat16", "float32"))
    same, moved = 0, 0.0
    for seed in range(requests):
        setting.another_user(seed)
        pages = [engine.rank(city, **setting.request) for engine, city in (rounded, exact)]
        same += np.array_equal(pages[0].rows, pages[1].rows)
        _, mine, theirs = np.intersect1d(pages[0].rows, pages[1].rows, return_indices=True)
        moved = max(moved, *(float(value) for value in np.abs(pages[0].pctr[mine] / pages[1].pctr[theirs] - 1.0)))
    return {"bfloat16_same_pages_percent": 100.0 * same / requests, "bfloat16_pctr_off_by_percent": 100.0 * moved}

