"""The papers' mathematics in float64 numpy: no models, no jax, nothing of alignax."""
