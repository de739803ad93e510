"""What searches over partial responses share; the searches are in `decoders/`.

Reading order: hypotheses (partial responses, extended and judged), pruning (the best of
several candidates, with few look-aheads), tree_search (PUCT over sets of tokens).
"""
