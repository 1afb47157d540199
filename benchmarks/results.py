"""docs/results.md from results/*.json: what was measured, by which command, on what, beside the paper's figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HEAD = """# Results

Written by `ega results` from `results/*.json`; each table names the command that makes its file again. Figures of two runs of one
command differ by chance (seeds of the market, threads of the machine); intervals say by how much.

eCTR and eRPM are per request, as in the paper: click probabilities summed over the page, and revenue of 1,000 requests. *By the
evaluator*: EGA-V1's evaluation evaluator judges the pages of all models. *True*: the market's own click probabilities, which no model
sees. *% of gap closed*: welfare from MCA's pages towards the best pages there are. The market is ours, not Meituan's: levels cannot be
compared with the paper's, orderings can.
"""

SECTIONS: dict[str, tuple[str, str]] = {
    "table1": ("Table 1: MCA, FS-LTR, EGA-V1", "Paper: Recall@50 .289, .426, .513; AUC .741, .743, .754; eRPM 185.2, 194.9, 217.1; psi 9.4, 9.1, 2.3 %. GSP with truthful bids overcharges: no advertiser would keep bidding so. *GSP at equilibrium* is its lowest envy-free one, the VCG prices of the same ranking (exact for a ranking by pCTR x bid, a yardstick for EGA-V1's). Intervals are those of the mean over these markets, users as the unit; markets differ more, see the least of a seed. MCA's ranker reads the same behaviours, crosses and samples as EGA-V1, so that AUC on sampled candidates leaves little to win (Table 3: the crosses carry most of it, for either); most of the revenue that the cascade loses, it loses before ranking, where it reads no bid (the better its towers know what is clicked, the less they leave: see what the headline rests on). *Without pre-ranking* the auction sees more bids than a pre-ranking that reads them could hand on, and a sixth of the lead in revenue is left; over *DIN on the whole city*, for which cities of this size are small enough (its cost grows with ads x behaviours), still less, and new markets may turn either. What stays in each of these markets, over every cascade, is welfare, by about two per cent: what ordering whole pages adds, AucFormer's part (Table 2). On check-ins no such rest is shown over DIN on the whole city. Clicks are where the evaluator misleads: it gives EGA-V1's pages more of them than MCA's, the truth fewer (on check-ins the sign of the truth turns from market to market). FS-LTR's networks start as MCA's and keep the weights that were best on the validation days: labels that repeat what the cascade did seldom help towers that were trained out, and never DIN's AUC, so in most of these markets it is MCA. The paper's psi is a mean of ratios, which ads with hardly any utility decide; *exact* is a ratio of sums."),
    "table1-nyc": ("Table 1 on real check-ins", "The same on `config/nyc.yaml`. Three markets: the same people and places, other advertisers and values, other trainings. EGA-V1 earns more than MCA in these three, by a third in one of them and by a twentieth, which is not shown to be more than nothing, in another; it finds more of what users chose in each. Three markets this far apart do not say what a fourth would earn, as the column of new markets shows; what varies is the price of a click, far less the worth of pages. Most of the lead is again what the early stages throw away, recall about as much as pre-ranking: over DIN on the whole city no difference is shown, in revenue or in welfare, and the sign in revenue turns from market to market."),
    "table2": ("Table 2: ablations", "Paper: eRPM 217.1; -gcf 214.8, -mif 212.5, -auf 208.0. All at critical prices. Revenue is what runners-up would pay, and swings from one market and training to the next by more than the parts are worth: -gcf earns a seventh more in one market, where its pages get fewer clicks, and a twentieth less in another, where they get more, at a little less welfare in both. Welfare says what pages are worth, and is steadier. AucFormer adds to it in every market; cluster attention among ads adds little, and mid-fusion nothing that is shown. Why: what only cluster attention among ads can see, the substitutes of an ad in its city, is worth little AUC even to the truth (last rows of Table 3), ways of fusing differ there by less than seeds do, and pages rest on pCTR."),
    "table3": ("Table 3: cross features and mid-fusion", "Dev is that of the set-aware pCTR on shown ads, among the whole city as in serving; the plot shows where it comes from. It does not order the models as in the paper: the level of each is set on the validation days, and what is left, a few per cent, is by how much the test days of a market differ from them; it varies as much from market to market as from row to row. *Market's truth*: the market's own click probabilities, which bound every model, and the same without what an ad's substitutes in its city do to it, which bound a model blind to other ads. In the paper explicit crosses are worth .003 of AUC to EGA-V1; here counts of the user's own visits are most of what a model of this size learns from logs of this length."),
    "table4": ("Table 4: the online A/B test", "Paper: CTR +5.2 %, RPM +13.6 %, ROI +3.1 %, response time +2.2 %. Both models approved by the gates, served over HTTP to simulated users of one world; *true* changes are those of the pages really shown, by the market's click probabilities. Bids are truthful throughout: under GSP no advertiser would keep bidding so, which flatters the MCA arm of the last comparison. In the paper clicks rise too, and both sides gain. Here, at the prices of the gates, RPM rises and clicks do not: runners-up among all ads of a city bid more than those among the few that pre-ranking leaves (the gain shrinks as pre-ranking widens, see Table 1), so a click costs more and buys less order value. What stops the first comparison is a guardrail of the default plan: learned prices lie further above critical ones than it allows, although the gate on incentives passed them. The response takes longer because every ad is ranked, on the same two cores. Protocol: [measuring.md](measuring.md)."),
    "scaling": ("Figure 5: scaling", "Paper: rising in m and m_e, with diminishing returns. Each point is a training of its own with the same steps, AUC on sampled candidates, value by its own evaluation evaluator. In this market AUC does not rise with m: some thousand requests of a small city hold no more than one block learns, and deeper networks only train more slowly. Read steps of a few per cent of value as another training's luck (`--seeds`)."),
    "sensitivity": ("What the headline rests on", "EGA-V1 over MCA, both at critical prices, in truth, with one knob turned at a time. One market and one training a row: rows of the same market (the first two) compare, across markets read with care. One configuration gives from a thirtieth to a quarter over the seeds of Table 1. What the cascade's narrow stages throw away is in Table 1; the better trained they are, the more it is, because they read no bid. The gain in revenue needs values that differ (spread 0.5 leaves none; configured is 0.85), and in the market without an externality of the candidate set it is smaller too. Welfare rises under every knob."),
    "v2": ("EGA (V2) on whole pages", "Paper (V2): EGA 230.4, GR 206.7, cascade 192.5; without multi-token prediction 225.5, single-stage 218.2, mean bids 222.9. Ads with three creatives among five organic results, judged by the market's truth; every policy charges GSP for truthful bids, and beside it truthful prices. Differences are EGA (V2)'s over the policy named. Notes: [ega_v2.md](ega_v2.md)."),
    "flops": ("Appendix A.1: cost of a request", "Counted on the network; Eq. 30 to 32 beside. Eq. 31 leaves out the projections of queries, keys and values, which are most of MIF's cost; Eq. 32 begins with ads that are clustered, and clustering them is the generator's cost."),
    "sequential": ("SASRec and EGA-V1's encoder on published data", "Published for SASRec on Amazon Video Games, 100 sampled negatives: HR@10 .744, NDCG@10 .538. Protocol: [measuring.md](measuring.md)."),
    "next-poi": ("Next place on real check-ins", "Published next-place models on the same raw check-ins, split otherwise: Acc@1/5/10 .273, .536, .624. Protocol: [measuring.md](measuring.md)."),
    "serp": ("Clicks on real result pages", "Perplexity, lower is better. Quoted without a split: 1.3219 for slot x query-url CTR, 1.3333 for a DBN. Protocol: [measuring.md](measuring.md)."),
    "peers": ("Speed beside RecBole", "Our SASRec and DIN and RecBole's on the same interactions, batch size, widths, loss, optimiser and threads, in turn within one run; a ratio above 1: ours is faster. Protocol: [measuring.md](measuring.md)."),
    "ab": ("A/B statistics on the simulated market", "False positives at 5 % in A/A tests, and how often the 95 % interval holds a lift of 5.2 % that was made. Read with [experiments.md](experiments.md)."),
    "alarms": ("Alarms: injected changes, clean days", "Each change is in for one day; clean days must raise none beyond the stated rate. Read with [experiments.md](experiments.md)."),
    "events": ("Joining a million events", "Impressions, clicks and purchases from Parquet to clean logs, in a process of its own."),
    "latency": ("Latency of a whole city", "One request, random weights: first each saving at the paper's sizes over 100,000 ads, then growth with the city and the served cascade (paper: the same response time within 2.2 %), then the machine. bfloat16 where a CPU multiplies it in hardware. Read with [serving.md](serving.md)."),
    "load": ("Open-loop load", "A service of the quickstart's model, its clients on the same two cores; latency from the scheduled time. *Recovery*: until no request is refused and half-second medians are back below the p99 that half load had before. Read with [serving.md](serving.md)."),
}
"""Name of the file under results/: heading, and a line of context."""


def write_results(folder: Path, out: Path) -> int:
    """Write the page; returns the number of tables. Files that are not known by name come last."""
    from model.bundle import write_atomic

    files = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if not files:
        raise FileNotFoundError(f"no results in {folder}; make some first, e.g. `ega bench table1 --out {folder}/table1.json`")
    parts = [HEAD]
    for name in [*(name for name in SECTIONS if name in files), *(name for name in files if name not in SECTIONS)]:
        try:
            result = json.loads(files[name].read_text())
        except ValueError as error:
            raise ValueError(f"{files[name]} is no JSON ({error}); delete it, or make it again with `ega bench NAME --out {files[name]}`") from error
        heading, context = SECTIONS.get(name, (name, ""))
        parts.append(f"## {heading}\n\n{command_of(result, files[name])}\n")
        parts += [f"{context}\n"] if context else []
        parts += [f"{markdown([_numbers(row) for row in result[key]])}\n" for key in ("table", "second_table", "third_table") if result.get(key)]
        if said := orders(result.get("differences")):
            parts.append(f"{said}\n")
        plot = files[name].with_suffix(".svg")
        parts += [f"![{heading}](../{folder.name}/{plot.name})\n"] if plot.is_file() else []
    write_atomic(out, "\n".join(parts).encode())
    return len(files)


def drawing(result: dict[str, Any]) -> str | None:
    """What a result has to show as SVG: its course, else its paired differences with their intervals, else nothing."""
    from model.evaluation.plots import intervals_svg, lines_svg

    if "series" in result:
        return lines_svg(result["series"], *result["axes"])
    found = _with_intervals(result.get("differences"))
    entries = {name: (100 * entry["lift"], 100 * entry["low"], 100 * entry["high"]) for name, entry in found.items()}
    wider = {name: (100 * entry["markets_low"], 100 * entry["markets_high"]) for name, entry in found.items() if math.isfinite(entry.get("markets_low") or math.nan)}
    note = "; thin: of new markets" if wider else ""
    return intervals_svg(entries, f"difference, % (Recall, AUC: hundredths), 95 % intervals{note}", wider) if entries else None


def _with_intervals(differences: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, float]]:
    """Paired differences by name, or by name and measure, that have an interval."""
    flat = {}
    for name, value in (differences or {}).items():
        flat |= {name: value} if "low" in value else {f"{name}, {part}": inner for part, inner in value.items() if isinstance(inner, dict)}
    return {name: value for name, value in flat.items() if all(isinstance(value.get(key), float) and math.isfinite(value[key]) for key in ("low", "high"))}


def orders(differences: dict[str, dict[str, Any]] | None) -> str:
    """In words, which paired differences have 95 % intervals above zero, below it, or on both sides; empty where there are none such.

    Of those on one side it says whether new markets would show it too, where several markets can tell.
    """
    entries = _with_intervals(differences)

    def named(name: str, value: dict[str, float]) -> str:
        low, high = (value.get(f"markets_{end}") for end in ("low", "high"))
        if low is None or high is None or not math.isfinite(low + high) or value["low"] <= 0 <= value["high"]:
            return f"*{name}*"
        return f"*{name}* ({'not sure in' if low <= 0 <= high else 'also in'} new markets)"

    sides = {
        "above zero": lambda low, high: low > 0, "below zero": lambda low, high: high < 0, "no difference shown": lambda low, high: low <= 0 <= high,
    }  # fmt: skip
    found = {side: [named(name, value) for name, value in entries.items() if holds(value["low"], value["high"])] for side, holds in sides.items()}
    return "\n".join(f"- {side}: {'; '.join(names)}" for side, names in found.items() if names)


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """JSON's null is a figure that does not exist."""
    return {key: float("nan") if value is None else value for key, value in row.items()}


def command_of(result: dict[str, Any], path: Path) -> str:
    """The command and what it ran on, in one line."""
    seeds = f"; seeds {', '.join(map(str, result['seeds']))}" if result.get("seeds") else ""
    threads = f"{result.get('threads')} thread{'' if result.get('threads') == 1 else 's'}"
    where = f"{result['processors']} processors, {threads} a model" if result.get("processors") else threads
    spent = f"; {result['minutes']:.0f} minutes on {where}" if result.get("minutes") is not None else ""
    commit = f"; commit {result['git_commit'][:7]}" if result.get("git_commit") else ""
    return f"`{result.get('command') or 'ega bench ' + result['name']} --out results/{path.name}`{seeds}{spent}{commit}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for the terminal that is also Markdown."""

    def cell(value: Any) -> str:
        return ("–" if not math.isfinite(value) else f"{value:.4g}") if isinstance(value, float) else str(value)

    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [header, *([cell(row.get(name, math.nan)) for name in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
