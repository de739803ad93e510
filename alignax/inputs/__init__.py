"""From text to batches. `data/` reads a data set; `inputs/` makes batches of it.

Reading order: tokenizer (chat templates, which tokens are scored), source (a data set as
batches, cut and counted), plan (which examples share a batch), layout (packed rows),
reference_cache (log-probabilities of the reference, computed once), serialisation (a batch
as text), gguf_vocab (the vocabulary of a .gguf file).
"""
