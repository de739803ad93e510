"""Ways to decode: one file each, a guide of the token law, a choice, or a search."""
