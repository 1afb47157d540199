"""EGA (V2) on whole pages: `ega bench v2`. Ads with several creatives among organic results, all models trained on one set of logs a seed.

The cascade and EGA-V1 choose ads; their creatives come from the selector and their ads alternate with organic results, as in the logs. EGA (V2)
chooses ads, creatives and places at once. All charge GSP, so that revenue differs by pages alone. Judged by the market's truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from benchmarks.tables import ROOT, Market, market, mean_and_deviation, pooled, provenance, say, seed_by_seed, seeds_of

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
"""Policies of the table, in its order; all but "learned" charge GSP."""


ALPHAS, BETAS, SWEPT = (0.0, 0.5, 1.0, 1.5, 2.0), (0.02, 0.2, 2.0), 60
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


def policies(place: Market, psi: dict[str, float], sweep: bool) -> Iterator[pd.DataFrame]:
    """Pages of every policy of ROWS on the same test requests; `psi` gains that of each price rule on EGA (V2)'s pages. With `sweep` also pages of every pair of
    ALPHAS and BETAS, on some of the requests: policies "alpha A, beta B"."""
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
        pages = found[found["policy"] == f"{kind}/gsp"].assign(policy=kind)
        yield with_selected(place, pages)
        if kind == "mca":
            yield with_selected(place, pages.assign(policy="mca top"), "top")
    say(f"seed {seed}: ega_v2")
    v2 = replace(model, kind="ega_v2")
    data = PageData(samples, place.train("ega_v2", v2))
    yield logged_pages(data, rows)
    pages = generated(data, rows)
    mine = priced(pages, "ega_v2", "gsp")
    yield mine
    yield priced(pages, "learned", "learned")
    few = rows[np.linspace(0, len(rows) - 1, min(len(rows), place.config.evaluation.audited_requests)).astype(int)]
    lies = audited(data, few, TRIAL_FACTORS, place.config.evaluation.audited_losers)
    psi.update({rule: psi_of(data.model.core, lies, rule)["psi"] for rule in RULES})
    yield with_selected(place, mine.assign(policy="-creative")).assign(above=mine["above"])
    yield priced(generated(data, rows, bid_of_prefix="mean"), "-bid", "gsp")
    plain = PageData(samples, load_stage("evaluation", samples, v2, place.folder / "ega_v2" / "stages", seed))
    yield priced(generated(plain, rows), "-rlaf", "gsp")
    likeliest = priced(generated(plain, rows, best_of_beam=False), "gr", "gsp")
    yield with_selected(place, likeliest).assign(above=likeliest["above"])
    say(f"seed {seed}: ega_v2 without multi-token prediction")
    one_sequence = place.train("-mtp", replace(v2, ega_v2=replace(v2.ega_v2, multi_token=False)), until="rlaf")
    yield priced(generated(PageData(samples, one_sequence), rows), "-mtp", "gsp")
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SWEPT)).astype(int))]
    for alpha, beta in [(alpha, beta) for alpha in ALPHAS for beta in BETAS] if sweep else ():
        yield priced(generated(data, some, alpha=alpha, beta=beta), f"alpha {alpha:g}, beta {beta:g}", "gsp")


def v2(config: Path | None = None, seeds: int = 5, quick: bool = False, keep: Path | None = None) -> dict[str, Any]:
    """EGA (V2), GR, MCA and EGA-V1 with ablations, all with GSP: true clicks, revenue and welfare, and what organic results lose."""
    from marketplace.truth import paired_lift
    from pipelines.config import load_run_config

    path = config or DEFAULT
    markets = seeds_of(load_run_config(path).seed, 1 if quick else seeds)

    def one(seed: int) -> dict[str, Any]:
        psi: dict[str, float] = {}
        with market(path, seed, None, _tiny if quick else None) as place:
            scored = place.truth(pd.concat(policies(place, psi, seed == markets[0]), ignore_index=True))
        means = scored.groupby("policy")[["clicks", "revenue", "bid_welfare", "organic_clicks"]].mean()
        rows = {str(policy): {str(name): float(value) for name, value in row.items()} for policy, row in means.iterrows()}
        return {"rows": rows, "lifts": {policy: paired_lift(scored, policy, "ega_v2") for policy in ROWS if policy != "ega_v2"}, "psi": psi}

    seeds_found, minutes = seed_by_seed(path, markets, keep, one)
    per_seed, lifts, regrets = ([each[name] for each in seeds_found] for name in ("rows", "lifts", "psi"))
    summary = {policy: mean_and_deviation([found[policy] for found in per_seed]) for policy in ROWS}
    table = [
        {
            "policy": label, "true eCTR %": 100 * summary[policy]["clicks"]["mean"], "true eRPM": 1000 * summary[policy]["revenue"]["mean"], "sd": 1000 * summary[policy]["revenue"]["sd"],
            "bid * clicks per 1000": 1000 * summary[policy]["bid_welfare"]["mean"], "organic clicks %": 100 * summary[policy]["organic_clicks"]["mean"],
        }
        for policy, label in ROWS.items()
    ]  # fmt: skip
    table = [{**row, "psi %": 100 * mean_and_deviation(regrets)[rule]["mean"] if (rule := {"ega_v2": "gsp", "learned": "learned"}.get(policy, "")) else float("nan")} for policy, row in zip(ROWS, table, strict=True)]
    differences = {policy: pooled([found[policy] for found in lifts]) for policy in lifts[0]}
    second = [{"EGA (V2), true eRPM over": ROWS[policy], "mean": value["lift"], "95 % interval": f"{value['low']:+.4f} to {value['high']:+.4f}"} for policy, value in differences.items()]
    series = {f"beta {beta:g}": [1000 * per_seed[0][f"alpha {alpha:g}, beta {beta:g}"]["bid_welfare"] for alpha in ALPHAS] for beta in BETAS}
    axes = ("alpha", f"bid * clicks per 1000 requests, truth, seed {markets[0]}", [f"{alpha:g}" for alpha in ALPHAS])
    return {**provenance(path, markets, minutes), "table": table, "second_table": second, "series": series, "axes": axes, "summary": summary, "differences": differences, "per_seed": per_seed, "psi": mean_and_deviation(regrets), "psi_per_seed": regrets}


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
