"""`ega bench v2` at its smallest: every policy answers every request, with pages that the market accepts."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.pages import ROWS, v2


@pytest.mark.soak
def test_the_table_has_every_policy_and_every_ablation() -> None:
    result = v2(quick=True)
    assert [row["policy"] for row in result["table"]] == list(ROWS.values())
    assert all(np.isfinite(row["true eRPM"]) and row["true eRPM, GSP"] > 0 for row in result["table"])
    assert set(result["differences"]) == set(ROWS) - {"ega_v2"}
