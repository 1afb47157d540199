"""`ega bench v2` at its smallest: every policy answers every request, with pages that the market accepts."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.pages import ALPHAS, BETAS, ROWS, v2
from model.ega_v2.payment import RULES


@pytest.mark.soak
def test_the_table_has_every_policy_and_every_ablation() -> None:
    result = v2(quick=True)
    assert [row["policy"] for row in result["table"]] == list(ROWS.values())
    assert all(np.isfinite(row["true eRPM"]) and row["true eRPM"] > 0 for row in result["table"])
    assert set(result["series"]) == {f"beta {beta:g}" for beta in BETAS} and all(len(line) == len(ALPHAS) and min(line) > 0 for line in result["series"].values())
    assert set(result["differences"]) == set(ROWS) - {"ega_v2", "learned"}
    assert all(set(found) == {"GSP", "bid * clicks", *([] if policy == "logged" else ["truthful prices"])} for policy, found in result["differences"].items())
    assert {row["prices of EGA (V2)"] for row in result["third_table"]} == set(RULES)
