"""`ega bench flops`: what a request costs, counted on the network itself, beside Appendix A.1. 1 multiply-add = 2 FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.ega_v1.network import NetworkConfig

PAPER: dict[str, Any] = {"width": 128, "blocks": 6, "auction_blocks": 3, "clusters": 128, "heads": 4, "fusion_after": (3, 6), "head_hidden": (128, 32)}
"""Sec. 5.1: D, m, m_e, N_c, H; m_k = 2 fusions of m = 6 blocks."""


def count(config: NetworkConfig, ads: int, behaviours: int) -> dict[str, int]:
    """Matrix-product FLOPs of one request by part, counted by torch on shapes alone (no arithmetic is done)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from marketplace import schema
    from model.ega_v1.network import Batch, EgaV1, VocabularySizes

    with torch.device("meta"):
        network = EgaV1(config, VocabularySizes(**dict.fromkeys(schema.VOCABULARIES, 4))).eval()
        batch = Batch(
            *(torch.zeros(1, ads, len(schema.AD_FIELDS), dtype=torch.long), torch.ones(1, ads, dtype=torch.bool), torch.zeros(1, ads, 2)),
            *(torch.zeros(1, len(fields), dtype=torch.long) for fields in (schema.USER_FIELDS, schema.CONTEXT_FIELDS)),
            torch.zeros(1, behaviours, len(schema.BEHAVIOUR_FIELDS), dtype=torch.long), torch.zeros(1, 2),
        )  # fmt: skip
        recformer = network.recformer
        ad, user = network.features.ads(batch.ad_fields), network.features.user(batch.user_fields, batch.context_fields)
        history, mask = network.features.behaviours(batch.behaviours, user)

        def blocks(layers: Any, x: torch.Tensor, real: torch.Tensor) -> None:
            for layer in layers:
                layer(x, real)

        def target() -> None:
            for attention in recformer.target.values():
                attention(ad, batch.ad_mask, attention.keys(history, mask))

        def context() -> None:
            for attention in recformer.context.values():
                attention(history, mask, attention.keys(ad, batch.ad_mask))

        parts: dict[str, Callable[[], Any]] = {
            "GCF on ads": lambda: blocks(recformer.ad_blocks, ad, batch.ad_mask),
            "GCF on behaviours": lambda: blocks(recformer.behaviour_blocks, history, mask),
            "target attention": target,
            "context attention": context,
            "pCTR head": lambda: network.click_head(ad, user),
            "generator": lambda: network.generator(ad, batch.ad_mask, user),
            "whole request": lambda: (network.generator(*(found := network.encode(batch))[:1], batch.ad_mask, found[1]), network.click_head(*found)),
        }
        result = {}
        for name, part in parts.items():
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                part()
            result[name] = int(counter.get_total_flops())
    return result


def appendix(config: NetworkConfig, ads: int, behaviours: int) -> dict[str, int]:
    """The same by Appendix A.1 (Eq. 30, 31, 32); Eq. 30 once for the ads and once for the behaviours. The generator attends to N_a = N_c clusters here."""
    n, length, c, d, k = ads, behaviours, config.clusters, config.width, config.slots
    fusions = len(config.fusion_after)

    def gcf(tokens: int) -> int:
        return config.blocks * (6 * tokens * c * d + 4 * tokens * c * d + 24 * tokens * d * d)

    return {
        "GCF on ads": gcf(n), "GCF on behaviours": gcf(length), "target attention": fusions * n * c * d, "context attention": fusions * length * c * d,
        "generator": config.auction_blocks * (4 * k * c * d + 18 * k * d * d + 4 * c * d * d),
    }  # fmt: skip


def flops(ads: int = 100_000, behaviours: int = 1_000) -> dict[str, Any]:
    """Paper sizes: FLOPs of every part as counted, and as Appendix A.1 has them."""
    from model.ega_v1.network import NetworkConfig

    config = NetworkConfig(**PAPER, exact_behaviours=0)
    counted, formula = count(config, ads, behaviours), appendix(config, ads, behaviours)
    table = [
        {"part": name, "counted GF": value / 1e9, "Appendix A.1 GF": formula[name] / 1e9 if name in formula else float("nan"), "ratio": value / formula[name] if name in formula else float("nan")}
        for name, value in counted.items()
    ]
    return {"ads": ads, "behaviours": behaviours, "width": config.width, "blocks": config.blocks, "clusters": config.clusters, "table": table}
