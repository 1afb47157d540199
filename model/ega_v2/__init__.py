"""EGA (V2): one generative model for POIs, creatives, slots among organic items, and prices."""
