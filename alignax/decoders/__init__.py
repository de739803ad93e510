"""Decoding methods, one per file: a guide of the next token's distribution, or a search.

A guide tilts the distribution of the next token: `guide(lms, *, ...) -> Guide`. A search has
its own loop: `search(lm, lms, prompts, lengths, key, *, max_new, judge, ...) -> Generated`.

Reading order: proxy, contrastive and controlled (guides), best_of_n and controlled_blocks
(searches over whole responses and blocks), deal and rain (look-ahead and tree search), pine
(how a prompt is read). Every other file stands beside one of these.
"""
