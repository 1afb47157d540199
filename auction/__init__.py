"""The auction: allocation, prices and incentive compatibility of one page of ads. NumPy only; imports no other room.

Units: bids, prices and reserves in currency per click; CTRs are probabilities.
"""

from __future__ import annotations

from auction.allocation import greedy_allocation
from auction.checks import AuctionInputError
from auction.classic import first_price, gsp_prices, vcg_position_prices, vcg_prices
from auction.critical import Pricing, critical_prices, priced_page
from auction.implicit import draws, implicit_price, probe_bids
from auction.invariants import broken_law, is_implicit, is_truthful
from auction.myerson import Exponential, Uniform, myerson_optimal, myerson_payment
from auction.regret import GreedyRule, Outcome, Psi, Regret, exact_regret, psi
from auction.ties import tie_keys

__all__ = [
    "AuctionInputError",
    "Exponential",
    "GreedyRule",
    "Outcome",
    "Pricing",
    "Psi",
    "Regret",
    "Uniform",
    "broken_law",
    "critical_prices",
    "draws",
    "exact_regret",
    "first_price",
    "greedy_allocation",
    "gsp_prices",
    "implicit_price",
    "is_implicit",
    "is_truthful",
    "myerson_optimal",
    "myerson_payment",
    "priced_page",
    "probe_bids",
    "psi",
    "tie_keys",
    "vcg_position_prices",
    "vcg_prices",
]
