"""The nearest of many embeddings, exactly, whatever the order in which sums are taken."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**22  # of the float64 copies


@torch.no_grad()
def nearest(rows: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` rows with the largest cosine: places int64 [k] and cosines float64 [k], the largest first.

    A product in float32 finds all rows that may be among them, by the bound on its rounding error, and float64 decides.
    Equal rows come in the order of their places.

    Args:
        rows: float32 [n, d] unit embeddings.
        query: float32 [d], a unit embedding.
        k: n of them where there are fewer.
    """
    k = min(k, len(rows))
    if not k:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    cosines = rows @ query  # [n]
    # A sum of d products of unit vectors is off by at most d roundings (Higham, Accuracy and Stability, 3.1).
    error = rows.shape[1] * torch.finfo(torch.float32).eps
    candidates = torch.nonzero(cosines >= cosines.topk(k).values[-1] - 2 * error).flatten()
    step = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    exact = torch.cat([(rows[part].double() * query.double()).sum(1) for part in candidates.split(step)])
    # Stable, and the candidates rise: a tie is decided by the place.
    order = exact.sort(descending=True, stable=True).indices[:k]
    return candidates[order], exact[order]
