"""Replay of test days over the whole city: what the candidate would show and charge, judged by the evaluation evaluator.

Shape letters: R requests, N ads of the city, K slots, T trial bids. Money leaves this module in currency.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass

from auction.classic import position_prices, second_price
from marketplace import schema
from model.ega_v1.mechanism import (
    PRICE_MODES,
    Audit,
    Bidding,
    Pages,
    Pool,
    PriceMode,
    allocate,
    audit_losers,
    learned_prices,
    page_logits,
    price_modes,
    prices,
    slot_clicks,
    try_bids,
)
from model.ega_v1.network import RankingModel
from model.evaluation.metrics import auc, deviation, log_loss, mean_and_interval, recall_at
from model.evaluation.off_policy import STRUCTURES, LoggedPages, estimate
from model.training.data import Samples
from model.training.stages import PAGE_INPUTS, ahead, encode_city, encode_exposed, logged_pages, newest, places_of, pretrain_metrics


@config_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class EvaluationConfig:
    """How the candidate is judged on test days."""

    requests: int = Field(2000, ge=1)
    """Test requests replayed over the whole city, newest first."""
    calibration_requests: int = Field(12000, ge=1)
    """Test requests whose shown pages are read for AUC, log-loss and Dev on exposed ads; clicks are rare, so more than are replayed."""
    batch: int = Field(64, ge=1)
    """Requests encoded at a time."""
    misreport_points: int = Field(9, ge=2)
    """Trial bids inside every interval between two thresholds when regret is measured."""
    audited_losers: int = Field(5, ge=0)
    """Ads a request, next to those displayed, whose gain from overbidding is measured."""
    audited_requests: int = Field(24, ge=1)
    """Of EGA (V2), whose pages are generated anew for every trial bid: requests whose ads try other bids, spread over those replayed."""
    recall_at: int = Field(50, ge=1)
    """k of Recall@k."""


@dataclass(frozen=True)
class Replay:
    """Metrics (JSON-ready), per-request rows for paired comparisons, pages for the market's truth, and data for plots."""

    metrics: dict[str, Any]
    per_request: pd.DataFrame
    """policy, request_id, user_id, clicks, revenue (currency), bid_value: sums over the page by the evaluation evaluator."""
    pages: pd.DataFrame
    """policy, request_id, slot, ad_id, bid, payment, pctr (of the evaluator that priced), judged_pctr (of the evaluation evaluator); one row a displayed ad."""
    recall: pd.DataFrame
    """request_id, user_id, recall: Recall@k of every replayed request, NaN where there was nothing to find."""
    plots: dict[str, np.ndarray]
    """exposed_click, exposed_pctr (calibration, ROC); learned (if the model has a payment network), critical, bid of displayed ads (scatter); lie_* (see `_lies`)."""


SEPARABLE = "separable"
"""The ranking by q*b of the same pre-trained model (A = M = 0), beside a trained generator."""


@dataclass(frozen=True)
class Incumbent:
    """The approved model that a candidate has to beat."""

    network: RankingModel
    vocabulary: dict[str, list[int]]
    """Tables of its vocab.json."""
    mode: PriceMode | Literal["implicit"]
    """How it charges; `implicit` pages are EGA (V2)'s."""
    version: str


def replay(network: RankingModel, samples: Samples, config: EvaluationConfig, incumbent: Incumbent | None = None) -> Replay:
    """Replay the newest test requests under every price mode; an incumbent model's pages are judged by the same evaluator."""
    rows = newest(samples.split_rows(schema.TEST), config.requests)
    if len(rows) == 0:
        raise ValueError("no test requests: the logs need impressions on the test days (sampling.test_days)")
    network.eval()
    requests: list[pd.DataFrame] = []
    pages: list[pd.DataFrame] = []
    kind, modes = network.config.kind, price_modes(network)
    regret = {judge: {name: RegretOfRule() for name in modes} for judge in ("evaluation", "model")}
    exposed: dict[str, list[np.ndarray]] = {name: [] for name in ("click", "set", "evaluator", "evaluation", "user")}
    scatter: dict[str, list[np.ndarray]] = {name: [] for name in ("learned", "critical", "bid") if name in (*modes, "bid")}
    recalls: list[np.ndarray] = []
    lies: dict[str, np.ndarray] = {}
    for pool in pools_of(network, samples, rows, config):
        recalls.append(_recall(pool, samples, config.recall_at))
        logged, frame = _logged(network, pool, samples, exposed)
        requests.append(frame)
        pages.append(logged)
        for policy in (kind, SEPARABLE) if network.generator is not None else (kind,):
            served = allocate(network, pool, learned=policy == kind)
            judged = allocate(network, pool, learned=policy == kind, evaluator=network.evaluation_evaluator)
            for name in modes:
                if policy == SEPARABLE and name == "learned":
                    continue  # the payment network was trained on the generator's pages
                price = prices(network, pool, served, name)
                tag = f"{policy}/{name}"
                requests.append(_request_frame(tag, pool, samples, judged, price))
                pages.append(_page_frame(tag, pool, samples, served, price, judged.ctr))
                if policy == kind:
                    regret["evaluation"][name].add(network, pool, samples, served, judged, price, judged.ctr, name, config.misreport_points)
                    regret["model"][name].add(network, pool, samples, served, served, price, served.ctr, name, config.misreport_points)
            if policy == kind:
                near, near_judged = audit_losers(network, pool, served, config.audited_losers, (network.evaluator, network.evaluation_evaluator))
                for name in modes:
                    regret["evaluation"][name].add_losers(network, pool, near, near_judged, name, config.misreport_points)
                    regret["model"][name].add_losers(network, pool, near, near, name, config.misreport_points)
                lies = lies or _lies(network, pool, samples, served)
                shown = served.pages >= 0
                unit = pool.unit[:, None]
                for key, value in (*((mode, prices(network, pool, served, mode)) for mode in ("learned",) if mode in modes), ("critical", served.critical), ("bid", served.bid)):
                    scatter[key].append((value * unit)[shown])
        if incumbent is not None:
            frames = _incumbent(network, incumbent, pool, samples, config)
            pages.append(frames[0])
            requests.append(frames[1])
    read_only = newest(samples.split_rows(schema.TEST), config.calibration_requests)
    _read(network, samples, np.setdiff1d(read_only, rows), exposed)
    per_request, all_pages = (pd.concat(frames, ignore_index=True) for frames in (requests, pages))
    y, q = (np.concatenate(exposed[name]) for name in ("click", "evaluator"))
    base, other = (np.concatenate(exposed[name]) for name in ("set", "evaluation"))
    _, low_level, high_level = mean_and_interval(q, np.concatenate(exposed["user"]), over=y)
    ranking = pretrain_metrics(network, samples, rows, 2 * config.batch)
    asked = np.sort(rows)
    found = pd.DataFrame({"request_id": samples.request_id[asked], "user_id": samples.user_id[asked], "recall": np.concatenate(recalls)})
    recall, low, high = mean_and_interval(*_with_users(found["recall"].to_numpy(), found["user_id"].to_numpy()))
    metrics: dict[str, Any] = {
        "policy": kind,
        "requests": len(rows),
        "ranking": {
            "auc": ranking["auc"], "auc_exposed_sampled": ranking["auc_exposed"], "auc_exposed": auc(y, base), "auc_evaluator": auc(y, q),
            "auc_evaluation_evaluator": auc(y, other), "log_loss_set": log_loss(y, base), "log_loss_evaluator": log_loss(y, q),
            "dev": deviation(q, y), "pctr_over_ctr_interval": [low_level, high_level], "dev_set": deviation(base, y), "dev_set_sampled": ranking["dev"],
            f"recall_at_{config.recall_at}": recall, f"recall_at_{config.recall_at}_interval": [low, high],
        },
        "policies": policy_table(per_request),
        "off_policy": offpolicy_table(all_pages, samples, asked),
        "psi": {
            name: {**value.psi(), **{f"{key}_model": mine for key, mine in regret["model"][name].psi().items() if key.startswith("psi_")}}
            for name, value in regret["evaluation"].items()
        },
    }  # fmt: skip
    plots = {"exposed_click": y, "exposed_pctr": q, **{name: np.concatenate(value) for name, value in scatter.items()}, **lies}
    return Replay(metrics, per_request, all_pages, found, plots)


def _with_users(values: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = np.isfinite(values)
    return (values[kept], np.asarray(users)[kept]) if kept.any() else (np.array([np.nan]), np.array([0]))


def pools_of(network: RankingModel, samples: Samples, rows: np.ndarray, config: EvaluationConfig) -> Iterator[Pool]:
    """Requests `rows` over the whole city, a batch at a time."""
    rows = np.sort(rows)
    parts = (rows[start : start + config.batch] for start in range(0, len(rows), config.batch))
    return ahead(lambda part: encode_city(network, samples, part, candidates=1 << 30, seed=0, batch=config.batch), parts, samples.device)


def _recall(pool: Pool, samples: Samples, k: int) -> np.ndarray:
    """Recall@k of what the user clicked or visited elsewhere in the session, among all active ads of the city, by set-aware pCTR."""
    score = torch.sigmoid(pool.click).numpy(force=True) * pool.mask.numpy(force=True)
    targets = [positions_of(pool.ad_rows[i], np.asarray(samples.target[row])) for i, row in enumerate(pool.requests)]
    return recall_at(score, targets, k)


def positions_of(ad_rows_N: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Candidate positions of rows of the ad table; those that are no candidates (or -1) are left out."""
    found = places_of(wanted, ad_rows_N)
    return found[found >= 0]


@torch.no_grad()
def _logged(network: RankingModel, pool: Pool, samples: Samples, exposed: dict[str, list[np.ndarray]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pages that were really shown, read by the evaluators: calibration, and the incumbent of a first run."""
    slots = network.config.slots
    rows = pool.requests
    page = logged_pages(pool, samples)
    tensor = pool.tensor(page)
    ctr = {}
    for name, evaluator in (("evaluator", network.evaluator), ("evaluation", network.evaluation_evaluator)):
        logit, _ = page_logits(evaluator, pool, tensor)
        ctr[name] = torch.sigmoid(logit).double().numpy(force=True)
    ctr["set"] = torch.sigmoid(torch.gather(pool.click, 1, tensor.clamp(min=0))).double().numpy(force=True)
    shown = page >= 0
    exposed["click"].append(np.asarray(samples.click[rows, :slots])[shown])
    exposed["user"].append(np.broadcast_to(np.asarray(samples.user_id[rows])[:, None], shown.shape)[shown])
    for name, value in ctr.items():
        exposed[name].append(value[shown])
    payment = np.nan_to_num(np.asarray(samples.exposed_payment[rows])) * shown
    bid = np.nan_to_num(np.asarray(samples.exposed_bid[rows])) * shown
    frame = _sum_frame("logged", pool, samples, ctr["evaluation"] * shown, payment, bid)
    return _rows_frame("logged", pool, samples, page, bid, payment, ctr["evaluator"], ctr["evaluation"]), frame


@torch.no_grad()
def _read(network: RankingModel, samples: Samples, rows: np.ndarray, exposed: dict[str, list[np.ndarray]]) -> None:
    """`_logged` for requests of which only the shown ads' pCTRs are wanted."""
    if len(rows) == 0:
        return
    data = encode_exposed(network, samples, rows, whole_city=True)
    shown = data["mask"]
    page = [data[name] for name in PAGE_INPUTS]
    exposed["click"].append(data["click"][shown].numpy(force=True).astype(samples.click.dtype))
    exposed["user"].append(np.broadcast_to(np.asarray(samples.user_id[rows])[:, None], shown.shape)[shown.numpy(force=True)])
    exposed["set"].append(torch.sigmoid(data["click_logit"])[shown].double().numpy(force=True))
    for name, evaluator in (("evaluator", network.evaluator), ("evaluation", network.evaluation_evaluator)):
        exposed[name].append(torch.sigmoid(evaluator(*page)[0])[shown].double().numpy(force=True))


@torch.no_grad()
def refereed_clicks(network: RankingModel, samples: Samples, rows: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """[R, K] click probability, by `network`'s evaluation evaluator, of pages [R, K] (rows of the ad table, -1 none) for ascending requests `rows`."""
    data = encode_exposed(network, samples, rows, whole_city=True, shown=pages)
    logit, _ = network.evaluation_evaluator(*(data[name] for name in PAGE_INPUTS))
    return torch.sigmoid(logit).double().numpy(force=True) * data["mask"].numpy(force=True)


INCUMBENT = "incumbent"


@torch.no_grad()
def _incumbent(network: RankingModel, incumbent: Incumbent, pool: Pool, samples: Samples, config: EvaluationConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pages and prices of the incumbent for the pool's requests, with CTRs of the candidate's evaluation evaluator."""
    theirs = encode_city(incumbent.network, samples.translate(incumbent.vocabulary), pool.requests, 1 << 30, 0, config.batch)
    served = allocate(incumbent.network, theirs)
    price = prices(incumbent.network, theirs, served, incumbent.mode)
    # Both pools hold the whole city in the same order, so positions carry over.
    logit, _ = page_logits(network.evaluation_evaluator, pool, pool.tensor(served.pages))
    ctr = torch.sigmoid(logit).double().numpy(force=True) * (served.pages >= 0)
    unit = pool.unit[:, None]
    return _page_frame(INCUMBENT, pool, samples, served, price, ctr), _sum_frame(INCUMBENT, pool, samples, ctr, price * unit, served.bid * unit)


def _request_frame(tag: str, pool: Pool, samples: Samples, judged: Pages, price: np.ndarray) -> pd.DataFrame:
    unit = pool.unit[:, None]
    return _sum_frame(tag, pool, samples, judged.ctr, price * unit, judged.bid * unit)


def _sum_frame(tag: str, pool: Pool, samples: Samples, ctr: np.ndarray, price: np.ndarray, bid: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({
        "policy": tag, "request_id": samples.request_id[pool.requests], "user_id": samples.user_id[pool.requests],
        "clicks": ctr.sum(1), "revenue": (ctr * price).sum(1), "bid_value": (ctr * bid).sum(1),
    })  # fmt: skip


def _page_frame(tag: str, pool: Pool, samples: Samples, pages: Pages, price: np.ndarray, judged: np.ndarray) -> pd.DataFrame:
    unit = pool.unit[:, None]
    return _rows_frame(tag, pool, samples, pages.pages, pages.bid * unit, price * unit, pages.ctr, judged)


def _rows_frame(
    tag: str, pool: Pool, samples: Samples, page: np.ndarray, bid: np.ndarray, price: np.ndarray, ctr: np.ndarray, judged: np.ndarray
) -> pd.DataFrame:
    request, slot = np.nonzero(page >= 0)
    ad_rows = pool.ad_rows[request, page[request, slot]]
    return pd.DataFrame({
        "policy": tag, "request_id": samples.request_id[pool.requests][request], "slot": (slot + 1).astype(np.int32), "ad_id": np.asarray(samples.ad_id)[ad_rows],
        "bid": bid[request, slot], "payment": price[request, slot],
        "pctr": ctr[request, slot].astype(np.float32), "judged_pctr": judged[request, slot].astype(np.float32),
    })  # fmt: skip


def policy_table(per_request: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """eCTR (%) and eRPM (currency per 1000 requests) per request, paper Sec. 5.1.2, with intervals clustered by user."""
    table: dict[str, dict[str, Any]] = {}
    for policy, rows in per_request.groupby("policy", sort=False):
        users = rows["user_id"].to_numpy()
        ectr, erpm, bids = (mean_and_interval(rows[name].to_numpy(), users) for name in ("clicks", "revenue", "bid_value"))
        table[str(policy)] = {
            "ectr_percent": 100 * ectr[0], "ectr_interval": [100 * x for x in ectr[1:]],
            "erpm": 1000 * erpm[0], "erpm_interval": [1000 * x for x in erpm[1:]], "bid_value_per_1000": 1000 * bids[0],
        }  # fmt: skip
    return table


def offpolicy_table(pages: pd.DataFrame, samples: Samples, rows: np.ndarray) -> dict[str, Any]:
    """Clicks (% a request) and revenue (per 1000 requests) of every policy's pages, estimated from what happened on the logged ones.

    `logged` holds what was really clicked and paid; every policy the forecast of the evaluator that it was trained on
    (`reward_model`) and `off_policy.estimate` under both assumptions about readers.
    """
    ids = np.asarray(samples.request_id[rows])
    order = np.argsort(ids)
    slots = samples.propensity.shape[1]
    candidate, user = np.asarray(samples.candidate[rows, :slots]), np.asarray(samples.user_id[rows])
    shown = candidate >= 0
    log = LoggedPages(np.where(shown, np.asarray(samples.ad_id)[candidate], -1), np.asarray(samples.propensity[rows], np.float64), np.asarray(samples.click[rows, :slots]) * shown, user)
    paid = log.click * np.nan_to_num(np.asarray(samples.exposed_payment[rows]))
    table: dict[str, Any] = {"requests": len(rows), "policies": {}}
    table["logged"] = {"ectr_percent": [100 * x for x in mean_and_interval(log.click.sum(1), user)], "erpm": [1000 * x for x in mean_and_interval(paid.sum(1), user)]}
    for policy, frame in pages[pages["policy"] != "logged"].groupby("policy", sort=False):
        at = order[np.searchsorted(ids[order], frame["request_id"].to_numpy())], frame["slot"].to_numpy() - 1

        def grid(name: str, empty: float, frame: pd.DataFrame = frame, at: tuple[np.ndarray, np.ndarray] = at) -> np.ndarray:
            values = np.full((len(rows), slots), empty, frame[name].dtype)
            values[at] = frame[name].to_numpy()
            return values

        page, price, forecast = grid("ad_id", -1), grid("payment", 0.0), grid("judged_pctr", 0.0).astype(np.float64)
        entry: dict[str, Any] = {}
        for measure, scale, value in (("ectr_percent", 100.0, np.ones_like(price)), ("erpm", 1000.0, price)):
            entry[measure] = {"reward_model": scale * float((grid("pctr", 0.0) * value).sum(1).mean())}
            for structure in STRUCTURES:
                entry[measure][structure] = estimate(log, page, scale * value, forecast, structure)
        table["policies"][str(policy)] = entry
    return table


class RegretOfRule:
    """Regret of one price mode: displayed ads' over their utility, the nearest losers' over the same, and how it is earned."""

    def __init__(self) -> None:
        self.regret = self.utility = self.losers = self.shading = 0.0
        self.ratios: list[np.ndarray] = []
        self.worst: dict[str, Any] | None = None

    def add(self, network: RankingModel, pool: Pool, samples: Samples, served: Audit, judged: Audit, price: np.ndarray, ctr: np.ndarray, mode: PriceMode, points: int) -> None:
        """Displayed ads: `served` prices, `judged` says how often they would be clicked; price, ctr [B, K] as played."""
        shown = served.pages >= 0
        utility = (judged.bid - price) * ctr * shown
        best, bid = _best(network, pool, served, judged, mode, _interval_bids(served, points))
        grid, grid_bid = _best(network, pool, served, judged, mode, served.bid[:, :, None] * PAPER_GRID)
        best, bid = np.maximum(best, grid), np.where(grid > best, grid_bid, bid)
        gain = np.maximum(best - utility, 0.0) * shown
        self.regret += float(gain.sum())
        self.shading += float(gain[bid < served.bid].sum())
        self.utility += float(utility.sum())
        rated = shown & (utility > 0)
        self.ratios.append(np.maximum(grid - utility, 0.0)[rated] / utility[rated])
        unit = pool.unit[:, None]
        at = np.unravel_index(int(np.argmax(gain * unit)), gain.shape)
        if gain[at] > 0 and (self.worst is None or float((gain * unit)[at]) > self.worst["gain"]):
            amounts = {"value": served.bid, "best_bid": bid, "utility": utility, "gain": gain}
            row = pool.ad_rows[at[0], served.pages[at]]
            self.worst = {
                "request_id": int(samples.request_id[pool.requests[at[0]]]), "ad_id": int(samples.ad_id[row]), "slot": int(at[1]) + 1,
                **{name: float((value * unit)[at]) for name, value in amounts.items()},
            }  # fmt: skip

    def add_losers(self, network: RankingModel, pool: Pool, served: Audit, judged: Audit, mode: PriceMode, points: int) -> None:
        """Ads that are not displayed have no utility as played: whatever they can get is gain."""
        best, _ = _best(network, pool, served, judged, mode, _interval_bids(served, points))
        self.losers += float(np.maximum(best, 0.0)[served.pages >= 0].sum())

    def psi(self) -> dict[str, Any]:
        """psi_exact: ratio of sums, winners; psi_loser: losers' gains over the same utility; psi_paper: the paper's grid, mean of ratios."""
        ratios = np.concatenate(self.ratios) if self.ratios else np.zeros(0)
        exact, loser = ((value / self.utility if self.utility > 0 else float("nan")) for value in (self.regret, self.losers))
        return {
            "psi_exact": exact, "psi_loser": loser, "psi_paper": float(ratios.mean()) if len(ratios) else float("nan"),
            "shading_share": self.shading / self.regret if self.regret > 0 else None, "worst": self.worst,
        }  # fmt: skip


PAPER_GRID = np.arange(1, 11) * 0.2


def _interval_bids(pages: Audit, points: int) -> np.ndarray:
    """[B, J, K*points]: bids spread over every interval between thresholds, its lower edge included (the best response of a
    rule whose price does not read the own bid)."""
    low = np.maximum(np.where(np.isfinite(pages.theta), pages.theta, 0.0), pages.reserve[..., None])
    high = np.concatenate([np.maximum(2 * pages.bid, 2 * low[..., 0])[..., None], low[..., :-1]], -1)
    share = np.linspace(1e-6, 1.0, points)
    return (low[..., None] + (high - low)[..., None] * share).reshape(*pages.bid.shape, -1)


def _best(network: RankingModel, pool: Pool, served: Audit, judged: Audit, mode: PriceMode, trial_bids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best utility of every audited ad over trial bids and the bid that gives it, [B, J] each: prices as served, CTRs as judged."""
    bidding = try_bids(pool, served, trial_bids)
    clicks = try_bids(pool, judged, trial_bids).ctr
    utility = (judged.bid[:, :, None] - trial_prices(network, pool, served, bidding, mode)) * clicks
    at = utility.argmax(-1)[..., None]
    return np.take_along_axis(utility, at, -1)[..., 0], np.take_along_axis(trial_bids, at, -1)[..., 0]


LIES, LIARS = 81, 4
"""Bids tried, from 0 to twice the value, and ads shown, in the plot of gains against the own bid."""


def _lies(network: RankingModel, pool: Pool, samples: Samples, served: Pages) -> dict[str, np.ndarray]:
    """What a few displayed ads would gain over bidding their value, for bids from 0 to twice the value, by the evaluator that prices.

    lie_bid [A, LIES] and lie_value [A] in currency per click, lie_ad and lie_slot [A], lie_<price mode> [A, LIES] in currency per request.
    The ads: spread over the slots and the requests of the pool, each only once.
    """
    request, slot = np.nonzero(served.pages >= 0)
    ads = pool.ad_rows[request, served.pages[request, slot]]
    _, first = np.unique(ads, return_index=True)
    first = np.sort(first)
    pick = first[np.unique(np.linspace(0, len(first) - 1, LIARS).astype(int))] if len(first) else first
    request, slot = request[pick], slot[pick]
    trial = served.bid[:, :, None] * np.linspace(0.0, 2.0, LIES)
    bidding = try_bids(pool, served, trial)
    unit = pool.unit[request]
    result = {
        "lie_bid": trial[request, slot] * unit[:, None], "lie_value": served.bid[request, slot] * unit,
        "lie_ad": np.asarray(samples.ad_id)[ads[pick]], "lie_slot": slot + 1,
    }  # fmt: skip
    for mode in price_modes(network):
        utility = ((served.bid[:, :, None] - trial_prices(network, pool, served, bidding, mode)) * bidding.ctr)[request, slot] * unit[:, None]
        result[f"lie_{mode}"] = utility - utility[:, LIES // 2 : LIES // 2 + 1]
    return result


def trial_prices(network: RankingModel, pool: Pool, served: Audit, bidding: Bidding, mode: PriceMode) -> np.ndarray:
    """Price per click of trial bids, [B, J, T]."""
    if mode == "critical":
        return bidding.critical
    if mode == "first_price":
        return bidding.bid
    if mode == "learned":
        with torch.no_grad():
            return learned_prices(network, pool, served, bidding).double().numpy(force=True)
    at = np.maximum(bidding.slot, 0)
    below = scores_below(pool, served)
    if mode == "vcg":
        owed = position_prices(below, slot_clicks(network, below.shape[-1]))
    elif mode == "gsp":
        owed = below
    else:
        raise ValueError(f"price mode {mode!r} is unknown; use one of {', '.join(PRICE_MODES)}")
    owed_at = np.take_along_axis(np.einsum("bjll->bjl", owed), at, 2)
    return second_price(owed_at, np.maximum(served.set_ctr, 1e-12)[:, :, None], bidding.bid, served.reserve[:, :, None])


def scores_below(pool: Pool, pages: Audit) -> np.ndarray:
    """pCTR * bid of the ad below every slot of every counterfactual page, [B, J, K, K]; below the last: of the best ad that is on none of it."""
    scores = torch.sigmoid(pool.click).double().numpy(force=True) * pool.bid.double().numpy(force=True) * pool.allowed.numpy(force=True)
    batch, ads, slots = pages.theta.shape
    flat = pages.moved.reshape(batch, ads * slots, slots)
    below = np.zeros(flat.shape)
    for page in range(ads * slots):
        shown, rest = flat[:, page], scores.copy()
        request, place = np.nonzero(shown >= 0)
        below[request, page, place] = scores[request, shown[request, place]]
        rest[request, shown[request, place]] = 0.0
        below[:, page] = np.concatenate([below[:, page, 1:], rest.max(1)[:, None]], 1)
    return below.reshape(batch, ads, slots, slots)
