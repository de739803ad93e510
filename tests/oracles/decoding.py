"""The exact distribution of a sampler on a tiny vocabulary, by writing down every response."""

import numpy as np


def distribution(next_logits, prompt, *, max_new, eos_ids=(), temperature=1.0):
    """{response: probability} of every response that a sampler can give.

    Args:
      next_logits: ids -> float [V], the logits after those ids.
      prompt: ids.
      max_new: most tokens of a response.
      eos_ids: end a response and are part of it.
      temperature: of softmax(logits / temperature); 0 is all mass on the argmax.
    """
    out = {}

    def grow(response, mass):
        if len(response) == max_new or (response and response[-1] in eos_ids):
            out[response] = mass
            return
        logits = np.asarray(next_logits([*prompt, *response]), np.float64)
        if temperature == 0:
            grow((*response, int(logits.argmax())), mass)
            return
        p = np.exp((logits - logits.max()) / temperature)
        for token, share in enumerate(p / p.sum()):
            grow((*response, token), mass * share)

    grow((), 1.0)
    return out
