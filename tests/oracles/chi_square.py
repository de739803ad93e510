"""How surprising counts are under a distribution."""

import numpy as np
from scipy import stats


def p_value(seen, expected):
    """Pearson's test; cells that expect fewer than 5 are counted together."""
    seen, expected = np.asarray(seen, float), np.asarray(expected, float)
    small = expected < 5
    if small.any():
        seen = np.append(seen[~small], seen[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    return stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue
