"""Decoding methods, one per file: a guide of the next token's distribution, or a search."""
