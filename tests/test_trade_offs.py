"""Figures of a router of qualities: known answers of a perfect prediction and of a useless one."""

from __future__ import annotations

import pytest
import torch
from trade_offs import as_markdown, at_floors, at_trade_offs, reliability

from tokenizer.router.reward import QualityTable, stats_of
from tokenizer.viz.plots import reliability_chart, to_svg


def table() -> QualityTable:
    """20 clips x 9 rows whose distance falls with tokens, for each clip at its own rate."""
    need_S1 = torch.linspace(0.1, 1, 20)[:, None]
    space = QualityTable(*[torch.zeros(0, 9)] * 3, [], (2, 4, 8), 2).space
    lpips_SA = need_S1 / space.tokens_A
    return QualityTable(lpips_SA, lpips_SA, lpips_SA, [str(i) for i in range(20)], (2, 4, 8), 2)


def test_a_perfect_prediction_is_the_oracle() -> None:
    truth = table()
    stats = stats_of(truth)
    row_S = torch.zeros(20, dtype=torch.long)  # a router that always takes the smallest row
    found = at_trade_offs(truth.lpips_BA.double(), truth, stats, {0.4: row_S, 2.0: row_S})
    assert [f["percentile"] for f in found] == pytest.approx([1.0] * 9)
    assert all(f["tokens"] == f["tokens_best"] for f in found)
    assert found[-1]["percentile_single"] == pytest.approx(0)  # at w_q = 2 the smallest row is the worst of all
    assert found[1]["percentile_single"] is None
    for floor in at_floors(truth.lpips_BA.double(), truth):
        assert floor["kept"] == floor["kept_oracle"] == 1 - floor["not_predicted"]
        assert floor["tokens"] == floor["tokens_oracle"]
    assert all(b["predicted"] == pytest.approx(b["measured"]) for b in reliability(truth.lpips_BA, truth.lpips_BA))


def test_a_prediction_that_is_too_good_keeps_no_floor() -> None:
    truth = table()
    hopeful = at_floors(torch.zeros(20, 9, dtype=torch.double), truth)
    for floor in hopeful:
        assert floor["tokens"] == 4 and floor["not_predicted"] == 0
        assert floor["kept"] == pytest.approx((truth.lpips_BA[:, 0] <= floor["distance"]).double().mean().item())
    chart = to_svg(reliability_chart([(0.1, 0.2), (0.2, 0.3)], "predicted", "measured"), "reliability")
    assert "predicted" in chart and "equal" in chart
    figures = {"num_clips": 20, "router_sha256": "0" * 64, "perceptual_net": "net", "mean_gap": 0.0}
    figures |= {"mean_absolute_gap": 0.1, "floors": hopeful}
    trade_offs = at_trade_offs(truth.lpips_BA.double(), truth, stats_of(truth), {})
    assert as_markdown({**figures, "trade_offs": trade_offs}).count("| 100.00% |") >= 9
