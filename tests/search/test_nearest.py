"""The nearest embeddings, against all cosines in float64."""

import pytest
import torch
import torch.nn.functional as F

from textlock.search.nearest import nearest


def unit(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 5), (1000, 64, 7), (4099, 96, 40), (20_000, 8, 3)])
def test_equals_float64(n, d, k):
    rows, query = unit(n, d, 0), unit(1, d, 1)[0]
    places, cosines = nearest(rows, query, k)
    expected = (rows.double() @ query.double()).sort(descending=True, stable=True)
    assert places.tolist() == expected.indices[:k].tolist()
    torch.testing.assert_close(cosines, expected.values[:k], rtol=0, atol=1e-12)


def test_equal_rows_come_in_their_order_wherever_they_lie():
    """Also where more of them tie for the last place than are asked for, and blocks of a product end."""
    rows, query = unit(5000, 48, 0), unit(1, 48, 1)[0]
    best = int((rows @ query).argmax())
    copies = [3, 17, 64, 1023, 4097, 4999]
    rows[copies] = rows[best].clone()
    everywhere = sorted({*copies, best})
    assert nearest(rows, query, 4)[0].tolist() == everywhere[:4]
    places, cosines = nearest(rows, query, 9)
    assert places.tolist()[:7] == everywhere and len(set(cosines.tolist()[:7])) == 1


def test_what_float32_cannot_tell_apart_is_chosen_by_float64():
    query = unit(1, 768, 0)[0]
    rows = query + 1e-7 * unit(500, 768, 1)
    exact = rows.double() @ query.double()
    cosines = rows @ query
    assert cosines[exact.argmax()] < cosines.max() or len(cosines.unique()) < 50, "float32 is not put to the test"
    for k in (1, 2, 7):
        assert nearest(rows, query, k)[0].tolist() == exact.argsort(descending=True)[:k].tolist()


def test_no_rows():
    places, cosines = nearest(torch.empty(0, 8), unit(1, 8, 0)[0], 3)
    assert len(places) == len(cosines) == 0
