"""EGA-V1: RecFormer, AucFormer and the engine that serves them."""
