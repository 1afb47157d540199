"""Replay of test days by EGA (V2): pages of ads and organic results under every price rule, read by the second reward model.

Shape letters: R requests, X candidates, N ads of a city, P places of a page, A audited ads, G trial bids. Money leaves this module in currency.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from auction.implicit import draws, implicit_price, probe_bids
from marketplace import schema
from model.ega_v2.allocation import ItemFeatures
from model.ega_v2.data import PageData
from model.ega_v2.model import EgaV2Model
from model.ega_v2.network import NONE, Memory, RewardModel
from model.ega_v2.payment import RULES, Audit, Rule, outcomes, prices, probed, regret_of, shown_pages
from model.ega_v2.training import audited
from model.evaluation.metrics import auc, deviation, log_loss, mean_and_interval, recall_at
from model.evaluation.replay import INCUMBENT, PAPER_GRID, EvaluationConfig, Incumbent, Replay, policy_table
from model.training.data import Samples
from model.training.stages import newest

TRIAL_FACTORS = (*(round(0.05 * step, 2) for step in range(1, 41)), 2.5, 3.0, 4.0)
"""Bids tried when regret is measured, as factors of the value; the paper's grid is among them."""
LIARS = 4
"""Displayed ads in the plot of gains against the own bid."""
_AT_ONCE, _ROWS_AT_ONCE = 16, 16_384
"""Requests, and candidates of requests, that are scored at a time."""


def replay_v2(model: EgaV2Model, samples: Samples, config: EvaluationConfig, incumbent: Incumbent | None = None) -> Replay:
    """Replay the newest test requests; an incumbent's pages are judged by the same second reward model.

    Off-policy estimates are left out: the logging policy chose neither places among organic results nor creatives, so its logs say nothing of such choices.
    """
    rows = np.sort(newest(samples.split_rows(schema.TEST), config.requests))
    if len(rows) == 0:
        raise ValueError("no test requests: the logs need impressions on the test days (sampling.test_days)")
    model.eval()
    data = PageData(samples, model)
    pages = generated(data, rows)
    frames = [logged_pages(data, rows), *(priced(pages, f"ega_v2/{rule}", rule) for rule in RULES)]
    if incumbent is not None:
        theirs = PageData(samples.translate(incumbent.vocabulary), incumbent.network)
        mode: Any = incumbent.mode
        frames.append(priced(generated(theirs, rows, judge=data, rules=(mode,)), INCUMBENT, mode))
    all_pages = pd.concat(frames, ignore_index=True)
    per_request = pd.concat([_per_request(frame, samples, rows) for frame in frames], ignore_index=True)
    found, ranking = _ranking(data, rows, config)
    few = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), config.audited_requests)).astype(int))]
    psi, lies = _psi(data, few, config)
    y, q = ranking.pop("_click"), ranking.pop("_pctr")
    metrics = {"policy": "ega_v2", "requests": len(rows), "audited_requests": len(few), "ranking": ranking, "policies": policy_table(per_request), "off_policy": None, "psi": psi}
    return Replay(metrics, per_request, all_pages, found, {"exposed_click": y, "exposed_pctr": q, **lies})


@torch.inference_mode()
def generated(data: PageData, rows: np.ndarray, best_of_beam: bool = True, judge: PageData | None = None, rules: tuple[Rule, ...] = RULES, **changed: Any) -> pd.DataFrame:
    """One page a request: request_id, slot, ad_id, bid, pctr, judged_pctr, creative_id, above and price_<rule> per click for each of `rules`, one row a displayed ad.

    `best_of_beam` false: the likeliest page of the search, which no reward model has chosen. `judge`: whose second reward model reads the pages, by default
    the model's own. `changed`: other settings of the search.
    """
    samples, network, v2 = data.samples, data.model.core, data.model.config.ega_v2
    config = replace(v2.search, **changed)
    frames = []
    for mine, history, catalogue, offers, features in tqdm(list(data.groups(rows, samples.slots)), desc="pages", unit="day", disable=not sys.stderr.isatty()):
        found = data.city_offers(int(samples.day[mine[0]]), int(samples.city_code[mine[0]]))
        reserve = torch.from_numpy(found.city.reserve)
        for index, row in enumerate(mine):
            part = slice(index, index + 1)
            own = ItemFeatures(*(values[part] for values in vars(features).values()))
            memory = network.encode(history.rows(part))
            shown, page, _ = shown_pages(network, memory, catalogue, offers.rows(part), own, reserve, config, best_of_beam, data.model.evaluation)
            ad = page.ad[0, 0].numpy()
            at = np.flatnonzero(ad >= 0)
            money = {"bid": shown.bid, **{f"price_{rule}": prices(network, shown, rule) for rule in rules if rule != "implicit"}}
            if "implicit" in rules:
                drawn = np.array([draws(int(samples.request_id[row]), int(one), v2.probes) for one in np.asarray(samples.ad_id)[found.city.rows[ad[at]]]]).reshape(len(at), v2.probes)
                bid, floor, ctr = (values[0].double().numpy()[at] for values in (shown.bid, shown.reserve, shown.ctr))
                less = torch.from_numpy(probe_bids(bid, floor, drawn))
                clicks = probed(network, memory, catalogue, offers.rows(part), own, reserve, config, page.ad[0, 0][at], less, best_of_beam)
                money["price_implicit"] = torch.zeros(shown.bid.shape, dtype=torch.float64)
                money["price_implicit"][0, at] = torch.from_numpy(implicit_price(bid, floor, ctr, clicks.numpy()))
            frames.append(pd.DataFrame({
                "request_id": samples.request_id[row], "slot": np.arange(1, len(at) + 1, dtype=np.int32), "ad_id": np.asarray(samples.ad_id)[found.city.rows[ad[at]]],
                **{name: values[0].double().numpy()[at] * found.city.unit for name, values in money.items()}, "pctr": shown.ctr[0].numpy()[at], "judged_pctr": shown.judged[0].numpy()[at],
                "creative_id": np.asarray(samples.creative_id)[found.creative_rows[page.creative[0, 0].numpy()[at]]], "above": at - np.arange(len(at)),
            }))  # fmt: skip
    pages = pd.concat(frames, ignore_index=True)
    return pages if judge is None else pages.assign(judged_pctr=read_pages(judge, rows, pages))


def priced(pages: pd.DataFrame, policy: str, rule: Rule) -> pd.DataFrame:
    """`generated` pages as a policy that charges by `rule`: with policy and payment, without the other prices."""
    return pages.assign(policy=policy, payment=pages[f"price_{rule}"]).drop(columns=[name for name in pages if name.startswith("price_")])


@torch.inference_mode()
def read_pages(data: PageData, rows: np.ndarray, pages: pd.DataFrame) -> np.ndarray:
    """Chance of a click on each ad of `pages` [one row an ad] by the second reward model; requests are those of `rows`, ascending."""
    samples = data.samples
    request = _row_of(np.asarray(samples.request_id[rows]), pages["request_id"].to_numpy())
    slots = samples.slots
    ad, creative, above = (np.full((len(rows), slots), value, np.int64) for value in (-1, -1, 0))
    at = request, pages["slot"].to_numpy() - 1
    ad[at] = np.searchsorted(np.asarray(samples.ad_id), pages["ad_id"].to_numpy())
    creative[at] = _row_of(np.asarray(samples.creative_id), pages["creative_id"].to_numpy())
    above[at] = pages["above"].to_numpy()
    chance = np.zeros(ad.shape)
    for start in range(0, len(rows), 64):
        part = slice(start, start + 64)
        items, places = data.pages_of(rows[part], ad[part], creative[part], above[part])
        logit = data.model.evaluation(data.model.core.encode(data.history(rows[part])), items).poi_click
        chance[part] = np.take_along_axis(torch.sigmoid(logit.double()).numpy(), places, 1)
    return chance[at]


@torch.inference_mode()
def logged_pages(data: PageData, rows: np.ndarray) -> pd.DataFrame:
    """The pages that were shown, with policy "logged"; pctr by the reward model, judged_pctr by the second one."""
    samples = data.samples
    ad = np.asarray(samples.candidate[rows, : samples.slots])
    request, slot = np.nonzero(ad >= 0)
    at = rows[request]
    values = {name: np.asarray(getattr(samples, f"exposed_{name}"))[at, slot].astype(np.float64) for name in ("bid", "payment")}
    pctr = {name: read_logged(data, reward, rows)[request, slot] for name, reward in (("pctr", data.model.core.reward), ("judged_pctr", data.model.evaluation))}
    return pd.DataFrame({
        "policy": "logged", "request_id": np.asarray(samples.request_id)[at], "slot": (slot + 1).astype(np.int32), "ad_id": np.asarray(samples.ad_id)[ad[request, slot]], **values, **pctr,
        "creative_id": np.asarray(samples.creative_id)[np.asarray(samples.exposed_creative)[at, slot]], "above": np.asarray(samples.above, np.int64)[at, slot],
    })  # fmt: skip


@torch.inference_mode()
def read_logged(data: PageData, reward: RewardModel, rows: np.ndarray) -> np.ndarray:
    """[R, K] chance of a click on every ad of the logged pages; 0 where there was none."""
    samples = data.samples
    result = np.zeros((len(rows), samples.slots))
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        page = data.logged_pages(part)
        chance = torch.sigmoid(reward(data.model.core.encode(data.history(part)), page.items).poi_click.double()).numpy()
        is_ad = page.ad_row >= 0
        slot = np.cumsum(is_ad, 1) - 1
        request, place = np.nonzero(is_ad)
        result[start + request, slot[request, place]] = chance[request, place]
    return result


@torch.inference_mode()
def choice_scores(data: PageData, rows: np.ndarray, ads_RX: np.ndarray) -> np.ndarray:
    """[R, X] log P(POI | S): the chance that the search writes the ad's POI first among the city's active ads, without bids.

    -inf where `ads_RX` (rows of the ad table) is -1 or not active; rows ascending.
    """
    network, samples = data.model.core, data.samples
    result = np.full(ads_RX.shape, -np.inf)
    for mine, history, catalogue, _, _ in data.groups(rows, samples.slots):
        trie, city = catalogue.poi, data.city_offers(int(samples.day[mine[0]]), int(samples.city_code[mine[0]])).city.rows
        at = np.searchsorted(rows, mine)
        ads = ads_RX[at]
        item = np.searchsorted(city, ads).clip(max=len(city) - 1)
        active = city[item] == ads
        above = trie.ancestor[trie.position[torch.from_numpy(item)]]  # [R, X, C + 1]
        step = max(1, _ROWS_AT_ONCE // ads.shape[1])
        for start in range(0, len(mine), step):
            part = slice(start, start + step)
            memory, nodes = network.encode(history.rows(part)), above[part].flatten(0, 1)
            wide = Memory(*(values.repeat_interleave(ads.shape[1], 0) for values in (memory.token, memory.mask)))
            codes = data.place_codes[torch.from_numpy(np.asarray(samples.ad_place_row)[city[item[part]]].astype(np.int64))].flatten(0, 1)
            none = torch.full((len(codes), 1, data.model.tokens.creative_layers), NONE)
            logits = network.page_logits(wide, codes.unsqueeze(1), none).poi[:, 0].double()
            score = torch.zeros(len(codes), dtype=torch.float64)
            for layer in range(trie.depth):
                legal = trie.children(nodes[:, layer], layer)
                others = torch.where(legal.real, torch.gather(logits[:, layer], 1, legal.code), -torch.inf)
                score += torch.gather(logits[:, layer], 1, codes[:, layer : layer + 1]).squeeze(1) - torch.logsumexp(others, 1)
            result[at[part]] = np.where(active[part], score.view(-1, ads.shape[1]).numpy(), -np.inf)
    return result


def _ranking(data: PageData, rows: np.ndarray, config: EvaluationConfig) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Recall@k a request, and the ranking metrics of a replay; `_click` and `_pctr` of exposed ads are for the plots."""
    samples, k = data.samples, config.recall_at
    candidate = np.asarray(samples.candidate[rows])
    score, label = choice_scores(data, rows, candidate), np.asarray(samples.click[rows])
    inside, exposed = candidate >= 0, (candidate >= 0) & (np.arange(candidate.shape[1]) < samples.slots)
    targets = (np.asarray(samples.target[row]) for row in rows)
    recall = recall_at(city_scores(data, rows), [target[target >= 0] for target in targets], k)
    users = np.asarray(samples.user_id[rows])
    read = newest(samples.split_rows(schema.TEST), config.calibration_requests)
    shown = np.asarray(samples.candidate[read, : samples.slots]) >= 0
    y = np.asarray(samples.click[read, : samples.slots])[shown]
    q, other = (read_logged(data, reward, read)[shown] for reward in (data.model.core.reward, data.model.evaluation))
    who = np.broadcast_to(np.asarray(samples.user_id[read])[:, None], shown.shape)[shown]
    _, low, high = mean_and_interval(q, who, over=y)
    kept = np.isfinite(recall)
    mean, least, most = mean_and_interval(recall[kept], users[kept]) if kept.any() else (float("nan"),) * 3
    ranking = {
        "auc": auc(label[inside], score[inside]), "auc_exposed": auc(label[exposed], score[exposed]), "auc_evaluator": auc(y, q), "auc_evaluation_evaluator": auc(y, other),
        "log_loss_evaluator": log_loss(y, q), "dev": deviation(q, y), "pctr_over_ctr_interval": [low, high], f"recall_at_{k}": mean, f"recall_at_{k}_interval": [least, most],
        "_click": y, "_pctr": q,
    }  # fmt: skip
    return pd.DataFrame({"request_id": samples.request_id[rows], "user_id": users, "recall": recall}), ranking


def city_scores(data: PageData, rows: np.ndarray) -> np.ndarray:
    """[R, A] `choice_scores` of all ads; -inf for those that are not active in the request's city."""
    everything = np.arange(len(data.samples.ad_id))
    bar = tqdm(range(0, len(rows), _AT_ONCE), desc="whole city", unit="batch", disable=not sys.stderr.isatty())
    return np.concatenate([choice_scores(data, rows[at : at + _AT_ONCE], np.broadcast_to(everything, (len(rows[at : at + _AT_ONCE]), len(everything)))) for at in bar])


def _per_request(frame: pd.DataFrame, samples: Samples, rows: np.ndarray) -> pd.DataFrame:
    """Sums over each page, requests without a page included."""
    at = _row_of(np.asarray(samples.request_id[rows]), frame["request_id"].to_numpy())
    clicks, payment, bid = (frame[name].to_numpy(np.float64) for name in ("judged_pctr", "payment", "bid"))
    sums = {name: np.bincount(at, values, len(rows)) for name, values in (("clicks", clicks), ("revenue", clicks * payment), ("bid_value", clicks * bid))}
    return pd.DataFrame({"policy": frame["policy"].iloc[0], "request_id": samples.request_id[rows], "user_id": samples.user_id[rows], **sums})


def _psi(data: PageData, rows: np.ndarray, config: EvaluationConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """psi of every price rule, and the plot's data: see `model.evaluation.replay` for the names."""
    samples, network = data.samples, data.model.core
    found = audited(data, rows, TRIAL_FACTORS, config.audited_losers, data.model.evaluation)
    order = np.concatenate([mine for mine, *_ in data.groups(rows, samples.slots)])
    cities = [data.city_offers(int(samples.day[row]), int(samples.city_code[row])).city for row in order]
    unit = torch.tensor([city.unit for city in cities], dtype=torch.float64)
    ad = np.stack([np.where(one >= 0, np.asarray(samples.ad_id)[city.rows[np.maximum(one, 0)]], -1) for one, city in zip(found.ad.numpy(), cities, strict=True)])
    psi = {rule: _psi_entry(network, found, rule, np.asarray(samples.request_id)[order], ad, unit) for rule in RULES}
    shown = found.place >= 0
    _, first = np.unique(ad[shown.numpy()], return_index=True)
    request, liar = (values[np.sort(first)] for values in np.nonzero(shown.numpy()))
    pick = np.unique(np.linspace(0, len(request) - 1, LIARS).astype(int)) if len(request) else np.zeros(0, int)
    request, liar = request[pick], liar[pick]
    near = [at for at, factor in enumerate(TRIAL_FACTORS) if factor <= 2.0]
    scale = unit.numpy()[request]
    value = found.value.double().numpy()[request, liar] * scale
    place = found.place.numpy()
    lies = {
        "lie_bid": value[:, None] * np.array(TRIAL_FACTORS)[near], "lie_value": value, "lie_ad": ad[request, liar],
        "lie_slot": np.array([int((shown[r] & (found.place[r] <= place[r, a])).sum()) for r, a in zip(request, liar, strict=True)], np.int64),
    }  # fmt: skip
    with torch.no_grad():
        for rule in RULES:
            _, utility, gained = (values.double().numpy() for values in outcomes(network, found, rule))
            lies[f"lie_{rule}"] = (gained[request, liar][:, near] - utility[request, liar, None]) * scale[:, None]
    return psi, lies


@torch.no_grad()
def _psi_entry(network: Any, found: Audit, rule: Rule, request_id: np.ndarray, ad_id: np.ndarray, unit: Tensor) -> dict[str, Any]:
    """One price rule's gains from lying by both reward models, as `model.evaluation.replay.RegretOfRule.psi`."""
    entry: dict[str, Any] = {}
    shown = found.place >= 0
    grid = [at for at, factor in enumerate(TRIAL_FACTORS) if np.isclose(factor, PAPER_GRID).any()]
    for suffix, judged in (("", True), ("_model", False)):
        _, utility, gained = outcomes(network, found, rule, judged)
        regret, total = regret_of(utility, gained), float(utility.sum())
        rated = shown & (utility > 0)
        ratio = (gained[..., grid].amax(-1) - utility).clamp(min=0.0)[rated] / utility[rated]
        shares = (float((regret * mask).sum()) / total if total > 0 else float("nan") for mask in (shown, ~shown))
        entry |= dict(zip((f"psi_exact{suffix}", f"psi_loser{suffix}"), shares, strict=True)) | {f"psi_paper{suffix}": float(ratio.mean()) if len(ratio) else float("nan")}
    at_best = gained.argmax(-1)
    lower = torch.tensor(TRIAL_FACTORS)[at_best] < 1
    own = regret * shown
    money = own * unit.unsqueeze(1)
    entry["shading_share"] = float((own * lower).sum() / own.sum()) if float(own.sum()) > 0 else None
    r, a = np.unravel_index(int(money.argmax()), money.shape)
    entry["worst"] = None
    if float(money[r, a]) > 0:
        scale, value = float(unit[r]), float(found.value[r, a])
        entry["worst"] = {
            "request_id": int(request_id[r]), "ad_id": int(ad_id[r, a]), "slot": int((shown[r] & (found.place[r] <= found.place[r, a])).sum()), "value": value * scale,
            "best_bid": value * scale * TRIAL_FACTORS[int(at_best[r, a])], "utility": float(utility[r, a]) * scale, "gain": float(own[r, a]) * scale,
        }  # fmt: skip
    return entry


def _row_of(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions of `wanted` in `known`, in any order."""
    order = np.argsort(known)
    return order[np.searchsorted(known[order], wanted)]
