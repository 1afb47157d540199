"""What pricing rules do to honesty and revenue: `ega bench payments --run RUN` and `ega bench bidders --run RUN` on a finished run."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np


def bidders(run: Path, rounds: int = 150, requests: int = 1500, seed: int = 0) -> dict[str, Any]:
    """Learning bidders in the largest city of a run's simulated market: multipliers, revenue and welfare under three pricing rules."""
    from marketplace.bidders import RULES, BidderMarket, learn
    from marketplace.worlds import World

    if not (run / "world").is_dir():
        raise FileNotFoundError(f"{run} has no simulated market (a run on given logs); take a run of `ega run config/quickstart.yaml`")
    world = World.load(run / "world")
    live = world.live_requests()
    city = live["city_id"].mode()[0]
    mine = live[live["city_id"] == city].head(requests)
    table = world.ad_table(mine["event_timestamp"].iloc[0].date())
    table = table[table["city_id"] == city]
    truth = world.truth(mine, table["ad_id"].to_numpy())
    market = BidderMarket(truth.value, truth.click_probability, truth.continuation, table["reserve"].to_numpy(), world.config.slots)
    result: dict[str, Any] = {"city": int(city), "ads": len(table), "requests": len(mine), "rounds": rounds}
    rows, series = [], {}
    for rule in RULES:
        learned = learn(market, rule, rounds, seed=seed)
        series[rule] = learned.mean_multiplier.tolist()
        settled = slice(-rounds // 5, None)
        rows.append({
            "rule": rule, "bid / value": float(learned.mean_multiplier[settled].mean()), "spread": float(np.sqrt(((learned.multipliers[-1] - 1) ** 2) @ learned.weight)),
            "revenue": float(learned.revenue[settled].mean()), "welfare": float(learned.welfare[settled].mean()),
        })  # fmt: skip
    return {**result, "table": rows, "series": series, "axes": ("round", "bid / value, mean weighted by clicks")}


def payments(run: Path, requests: int = 500, steps: int | None = None) -> dict[str, Any]:
    """Pricing rules and payment networks on the test days of a run: share of the truthful prices' revenue, and psi.

    The generator and both evaluators are the run's own; every payment network is trained here, with the run's settings of stage 4.
    """
    import torch

    from marketplace import schema
    from model.ega_v1.mechanism import allocate, audit_losers, prices
    from model.ega_v1.network import PaymentNetwork
    from model.evaluation.replay import RegretOfRule, pools_of
    from model.training.data import Samples
    from model.training.loop import Device
    from model.training.run import load_stage
    from model.training.stages import newest, train_payment
    from pipelines.config import load_run_config

    if not (run / "stages").is_dir():
        raise FileNotFoundError(f"{run} has no trained stages; give the folder of a finished run (--run)")
    config = load_run_config(run / "config.yaml")
    if config.model.kind != "ega_v1":
        raise ValueError(f"{run} trained {config.model.kind}, which has no payment network; give a run of EGA-V1")
    device = Device(threads=config.training.threads)
    device.enter(config.model.kind)
    samples = Samples(run / "samples")
    network = load_stage("rlaf", samples, config.model, run / "stages", config.seed)
    stage = replace(config.training.payment, **({"steps": steps} if steps else {}))
    kinds: list[tuple[str, Any]] = [(name, (network, mode)) for name, mode in (("first price", "first_price"), ("GSP", "gsp"), ("VCG", "vcg"), ("critical", "critical"))]
    for inputs, form in (("literal", "rate"), ("aware", "rate"), ("aware", "critical")):
        for schedule in ("lagrangian", "log_budget"):
            variant = copy.deepcopy(network)
            torch.manual_seed(config.seed)
            variant.config = replace(config.model, payment_inputs=inputs, payment_form=form)
            variant.payment = PaymentNetwork(variant.config)
            with tempfile.TemporaryDirectory() as folder:
                train_payment(variant, samples, replace(stage, schedule=schedule), Path(folder) / "payment", device, {})
            kinds.append((f"network {inputs}, {form}, {schedule}", (variant, "learned")))
    judges = {"own": network.evaluator, "independent": network.evaluation_evaluator}
    regrets = {name: {judge: RegretOfRule() for judge in judges} for name, _ in kinds}
    revenue = dict.fromkeys(regrets, 0.0)
    points = config.evaluation.misreport_points
    for pool in pools_of(network, samples, newest(samples.split_rows(schema.TEST), requests), config.evaluation):
        served = allocate(network, pool)
        judged = {"own": served, "independent": allocate(network, pool, evaluator=network.evaluation_evaluator)}
        near = dict(zip(judges, audit_losers(network, pool, served, config.evaluation.audited_losers, tuple(judges.values())), strict=True))
        for name, (model, mode) in kinds:
            price = prices(model, pool, served, mode)
            revenue[name] += float((price * served.ctr * pool.unit[:, None]).sum())
            for judge in judges:
                regrets[name][judge].add(model, pool, samples, served, judged[judge], price, judged[judge].ctr, mode, points)
                regrets[name][judge].add_losers(model, pool, near["own"], near[judge], mode, points)
    rows = []
    for name, _ in kinds:
        own, other = (regrets[name][judge].psi() for judge in judges)
        rows.append({
            "rule": name, "revenue, % of critical": 100 * revenue[name] / revenue["critical"], **{f"{key} %": 100 * own[key] for key in ("psi_exact", "psi_loser", "psi_paper")},
            "psi_exact %, independent": 100 * other["psi_exact"],
        })  # fmt: skip
    return {"run": run.name, "requests": requests, "seed": config.seed, "steps": stage.steps, "table": rows}


ON_RUN = {"bidders": bidders, "payments": payments}
