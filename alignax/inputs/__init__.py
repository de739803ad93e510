"""From text to batches. `data/` reads a data set; `inputs/` makes batches of it.

Reading order: chat_template (a conversation as one string), tokenizer (text to ids, and
which of them are scored), forms (which rows a loss can read), rows (examples cut to a
length, and counted), source (a data set as batches), plan (which examples share a batch), layout (packed rows), prompts (prompts to
generate from), annotate (columns that frozen LMs fill), reference_cache (log-probabilities
of the reference, computed once), detokenize (a batch as readable text), serialisation (a
batch in a checkpoint), gguf_vocab (the vocabulary of a .gguf file),
tokenizer_files (a tokenizer as a Hugging Face folder).
"""
