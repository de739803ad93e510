"""One token after another: its distribution, guides that tilt it, drafts that save calls.

Reading order: decode (the sampling loop), generation_settings (what a caller may ask
for), processors (penalties, temperature, top-k, top-p, min-p), response_state (what the
rules remember of a response), automaton (stop strings and grammars), prefill (how prompts
are read), guides and guide_models (guided decoding), drafts, verify, verify_guided,
speculation_round and speculate (speculative decoding), steering_vectors.
"""
