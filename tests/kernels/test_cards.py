"""Every operation that has a card: its kernels against its references in float64, its references against autograd.

The kernels run in Triton's interpreter, or on a GPU where there is one.
"""

from dataclasses import replace

import pytest
import torch

from textlock.kernels.card import Data, by_name, find_cards, in_float64
from textlock.kernels.device import capability_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, F32 = torch.bfloat16, torch.float32
# Relative error of sums of up to some hundred terms in float32, and of the polynomials that stand for functions.
TINY = 1e-6
# The interpreter cuts float32 off to bfloat16, all in one direction: less than a unit in the last of eight bits.
CUT_OFF = 2.0**-7

CARDS = {card.passes[0].name: card for card in find_cards()}


def cases(wanted=lambda card, one: True):
    return [
        pytest.param(card, one, sizes, id=f"{one.name}: {name}", marks=[pytest.mark.memcheck] * (n == 0))
        for card in CARDS.values()
        for one in card.passes
        if wanted(card, one)
        for n, (name, sizes) in enumerate(card.odd.items())
    ]


def refusal(card, sizes):
    """Say why kernels of these sizes do not run here."""
    if DEVICE.type == "cuda" and capability_of(DEVICE) < card.least:
        return f"the kernels need a GPU of compute capability {card.least}"
    if card.multiplies and getattr(sizes, "dtype", None) == (F32 if DEVICE.type == "cuda" else BF16):
        return "matrices are multiplied in 16 bits on a GPU; the interpreter multiplies bfloat16 wrongly"
    return None


def inputs_of(one, sizes, device=DEVICE):
    return one.inputs(sizes, Data(device))


def relative_error(value, truth):
    # Where the truth is zero, as the gradient of a query over one token, there is no scale for an error.
    return ((value.double() - truth.double()).norm() / truth.double().norm().clamp(min=0.1)).item()


def test_every_operation_has_a_card():
    assert CARDS.keys() >= {
        *("add_norm", "swiglu_norm", "gelu", "patchify", "attention", "attention_without_rope", "latent_pool"),
        *("contrastive_sums", "contrastive_weights", "contrastive_product", "contrastive_matching"),
        *("contrastive_finish", "sigmoid", "image_to_text", "gather"),
    }


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("card", "one", "sizes"), cases())
def test_every_output_is_as_good_as_plain_torch_in_every_run(card, one, sizes):
    if why_not := refusal(card, sizes):
        pytest.skip(why_not)
    inputs = inputs_of(one, sizes)
    found, second = (by_name(one.launch(**inputs)) for _ in range(2))
    truth, plain = by_name(one.reference(**in_float64(inputs))), by_name(one.reference(**inputs))
    # A reference may compute in more than it rounds to; what others run does not.
    by_others = plain if one.baseline is None else plain | by_name(one.baseline(**inputs))
    assert found.keys() == truth.keys() == plain.keys()
    for name, true in truth.items():
        assert (found[name].dtype, found[name].shape) == (plain[name].dtype, true.shape), name
        assert true.ndim > 1 or found[name].dtype in (F32, torch.float64), f"{name}: a sum is not of 16 bits"
        assert torch.equal(found[name], second[name]), f"{name}: two runs differ"
        # No more than some roundings to the type of the products, whatever others do: the truth may be what is wrong.
        dtype = getattr(sizes, "dtype", F32)
        bound = min(2 * relative_error(by_others[name], true), 16 * torch.finfo(dtype).eps) + TINY
        if DEVICE.type == "cpu" and dtype == BF16:
            bound += CUT_OFF
        error = relative_error(found[name], true)
        assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.2e}"


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("card", "one"),
    [pytest.param(card, one, id=one.name) for card in CARDS.values() if card.empty for one in card.passes],
)
def test_no_images_have_no_sums(card, one):
    sizes = next(sizes for sizes in card.odd.values() if refusal(card, sizes) is None)
    for name, value in by_name(one.launch(**inputs_of(one, replace(sizes, images=0)))).items():
        assert value.numel() == 0 or not value.any(), name


@pytest.mark.parametrize(("card", "one", "sizes"), cases(lambda card, one: one.gradients_of is not None))
def test_the_backward_reference_returns_what_autograd_does(card, one, sizes):
    """In float64, for every input by its name; and what it recomputes and sums."""
    forward = one.gradients_of
    given = in_float64(inputs_of(forward, replace(sizes, images=min(sizes.images, 3)), "cpu"))
    leaves = {name: x.requires_grad_() for name, x in given.items() if torch.is_tensor(x) and x.is_floating_point()}
    outputs = by_name(forward.reference(**given))
    about = {name: x.detach() if torch.is_tensor(x) else x for name, x in (given | outputs).items()}

    known = in_float64(inputs_of(one, replace(sizes, images=min(sizes.images, 3)), "cpu"))
    d_outputs = {name.removeprefix("d_"): x for name, x in known.items() if name.startswith("d_") and x is not None}
    exact = {name: about.get(name, value) for name, value in known.items()}
    found = by_name(one.reference(**exact))
    expected = torch.autograd.grad(
        [outputs[n] for n in d_outputs], list(leaves.values()), list(d_outputs.values()), allow_unused=True
    )
    checked = set()
    for name, gradient in zip(leaves, expected, strict=True):
        if f"d_{name}" in found and gradient is not None:
            torch.testing.assert_close(found[f"d_{name}"], gradient, rtol=1e-9, atol=1e-9, msg=f"d_{name}")
            checked.add(f"d_{name}")
            if f"d_{name}_sum" in found:
                total = gradient.flatten(end_dim=1).sum(0).flatten()
                torch.testing.assert_close(found[f"d_{name}_sum"], total, rtol=1e-9, atol=1e-9, msg=f"d_{name}_sum")
                checked.add(f"d_{name}_sum")
    for name in found.keys() & outputs.keys():
        torch.testing.assert_close(found[name], outputs[name].detach(), rtol=1e-9, atol=1e-9, msg=name)
        checked.add(name)
    assert found.keys() - checked <= {f"d_{name}" for name, x in given.items() if x is None}


@pytest.mark.parametrize(
    ("one", "sizes"),
    [
        pytest.param(one, next(iter(card.odd.values())), id=one.name)
        for name, card in CARDS.items()
        if name in ("add_norm", "swiglu_norm", "gelu", "latent_pool")
        for one in card.passes
    ],
)
def test_kernels_of_rows_refuse_tensors_with_gaps(one, sizes):
    inputs = inputs_of(one, sizes)
    for name, x in inputs.items():
        if torch.is_tensor(x) and name != "d_pooled":  # which may have any strides
            gaps = torch.stack((x, x), -1)[..., 0]
            with pytest.raises(ValueError, match=rf"^{name} of shape \[.*\] has strides .*: give a contiguous tensor"):
                one.launch(**inputs | {name: gaps})
