"""EGA (V2) on whole pages: `ega bench v2`. Ads with several creatives among organic results, all models trained on one set of logs a seed.

The cascade and EGA-V1 choose ads; their creatives come from the selector and their ads alternate with organic results, as in the logs. EGA (V2)
chooses ads, creatives and places at once. All charge GSP, so that revenue differs by pages alone. Judged by the market's truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from benchmarks.tables import ROOT, Market, market, mean_and_deviation, pooled, provenance, say, seeds_of, side_by_side

if TYPE_CHECKING:
    from pipelines.config import RunConfig

DEFAULT = ROOT / "config" / "tables_v2.yaml"

ROWS = {
    "logged": "logging policy",
    "mca": "MCA",
    "mca top": "MCA, ads above all organic results",
    "ega_v1": "EGA-V1",
    "gr": "GR: most likely page, creative by selector",
    "-rlaf": "EGA without policy gradient (single-stage)",
    "-mtp": "EGA, creatives in the POIs' sequence",
    "-creative": "EGA, creative by selector",
    "-bid": "EGA, mean bid of a prefix",
    "learned": "EGA (V2), learned payments",
    "ega_v2": "EGA (V2)",
}
"""Policies of the table, in its order; all but "learned" charge GSP, and once more truthful prices."""


ALPHAS, BETAS, SWEPT = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0), (0.02, 2.0), 60
"""Weights of money in the search that the plot of the first seed compares, on so many test requests."""


def with_selected(place: Market, pages: pd.DataFrame, above: str | None = None) -> pd.DataFrame:
    """Pages of ads with the selector's creative of the day; `above` "top": all ads before all organic results, else alternating."""
    samples = place.samples
    ids = np.asarray(samples.request_id)
    order = np.argsort(ids)
    row = order[np.searchsorted(ids[order], pages["request_id"].to_numpy())]
    ad = np.searchsorted(np.asarray(samples.ad_id), pages["ad_id"].to_numpy())
    creative = np.asarray(samples.creative_id)[np.asarray(samples.shown_creative)[np.asarray(samples.day)[row], ad]]
    items = np.asarray(samples.organic_place).shape[1]
    return pages.assign(creative_id=creative, above=0 if above == "top" else np.minimum(pages["slot"].to_numpy() - 1, items))


TRUTHFUL = " at truthful prices"
"""Behind a policy's name: the same pages at critical prices (MCA, EGA-V1) or implicit ones (pages that are searched for) instead of GSP. Where a selector
changes the creative afterwards (GR, -creative), prices stay those of the creative that the search chose."""


def policies(place: Market, psi: dict[str, float], sweep: bool) -> Iterator[pd.DataFrame]:
    """Pages of every policy of ROWS on the same test requests, all but the logged ones also at truthful prices; `psi` gains that of each price rule on EGA (V2)'s pages.
    With `sweep` also pages of every pair of ALPHAS and BETAS, on some of the requests: policies "alpha A, beta B"."""
    from marketplace import schema
    from model.ega_v2.data import PageData
    from model.ega_v2.payment import RULES, psi_of
    from model.ega_v2.replay import TRIAL_FACTORS, generated, logged_pages, priced
    from model.ega_v2.training import audited
    from model.training.run import load_stage
    from model.training.stages import newest

    model, samples, seed = place.config.model, place.samples, place.seed
    rows = np.sort(newest(samples.split_rows(schema.TEST), place.config.evaluation.requests))
    for kind in ("mca", "ega_v1"):
        say(f"seed {seed}: {kind}")
        found = place.replay(place.train(kind, replace(model, kind=kind))).pages
        for rule, behind in (("gsp", ""), ("critical", TRUTHFUL)):
            pages = found[found["policy"] == f"{kind}/{rule}"]
            yield with_selected(place, pages.assign(policy=kind + behind))
            if kind == "mca":
                yield with_selected(place, pages.assign(policy="mca top" + behind), "top")
    say(f"seed {seed}: ega_v2")
    v2 = replace(model, kind="ega_v2")
    data = PageData(samples, place.train("ega_v2", v2))
    yield logged_pages(data, rows)
    pages = generated(data, rows)
    yield priced(pages, "learned", "learned")
    few = rows[np.linspace(0, len(rows) - 1, min(len(rows), place.config.evaluation.audited_requests)).astype(int)]
    say(f"seed {seed}: trial bids")
    lies = audited(data, few, TRIAL_FACTORS, place.config.evaluation.audited_losers)
    psi.update({rule: psi_of(data.model.core, lies, rule)["psi"] for rule in RULES})
    say(f"seed {seed}: ega_v2 without multi-token prediction")
    one_sequence = PageData(samples, place.train("-mtp", replace(v2, ega_v2=replace(v2.ega_v2, multi_token=False)), until="rlaf"))
    plain = PageData(samples, load_stage("evaluation", samples, v2, place.folder / "ega_v2" / "stages", seed))
    say(f"seed {seed}: pages of the others")
    likeliest = generated(plain, rows, best_of_beam=False, rules=("gsp", "implicit"))
    found = {
        "ega_v2": pages, "-creative": with_selected(place, pages).assign(above=pages["above"]), "-bid": generated(data, rows, bid_of_prefix="mean", rules=("gsp", "implicit")),
        "-rlaf": generated(plain, rows, rules=("gsp", "implicit")), "-mtp": generated(one_sequence, rows, rules=("gsp", "implicit")),
        "gr": with_selected(place, likeliest).assign(above=likeliest["above"]),
    }  # fmt: skip
    for policy, each in found.items():
        yield priced(each, policy, "gsp")
        yield priced(each, policy + TRUTHFUL, "implicit")
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SWEPT)).astype(int))]
    for alpha, beta in [(alpha, beta) for alpha in ALPHAS for beta in BETAS] if sweep else ():
        yield priced(generated(data, some, rules=("gsp",), alpha=alpha, beta=beta), f"alpha {alpha:g}, beta {beta:g}", "gsp")


def _policies_of_seed(path: Path, quick: bool, sweep: bool, seed: int) -> dict[str, Any]:
    """One seed of the table."""
    from marketplace.truth import paired_lift

    psi: dict[str, float] = {}
    with market(path, seed, None, _tiny if quick else None) as place:
        scored = place.truth(pd.concat(policies(place, psi, sweep), ignore_index=True))
    means = scored.groupby("policy")[["clicks", "revenue", "bid_welfare", "organic_clicks"]].mean()
    rows = {str(policy): {str(name): float(value) for name, value in row.items()} for policy, row in means.iterrows()}
    lifts = {}
    for policy in ROWS:
        if policy not in ("ega_v2", "learned"):
            lifts[policy] = {"GSP": paired_lift(scored, policy, "ega_v2"), "bid * clicks": paired_lift(scored, policy, "ega_v2", "bid_welfare")}
            if policy != "logged":
                lifts[policy]["truthful prices"] = paired_lift(scored, policy + TRUTHFUL, "ega_v2" + TRUTHFUL)
    return {"rows": rows, "lifts": lifts, "psi": psi}


def v2(config: Path | None = None, seeds: int = 5, quick: bool = False, keep: Path | None = None) -> dict[str, Any]:
    """EGA (V2), GR, MCA and EGA-V1 with ablations, with GSP and at truthful prices: true clicks, revenue and welfare, and what organic results lose."""
    from model.training.loop import Device
    from pipelines.config import load_run_config

    path = config or DEFAULT
    given = load_run_config(path)
    Device(given.training.device).require("ega_v2")  # whatever kind the configuration itself is of
    markets = seeds_of(given.seed, 1 if quick else seeds)
    seeds_found, minutes = side_by_side(path, {f"seed {seed}": partial(_policies_of_seed, path, quick, seed == markets[0], seed) for seed in markets}, keep)
    per_seed, lifts, regrets = ([each[name] for each in seeds_found] for name in ("rows", "lifts", "psi"))
    summary = {policy: mean_and_deviation([found[policy] for found in per_seed]) for policy in per_seed[0] if not policy.startswith("alpha")}
    nothing = {"revenue": {"mean": float("nan")}}
    table = [
        {
            "policy": label, "true eCTR %": 100 * summary[policy]["clicks"]["mean"], "true eRPM": 1000 * summary[policy]["revenue"]["mean"], "sd": 1000 * summary[policy]["revenue"]["sd"],
            "true eRPM, truthful prices": 1000 * summary.get(policy + TRUTHFUL, nothing)["revenue"]["mean"],
            "bid * clicks per 1000": 1000 * summary[policy]["bid_welfare"]["mean"], "organic clicks %": 100 * summary[policy]["organic_clicks"]["mean"],
        }
        for policy, label in ROWS.items()
    ]  # fmt: skip
    differences = {policy: {name: pooled([found[policy][name] for found in lifts]) for name in found} for policy, found in lifts[0].items()}
    second = [{"EGA (V2) over": ROWS[policy], **{f"{name}, %": _percent(value) for name, value in found.items()}} for policy, found in differences.items()]
    third = [{"prices of EGA (V2)": rule, "psi %": 100 * value["mean"], "sd": 100 * value["sd"]} for rule, value in mean_and_deviation(regrets).items()]
    series = {f"beta {beta:g}": [1000 * per_seed[0][f"alpha {alpha:g}, beta {beta:g}"]["bid_welfare"] for alpha in ALPHAS] for beta in BETAS}
    axes = ("alpha", f"bid * clicks per 1000 requests, truth, seed {markets[0]}", [f"{alpha:g}" for alpha in ALPHAS])
    return {**provenance(path, markets, minutes), "table": table, "second_table": second, "third_table": third, "series": series, "axes": axes, "summary": summary, "differences": differences, "per_seed": per_seed, "psi": mean_and_deviation(regrets), "psi_per_seed": regrets}


def _percent(lift: dict[str, float]) -> str:
    return f"{100 * lift['lift']:+.1f} ({100 * lift['low']:+.1f} to {100 * lift['high']:+.1f})"


def _tiny(config: RunConfig) -> RunConfig:
    """Sizes of --quick: every part runs, no figure means anything."""
    world = replace(config.world, unlogged_days=1, synthetic=replace(config.world.synthetic, users=200, places_per_city=200, ads_per_city=60, log_days=6))
    short = {"steps": 4, "batch": 16, "validate_every": 2, "validation_requests": 32}
    training = config.training
    v2 = replace(
        training.ega_v2, pretrain=replace(training.ega_v2.pretrain, **short), reward=replace(training.ega_v2.reward, **short),
        evaluation=replace(training.ega_v2.evaluation, **short), payment=replace(training.ega_v2.payment, **(short | {"batch": 4, "requests": 4, "validation_requests": 4, "misreports": (0.5, 1.0, 1.5)})),
        rlaf=replace(training.ega_v2.rlaf, **(short | {"batch": 4, "requests": 16, "validation_requests": 4, "beams": 4})),
    )  # fmt: skip
    names = ("recall", "prerank", "pretrain", "reward", "evaluation", "rlaf", "payment")
    training = replace(training, ega_v2=v2, **{name: replace(getattr(training, name), **short) for name in names})
    model = replace(config.model, width=16, ega_v2=replace(config.model.ega_v2, encoder_blocks=1, decoder_blocks=1, poi_codes=32, creative_codes=32, most_collisions=0.5, search=replace(config.model.ega_v2.search, beams=4)))
    sampling = replace(config.sampling, test_days=1, validation_days=1)
    return replace(config, world=world, training=training, model=model, sampling=sampling, evaluation=replace(config.evaluation, requests=12, calibration_requests=40))


PAGES = {"v2": v2}
