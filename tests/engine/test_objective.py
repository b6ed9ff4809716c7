"""Losses of leading lengths of the embeddings: against their definition in float64, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from textlock.engine.objective import LossConfig, Objective

BATCH, WIDTH, SCALE, BIAS = 12, 24, 9.0, -3.0
LENGTHS = {"matryoshka": (16, 8), "matryoshka_weights": (0.5, 2.0)}


def embeddings():
    draw = torch.Generator().manual_seed(0)
    return (F.normalize(torch.randn(BATCH, WIDTH, generator=draw), dim=-1) for _ in range(2))


def defined(objective, images, texts, scale):
    """Every objective by its definition, float64; the embeddings are of unit length as they come."""
    total = torch.zeros((), dtype=torch.float64)
    for length, weight in ((WIDTH, 1.0), (16, 0.5), (8, 2.0)):
        cut = [rows if length == WIDTH else F.normalize(rows[:, :length], dim=-1) for rows in (images, texts)]
        logits = scale * cut[0] @ cut[1].T
        own = torch.arange(BATCH)
        if objective == "sigmoid":
            loss = -F.logsigmoid((2 * torch.eye(BATCH) - 1) * (logits + BIAS)).sum() / BATCH
        elif objective == "image_to_text":
            loss = F.cross_entropy(logits, own)
        else:
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        total = total + weight * loss
    return total


@pytest.mark.parametrize("name", ["infonce", "sigmoid", "image_to_text"])
def test_lengths_add_their_losses_and_gradients(name):
    images, texts = embeddings()
    config = LossConfig(objective=name, initial_logit_scale=SCALE, initial_logit_bias=BIAS, **LENGTHS)
    objective = Objective(config, texts=BATCH, width=WIDTH, dtype=torch.float32, device=torch.device("cpu"))
    images.requires_grad_()
    if objective.couples_images:
        loss = objective.of_batch(images, texts, None, first_row=0, group=None)
    else:
        loss = sum(
            objective.of_micro_batch(images[start : start + 4], texts, None, first_row=start)
            for start in range(0, BATCH, 4)
        )
    loss.backward()

    exact = images.detach().double().requires_grad_()
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    expected = defined(name, exact, texts.double(), scale)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (images.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()
    assert objective.log_logit_scale.grad.item() == pytest.approx(SCALE * scale.grad.item(), rel=1e-4)


def test_weights_are_one_when_left_out():
    images, texts = embeddings()

    def loss(**settings):
        objective = Objective(
            LossConfig(**settings), texts=BATCH, width=WIDTH, dtype=torch.float32, device=torch.device("cpu")
        )
        return objective.of_batch(images, texts, None, first_row=0, group=None).item()

    assert loss(matryoshka=(8,)) == loss(matryoshka=(8,), matryoshka_weights=(1.0,)) > loss() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matryoshka": (8, 24)}, r"--loss\.matryoshka is \(8, 24\), must be lengths below 24"),
        (
            {"max_logit_scale": 10.0},
            r"--loss\.initial-logit-scale is 14\.28.*, must be at most 10\.0",
        ),
        ({"matryoshka": (0,)}, r"--loss\.matryoshka is \(0,\), must be at least 1"),
        ({"matryoshka": (8,), "matryoshka_weights": (1.0, 1.0)}, r"be one weight for each of the 1 lengths"),
        ({"matryoshka": (8,), "matryoshka_weights": (0.0,)}, r"--loss\.matryoshka-weights is .* must be above 0"),
    ],
    ids=["as long as the whole", "a start above the limit", "nothing", "too many weights", "no weight"],
)
def test_lengths_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(LossConfig(**settings), texts=8, width=24, dtype=torch.float32, device=torch.device("cpu"))
