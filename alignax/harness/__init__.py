"""Models of alignax in lm-evaluation-harness: `alignax lm_eval`, with the extra `lm_eval`.

Reading order: encoding (strings to ids, as the harness has them), scoring (log-likelihoods
by the kernel), generation (responses by the sampling loop), adapter (the class that the
harness calls), __main__ (the command).
"""
