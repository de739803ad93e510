"""The papers' mathematics in float64 numpy: no models, no jax, nothing of alignax.

Reading order: infalign (inference-aware alignment), mode_seeking, ranking, bco, aft,
unlearning, displacement; each stands on its own.
"""
