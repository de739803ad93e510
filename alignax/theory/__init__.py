"""Mathematics of the papers in float64 numpy: no models, no jax, no import of alignax.

Reading order: infalign (inference-aware alignment), mode_seeking, ranking, bco, aft,
unlearning, displacement, tournament; each stands on its own.
"""
