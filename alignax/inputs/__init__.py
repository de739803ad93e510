"""From text to batches. `data/` reads a data set; `inputs/` makes batches of it.

Reading order: chat_template (a conversation as one string), tracked_text (strings that know
where their characters are from), skeleton (renderings whose texts a template does not read),
turns (the assistant's turns in a rendering), encoder (text to ids, segment by segment),
dialogues (an example as ids, and which of them are scored), tokenizer (all of it for one
model), truncation (examples that are too long), forms (which rows a loss can read), rows
(examples cut to a length, and counted), row_store (rows on the disk), source (a data set as
batches), plan (which examples share a batch), layout (packed rows), prompts (prompts to
generate from), annotate (columns that frozen LMs fill), reference_cache (log-probabilities of
the reference, computed once), detokenize (a batch as text, also in the ids of another
tokenizer), serialisation (a batch in a checkpoint), gguf_vocab (the vocabulary of a .gguf
file), tokenizer_files (a tokenizer as a Hugging Face folder; whether two have the same
tokens).
"""
