"""From examples to batches. `data/` reads a data set; `inputs/` makes batches of it.

Reading order: forms (which rows a loss can read), rows (examples as token ids, cut to a
length, and counted), row_store (rows on the disk), source (a data set as batches), plan
(which examples share a batch), layout (packed rows), prompts (prompts to generate from),
annotate (columns that frozen LMs fill), reference_cache (log-probabilities of the reference,
computed once), detokenize (a batch as readable text), serialisation (a batch in a
checkpoint).
"""
