"""Losses in numpy float64, one prompt and one response at a time, from the papers."""

import math

import numpy as np


def sequence(logps, mask, b, g):
    """log p(y|x) of response g to prompt b, in Python floats."""
    return sum(float(x) for x, m in zip(logps[b, g], mask[b, g], strict=True) if m)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sft(logps, mask, valid, reduction, length=None):
    """The mean over prompts that have a valid response, of the named reduction."""
    rows = [
        [float(x) for x, m in zip(logps[b, g], mask[b, g], strict=True) if m]
        for b, g in np.argwhere(valid)
    ]
    if reduction == "token":
        flat = [x for row in rows for x in row]
        return -sum(flat) / len(flat)
    if reduction == "sequence":
        return -sum(sum(row) / len(row) for row in rows) / len(rows)
    return -sum(sum(row) for row in rows) / (len(rows) * (length or mask.shape[-1]))


def dpo(logps, ref_logps, mask, beta, eps=0.0):
    """[B]: cross-entropy of the preference that the implicit rewards imply."""
    out = []
    for b in range(len(logps)):
        rewards = [
            beta * (sequence(logps, mask, b, g) - sequence(ref_logps, mask, b, g))
            for g in (0, 1)
        ]
        h = rewards[0] - rewards[1]
        out.append(-(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h))
    return np.array(out)


def reward_model(values, mask, margin=0.0, centring=0.0):
    """[B]: the reward is the value on the last scored token."""
    out = []
    for b in range(len(values)):
        r = [float(values[b, g, np.flatnonzero(mask[b, g])[-1]]) for g in (0, 1)]
        out.append(-log_sigmoid(r[0] - r[1] - margin) + centring * (r[0] + r[1]) ** 2)
    return np.array(out)
