"""Shared parts of searches over partial responses; the searches are in `decoders/`.

Reading order: hypotheses (partial responses, extended and judged), pruning (the best of
several candidates by bounds, with few look-aheads), tree_search (PUCT over sets of
tokens).
"""
