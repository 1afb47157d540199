"""Receipts: known charges, what is refused, and the command that replays them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from auction.receipt import NEEDED, ReceiptError, charge, difference, replay, truthful_price
from cli.main import app

GOLDEN: dict[str, Any] = {
    "request_id": 7, "slot": 1, "ad_id": 3, "mode": "critical", "bid": 5.0, "paced_bid": 5.0, "reserve": 0.0, "rank_ctr": 0.1, "next_score": 0.3,
    "currency_step": 0.01, "theta": [4.5, 4.2], "slot_ctr": [1.0, 0.6], "network_price": None, "price": 4.32, "critical_price": 4.32,
}  # fmt: skip
"""AUCTION.md, greedy with affinity: the ad in slot 1 pays 4.32 under position CTR (1, .6)."""


def test_golden_prices() -> None:
    assert truthful_price([4.5, 4.2], [1.0, 0.6], 1, 0.0, 5.0) == pytest.approx(4.32)
    assert truthful_price([2.5, 1.4], [1.0, 0.6], 2, 0.0, 1.5) == pytest.approx(1.4)
    assert truthful_price([4.5, 4.2], [1.0, 1.0], 1, 0.0, 5.0) == pytest.approx(4.2)  # slots that do not matter
    assert truthful_price([4.5, None], [1.0, 0.6], 1, 0.0, 5.0) == pytest.approx(4.5)  # the second slot is never reached
    assert truthful_price([0.0, 0.0], [0.2, 0.1], 1, 0.7, 5.0) == pytest.approx(0.7)  # nobody competes: the reserve


@pytest.mark.parametrize(("mode", "price"), [("critical", 4.32), ("gsp", 3.0), ("vcg", 1.95), ("first_price", 5.0), ("learned", 4.44), ("implicit", 3.12)])
def test_every_mode_charges_what_it_says_rounded_down(mode: str, price: float) -> None:
    # VCG: (0.3 * (1 - 0.5) + 0.09 * 0.5) / 1 / 0.1 = 1.95
    # implicit: 5 - 5 * (.05 + .025) / 2 / .1 = 3.125
    receipt = {**GOLDEN, "mode": mode, "network_price": 4.4499, "probe_ctr": [0.05, 0.025], "scores_below": [0.3, 0.09], "slot_clicks": [1.0, 0.5], "price": price, "critical_price": replay(GOLDEN).critical}
    again = replay(json.loads(json.dumps(receipt)))
    assert again.price == price <= again.exact + 1e-12
    assert difference(receipt) is None
    assert "recomputed" in str(difference({**receipt, "price": price + 0.01}))
    assert "truthful price" in str(difference({**receipt, "critical_price": 4.0}))


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ReceiptError, match=name):
        replay({key: value for key, value in GOLDEN.items() if key != name})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"slot": 0}, "slot"), ({"slot": True}, "slot"), ({"slot": 3}, "theta"), ({"bid": float("nan")}, "bid"), ({"paced_bid": 6.0}, "paced_bid <= bid"),
        ({"reserve": -1}, "reserve"), ({"theta": [1.0]}, "equally long"), ({"slot_ctr": [None, 0.1]}, "slot_ctr"), ({"slot_ctr": "x"}, "slot_ctr"),
        ({"network_price": float("inf")}, "network_price"), ({"mode": "cheap"}, "cheap"), ({"mode": "learned"}, "learned"), ({"theta": None}, "critical"),
        ({"currency_step": "0.01"}, "currency_step"), ({"mode": "vcg"}, "vcg"), ({"scores_below": [-1.0]}, "scores_below"), ({"slot_clicks": "x"}, "slot_clicks"),
        ({"scores_below": [0.3], "slot_clicks": [1.0, 0.5]}, "each slot from 1 on"), ({"scores_below": [0.3, 0.1], "slot_clicks": [0.5, 1.0]}, "must not rise"),
    ],
)  # fmt: skip
def test_what_a_receipt_may_not_hold(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ReceiptError, match=named):
        replay({**GOLDEN, **change})


def test_charges_stay_between_reserve_and_paced_bid() -> None:
    for mode in ("critical", "gsp", "vcg", "first_price", "learned"):
        found = charge(mode, 1, 2.0, 1.995, [4.5, 4.2], [1.0, 0.6], 0.1, 9.0, 5.0, 0.01, [9.0, 1.0], [1.0, 0.5])
        assert 1.995 <= found.price <= 2.0  # a reserve that is no whole step is charged as it stands


def test_replay_price_reads_one_many_and_standard_input(tmp_path: Any) -> None:
    run = CliRunner().invoke
    one, lines = tmp_path / "one.json", tmp_path / "day.jsonl"
    one.write_text(json.dumps(GOLDEN))
    assert run(app, ["replay-price", str(one)]).exit_code == 0
    lines.write_text("\n".join(json.dumps({**GOLDEN, "price": price}) for price in (4.32, 4.33)))
    found = run(app, ["replay-price", str(lines)])
    assert found.exit_code == 1 and "2 receipts replayed, 1 differ" in found.output and "charged 4.33, recomputed 4.32" in found.output
    assert run(app, ["replay-price", "-"], input=json.dumps([GOLDEN])).exit_code == 0
    lines.write_text(json.dumps(GOLDEN) + "\n{half")
    broken = run(app, ["replay-price", str(lines)])
    assert broken.exit_code == 1
