"""Text to token ids: chat templates, the turns in a rendering, tokenizers, truncation.

Reading order: chat_template (a conversation as one string), template_limits (what a template
may compute), tracked_text (strings that know where their characters are from), turns (the
assistant's turns in a rendering), encoder (text to ids, segment by segment), dialogues (an example as ids, and which of them are scored),
tokenizer (all of it for one model), truncation (examples that are too long); skeleton and
shapes (renderings that differ only in texts that a template does not read), gguf_vocab (the
vocabulary of a .gguf file), tokenizer_files (a tokenizer as a Hugging Face folder);
patterns (regular expressions in linear time); measures (difficulty, diversity and formality),
overlap (ROUGE-L); documents (a prompt that separators divide).
"""
