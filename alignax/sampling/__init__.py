"""Sampling of responses: logits processors, guided decoding, speculative decoding.

Reading order: decode (the sampling loop), generation_settings (the arguments of a call,
checked), processors (penalties, temperature, top-k, top-p, min-p), weights (the form of the weights
that a step reads), response_state (what
the processors and stops read of a response), automaton (stop strings and grammars),
stops (where responses end), grammars (regular expressions and JSON schemas), prefill (how
prompts are read), continuous (any number of prompts), guides and guide_models (guided
decoding), drafts, verify, verify_guided, speculation_round and speculate (speculative
decoding), steering_vectors.
"""
