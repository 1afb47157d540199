"""Ranking with a verified bundle: city states once, then one pass a request over every active ad.

NumPy in, NumPy out; money in currency. Shape letters: N ads of the city, K slots, L behaviours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from auction.receipt import charge
from auction.ties import tie_keys
from model.bundle import Bundle
from model.ega_v1.inference import CityCache, Encoded, Execution, WholeCity
from model.ega_v1.mechanism import PRICE_MODES, Pool, PriceMode, allocate_scored, contenders, prices, slot_clicks
from model.ega_v1.network import PAGE_COLUMNS


@dataclass(frozen=True)
class CityState:
    """User-independent states of a city's ads under one model; immutable, shared by requests."""

    ad_ids: np.ndarray
    cache: CityCache
    tie_key: np.ndarray
    """[N] salted hashes that decide ties."""


@dataclass(frozen=True)
class RankedPage:
    """A priced page of K' <= K ads, in slot order."""

    rows: np.ndarray
    """Rows among the city's ads."""
    pctr: np.ndarray
    """Evaluator's click probability on this page."""
    set_pctr: np.ndarray
    """Set-aware click probability that entered the allocation."""
    price: np.ndarray
    """Charge per click, reserve <= price <= bid."""
    critical_price: np.ndarray
    """Truthful price per click, whatever mode charges."""
    theta: np.ndarray
    """[K', K] critical bids of every slot, currency per click; inf where never reached."""
    slot_ctr: np.ndarray
    """[K', K] evaluator's click probability of the ad in every slot, on the page that would then be shown."""
    next_score: np.ndarray
    """Set-aware pCTR * bid of the next ad, currency: what GSP divides by the own `set_pctr`."""
    scores_below: list[list[float]]
    """Per ad, from its slot to the last: set-aware pCTR * bid of the ad below, at last of the best not shown; 0: none."""
    slot_clicks: np.ndarray
    """[K] what clicks are worth in each slot, for VCG."""
    runner_up: np.ndarray
    """Row of the ad that takes the slot if its ad leaves; -1 if none."""
    affinity: np.ndarray
    """[K', K] A of the ad for every slot."""
    slope: np.ndarray
    """[K', K] its score for a slot is slope * set_pctr * bid + affinity; slope in 1 / currency."""
    tied: np.ndarray
    """True where only the tie key put the ad before its runner-up."""
    network_price: np.ndarray | None
    """The payment network's price before rounding, currency per click; None unless it charges."""
    repaired: np.ndarray
    """True where a non-monotone CTR was repaired for the critical price."""
    price_mode: str


class RankingEngine:
    """One immutable model ready to rank."""

    def __init__(self, bundle: Bundle, tie_salt: str = "ega", execution: Execution | None = None) -> None:
        self.bundle = bundle
        self.network = bundle.network
        self.tie_salt = tie_salt
        self.slots = bundle.network.config.slots
        mode = bundle.gates.get("price_mode", "critical")
        self.default_price_mode: PriceMode = mode if mode in PRICE_MODES else "critical"
        self.execution = execution or Execution()
        self._whole_city = WholeCity(bundle.network, self.execution)

    def prepare_city(self, ad_ids: np.ndarray, ad_fields: np.ndarray, ad_place: np.ndarray, behaviours: int = 0) -> CityState:
        """States of a city's active ads: int64 [N], int32 [N, F_ad], float32 [N, 2]. Recompute when ads come or go; bids do not matter.
        `behaviours`: L of the requests to come (0: not known), where it is worth some tenths of a second now to save a part of every one of them (`WholeCity.record`)."""
        if len(ad_ids) == 0:
            raise ValueError("a city needs at least one ad")
        fields = torch.from_numpy(np.ascontiguousarray(ad_fields)).long().unsqueeze(0)
        place = torch.from_numpy(np.ascontiguousarray(ad_place, np.float32)).unsqueeze(0)
        ids = np.asarray(ad_ids, np.int64)
        cache = self._whole_city.record(self._whole_city.prepare(fields, place), behaviours)
        return CityState(ids, cache, tie_keys(ids, self.tie_salt))

    @torch.inference_mode()
    def rank(
        self,
        city: CityState,
        user_fields: np.ndarray,
        context_fields: np.ndarray,
        behaviours: np.ndarray,
        request_place: np.ndarray,
        bids: np.ndarray,
        reserves: np.ndarray,
        eligible: np.ndarray,
        slots: int | None = None,
        price_mode: PriceMode | None = None,
        bid_unit: float | None = None,
        currency_step: float = 0.0,
        quality_floor: float = 0.0,
    ) -> RankedPage:
        """The page for one request.

        user_fields [F_user], context_fields [F_context], behaviours [L, F_behaviour] as `features.encoding` gives them;
        bids, reserves [N] currency per click; eligible [N] filters allocation only (all ads stay in the attention).
        A request for fewer slots than the model's K is an auction for the first slots only. `bid_unit` is the city's median bid;
        give the catalogue's when `bids` holds overrides, so that no bidder moves the unit by its own bid. Charges are rounded down to
        `currency_step`; 0 charges the exact price. Ads whose set-aware pCTR is below `quality_floor` are not shown.
        """
        mode = price_mode or self.default_price_mode
        wanted = self.slots if slots is None else slots
        if not 1 <= wanted <= self.slots:
            raise ValueError(f"slots must be between 1 and {self.slots} for this model, got {wanted}")
        unit = float(np.median(bids)) if bid_unit is None else float(bid_unit)
        if not (np.isfinite(unit) and unit > 0):
            raise ValueError(f"bid_unit must be finite and above 0, got {unit}")
        request = [torch.from_numpy(np.asarray(values)).long().unsqueeze(0) for values in (user_fields, context_fields, behaviours)]
        place = torch.from_numpy(np.asarray(request_place, np.float32)).unsqueeze(0)
        money = np.asarray(bids, np.float64) / unit, np.asarray(reserves, np.float64) / unit

        def survey() -> tuple[Pool, tuple[np.ndarray, ...]]:
            encoded = self._whole_city.encode(city.cache, *request, place)
            return self._market(city, encoded, *money, eligible, wanted, quality_floor, unit)

        with self._whole_city.lock:
            pool, market = self._whole_city.alone(survey)
        candidates = pool.ad_rows[0]
        pages = self._whole_city.alone(lambda: allocate_scored(pool, *market, self.network.evaluator, city.tie_key[candidates]))
        kept = pages.pages[0] >= 0
        rows = candidates[pages.pages[0][kept]]
        runner_up = pages.runner_up[0][kept]
        bid = np.asarray(bids, np.float64)[rows]
        reserve = np.asarray(reserves, np.float64)[rows]
        theta, slot_ctr = pages.theta[0][kept] * unit, pages.ctr_moved[0][kept]
        next_score, set_pctr = pages.next_score[0][kept] * unit, pages.set_ctr[0][kept]
        network_price = np.clip(prices(self.network, pool, pages, mode)[0][kept] * unit, reserve, bid) if mode == "learned" else None
        clicks = slot_clicks(self.network, wanted)
        below = [list(next_score[slot:]) + [0.0] * (wanted - len(next_score)) for slot in range(len(rows))]
        # Charged by the very function that replays receipts, from the numbers that the receipt will hold.
        charges = [
            charge(mode, slot + 1, bid[slot], reserve[slot], list(theta[slot]), slot_ctr[slot], set_pctr[slot], next_score[slot],
                   None if network_price is None else float(network_price[slot]), currency_step, below[slot], clicks)
            for slot in range(len(rows))
        ]  # fmt: skip
        return RankedPage(
            rows, pages.ctr[0][kept], set_pctr, np.array([c.price for c in charges]), np.array([c.critical for c in charges], np.float64), theta, slot_ctr,
            next_score, below, clicks, np.where(runner_up >= 0, candidates[runner_up], -1), pages.affinity[0][kept], pages.slope[0][kept] / unit, pages.tied[0][kept], network_price,
            pages.repaired[0][kept], mode,
        )  # fmt: skip

    def _market(
        self, city: CityState, encoded: Encoded, bids: np.ndarray, reserves: np.ndarray, eligible: np.ndarray, slots: int, quality_floor: float, unit: float
    ) -> tuple[Pool, tuple[np.ndarray, ...]]:
        """The ads that can matter, and the arguments of `allocate_scored` for them; bids and reserves over the unit."""
        among = np.arange(len(bids))
        q, affinity, slopes = _numbers(encoded, slots)
        shown = np.asarray(eligible, bool) if encoded.reached is None else np.asarray(eligible, bool) & encoded.reached[0].cpu().numpy()
        if encoded.again is not None:  # rounded scores say who may reach the page, exact ones who does
            among = contenders(q, bids, affinity, slopes, shown & (bids >= reserves) & (bids > 0), MAY_REACH)
            encoded = encoded.again(torch.from_numpy(among).to(encoded.h.device))
            q, affinity, slopes = _numbers(encoded, slots)
            bids, reserves, shown = bids[among], reserves[among], shown[among]
        shown = shown & (q >= quality_floor)
        rows = contenders(q, bids, affinity, slopes, shown & (bids >= reserves) & (bids > 0))
        index = torch.from_numpy(rows).to(encoded.h.device)
        h, user, click = (x.cpu() for x in (encoded.h[:, index], encoded.user, encoded.click[:, index]))
        fields = city.cache.ad_fields[:, torch.from_numpy(among[rows]).to(encoded.h.device)].cpu()
        q, bids, reserves, affinity, slopes, shown = (x[rows][None] for x in (q, bids, reserves, affinity, slopes, shown))
        pool = Pool(
            np.zeros(1, np.int64), h, fields[..., PAGE_COLUMNS], user, click, self.network.purchase_head(h, user), torch.from_numpy(bids), torch.from_numpy(reserves),
            torch.ones(1, len(rows), dtype=torch.bool), among[rows][None], np.array([unit]),
        )  # fmt: skip
        return pool, (q, bids, reserves, affinity, slopes, shown)


MAY_REACH = 64
"""Ads a slot, by rounded scores, among which the page is sought by exact ones: rounding moves an ad by a few ranks, not by fifty."""


def _numbers(encoded: Encoded, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [N], A and slopes [N, slots] in float64 on the CPU."""
    affinity, slopes = (x[0, :, :slots].double().cpu().numpy() for x in (encoded.affinity, encoded.slopes))
    return torch.sigmoid(encoded.click[0]).double().cpu().numpy(), affinity, slopes
