"""What float32 may cost a contrastive loss, from the arithmetic: bounds that hold on any processor.

A sum of K products differs between processors in its order and in the width of their vectors. Each of its roundings is
at most u = 2^-24 of a partial sum, so it is off by at most K u Σ|terms|, and by a few √K u Σ|terms| where roundings are
as good as independent (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput.
41, 2019).
"""

import torch

UNIT = torch.finfo(torch.float32).eps / 2


def sum_rounding(K: int) -> float:
    """Return the error of a float32 sum of K products, relative to the sum of their magnitudes."""
    return min(K, 4 * K**0.5) * UNIT
