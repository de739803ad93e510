"""The distribution of one next token after all logits processors: lists and float64, one row at a time."""

import numpy as np


def distribution(
    logits, *, prompt=(), response=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
    repetition=1.0, frequency=0.0, presence=0.0, bias=None, allowed=None, tilt=None,
):  # fmt: skip
    """float64 [V] probabilities: penalties, temperature, masks, truncations, guide."""
    z = [float(x) for x in logits]
    for v in range(len(z)):
        if v in prompt or v in response:
            z[v] = z[v] / repetition if z[v] > 0 else z[v] * repetition
        z[v] -= frequency * list(response).count(v)
        if v in response:
            z[v] -= presence
        if bias is not None:
            z[v] += bias[v]
    greedy = temperature == 0
    z = [x if greedy else x / temperature for x in z]
    alive = [v for v in range(len(z)) if allowed is None or allowed[v]]
    alive = [v for v in alive if z[v] > -np.inf]
    alive.sort(key=lambda v: (-z[v], v))
    if top_k:
        alive = alive[:top_k]
    if top_p < 1:
        mass = np.exp([z[v] - z[alive[0]] for v in alive])
        mass = mass / mass.sum()
        many = next(n for n in range(1, len(alive) + 1) if mass[:n].sum() >= top_p)
        alive = alive[:many]
    alive = [v for v in alive if np.exp(z[v] - z[alive[0]]) >= min_p]
    if tilt is not None:
        z = [x + t for x, t in zip(z, tilt, strict=True)]
    best = max(z[v] for v in alive)
    out = np.zeros(len(z))
    if greedy:
        out[min(v for v in alive if z[v] == best)] = 1
        return out
    for v in alive:
        out[v] = np.exp(z[v] - best)
    return out / out.sum()
