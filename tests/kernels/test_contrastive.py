"""What the symmetric loss alone has: a range of columns, kept logits, a bank, a mode by memory. More: test_pairs.py."""

import math
from types import SimpleNamespace

import pytest
import torch

from textlock.kernels import contrastive

from .pairs import LOSSES, assert_close, in_chunks_of, inputs_of, make_rows, profiled, relative_error, run, truth_of

LOSS = LOSSES["contrastive"]


def test_scale_within_the_documented_range_is_exact_and_beyond_it_loud():
    image, text = make_rows(16, 16, 8)
    limit = (1024 - 4) * math.log(2)  # B = 16
    # The worst case of the range: one pair of rows is parallel, another opposite.
    image[0], image[1] = text[5], -text[9]
    image, text = image / image.norm(dim=1)[:, None], text / text.norm(dim=1)[:, None]
    settings = {"dtype": torch.float64, "device": "cpu", "chunk": 5}
    truth, found = truth_of(LOSS, image, text, limit - 1), run(LOSS, "chunked", image, text, limit - 1, **settings)
    assert all(relative_error(found[name], truth[name]) <= 1e-9 for name in found)
    beyond = run(LOSS, "chunked", image, text, limit + 10, **settings)
    assert not beyond["loss"].isfinite()
    assert all(beyond[name].isnan().all() for name in LOSS.learnt), "a finite gradient would be wrong"


@pytest.mark.parametrize(
    ("chunk", "learnt", "products"),
    [(5, (), 4), (5, ("image",), 12), (20, (), 1), (20, ("image",), 2)],
    ids=["evaluate in chunks", "gradient in chunks", "evaluate at once", "gradient at once keeps the logits"],
)
def test_number_of_matrix_products(chunk, learnt, products):
    inputs = inputs_of(LOSS, *make_rows(20, 20, 8), dtype=torch.float64, device="cpu", learnt=learnt)
    with in_chunks_of(chunk):
        assert profiled(lambda: LOSS.function(**inputs))[2] == products


def test_bank_without_a_group_changes_nothing():
    """Texts that match no image of the call are negatives of the image->text half alone in any case."""
    rows = make_rows(6, 35, 8, 2)
    plain, banked = (run(LOSS, "chunked", *rows, 30.0, first_row=2, bank=bank) for bank in (0, 15))
    assert all(torch.equal(plain[name], banked[name]) for name in plain)


def test_a_gradient_wanted_by_the_text_alone_is_the_same():
    rows = make_rows(20, 30, 64)
    truth, found = truth_of(LOSS, *rows), run(LOSS, "chunked", *rows, learnt=("text",), chunk=6)
    assert_close(LOSS, "chunked", found, truth, *rows, 50.0)


def test_auto_is_chunked_without_a_gpu_and_goes_by_memory_with_one(monkeypatch):
    def choice(b, B, *, allocated=0, d=768, dtype=torch.float32, cuda=True):
        image = SimpleNamespace(is_cuda=cuda, shape=(b, d), dtype=dtype, device=torch.device("cuda:0"))
        text = SimpleNamespace(shape=(B, d), dtype=dtype)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        return contrastive._choose_mode(SimpleNamespace(image=image, text=text))

    assert choice(4096, 65536) == "store"
    assert choice(65536, 65536) == "store"
    assert choice(65536, 65536, allocated=70 * 10**9) == "recompute"
    assert choice(65536, 2**20) == "recompute"
    assert choice(4096, 65536, cuda=False) == "chunked"
    assert choice(4096, 65536, dtype=torch.float64) == "chunked"
    assert choice(4096, 65536, d=20) == "chunked"
