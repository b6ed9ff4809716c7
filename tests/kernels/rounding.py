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


def rounding_bounds(image, text, scale, weights, *, bias=0.0):
    """Return how far loss and gradients may be off, as absolute values of their norms by name.

    Args:
        image: [b, d].
        text: [B, d].
        scale: of the cosines.
        weights: [b, B] magnitudes of b · dL/dS in float64, S being the logits.
        bias: of the logits.
    """
    image, text, weights = (x.double().cpu().abs() for x in (image, text, weights))
    cosines = image @ text.T  # of magnitudes: none is smaller than the magnitude of the cosine
    # Products with the scale, normalisers and their differences are rounded as well, each as large as a logit.
    logit = scale * sum_rounding(image.shape[1]) * cosines.max().item() + 4 * UNIT * (scale + abs(bias))
    weight = 2 * logit + 4 * UNIT  # relative error of the exponential of a logit less its normaliser
    image_sum, text_sum = (weight + sum_rounding(len(rows)) for rows in (text, image))
    mean = weights / len(image)
    return {
        "loss": weight * mean.sum().item(),
        "image_grad": image_sum * scale * (mean @ text).norm().item(),
        "text_grad": text_sum * scale * (mean.T @ image).norm().item(),
        "scale_grad": image_sum * (mean * cosines).sum().item(),
        "bias_grad": image_sum * mean.sum().item(),
    }


def softmax_weights(image, text, scale, first_row=0, ids=None, *, both_directions):
    """Return the weights of InfoNCE, of the image->text half or of both: what `rounding_bounds` takes, [b, B]."""
    image, text = image.double().cpu(), text.double().cpu()
    own = slice(first_row, first_row + len(image))
    logits = scale * image @ text.T
    if ids is not None:
        masked = ids[own, None] == ids
        masked.diagonal(first_row).fill_(False)
        logits = logits.masked_fill(masked, -torch.inf)
    weights = logits.softmax(1)
    if both_directions:
        weights[:, own] += logits[:, own].softmax(0)
        weights /= 2
    weights.diagonal(first_row).neg_().add_(1)
    return weights
