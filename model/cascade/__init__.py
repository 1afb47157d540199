"""The multi-stage cascade that EGA-V1 is compared with: recall, pre-rank, rank."""
