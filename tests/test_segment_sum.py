"""The sum over each feature's pairs, against index_add in float64."""

import pytest
import torch
from support import pairs_of, submodule

# Chunks hold 128 pairs: features of one chunk and of its neighbours, that end, start and continue where chunks do.
BORDERS = [128, 129, 127, 256, 0, 128, 1, 700, 255, 5]


def operands(indices, F, D, device, dtype, by_pair):
    generator = torch.Generator(device).manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    B, K = indices.shape
    # Other coefficients than vals: nothing ties them to the loss.
    return (
        normal(B, K),
        normal(F, D),
        normal(B * K if by_pair else B, D),
        torch.tensor(-0.7, device=device, dtype=dtype),
    )


def expected(pairs, indices, coefs, weight, rows, scale, by_pair):
    """The two results and their magnitudes. Rows by pair stand in the order."""
    features, K = indices.flatten().long(), indices.shape[1]
    if by_pair:
        x = torch.empty_like(rows, dtype=torch.float64)
        x[pairs.order] = rows.double()
    else:
        x = rows.double().repeat_interleave(K, dim=0)
    terms, products = coefs.flatten().double()[:, None] * x * scale.double(), weight.double()[features] * x
    zeros = torch.zeros(weight.shape, dtype=torch.float64, device=x.device)
    sums, sizes = (zeros.index_add(0, features, t) for t in (terms, terms.abs()))
    dots, dot_sizes = ((t.sum(1) * s).view(indices.shape) for t, s in (
        (products, scale.double()), (products.abs(), scale.double().abs())
    ))  # fmt: skip
    return sums, sizes, dots, dot_sizes


def assert_close(value, true, size, n):
    # n additions, a product and the scale, as in support.py
    n += 4
    unit = torch.finfo(value.dtype).eps / 2 + torch.finfo(torch.float64).eps / 2
    assert ((value.double() - true).abs() <= min(n, 4 * n**0.5) * unit * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("by_pair", [False, True], ids=["rows by sample", "rows in order"])
@pytest.mark.parametrize(
    "counts, D, columns",
    [([3, 0, 1, 60], 33, 33), (BORDERS, 33, 33), (BORDERS, 3, 2), ([300, 0, 4], 513, 512)],
    ids=str,
)
def test_sums_and_dots_are_those_of_index_add(flex, device, counts, by_pair, dtype, D, columns):
    F, indices = len(counts) + 1, pairs_of(counts, 20, device)  # the last feature has no pairs
    coefs, weight, rows, scale = operands(indices, F, D, device, dtype, by_pair)
    pairs = submodule(flex, "ordering").order_pairs(indices, coefs, F, dtype, with_slots=by_pair)
    sums, size, dots, dot_size = expected(pairs, indices, coefs, weight, rows, scale, by_pair)
    nan = float("nan")
    for out, vals_grad in (
        (torch.full_like(weight, nan), torch.full_like(coefs, nan)),
        (torch.full_like(weight, nan), None),
        (None, torch.full_like(coefs, nan)),
    ):
        segment_sum = submodule(flex, "segment_sum").SegmentSum(pairs, scale, D, out, vals_grad, weight, columns)
        for first_column in range(0, D, columns):
            part = rows.new_full((len(rows), columns), nan)  # what lies beyond D is not read
            there = rows[:, first_column : first_column + columns]
            part[:, : there.shape[1]] = there
            segment_sum.add(part, first_column)
        segment_sum.finish()
        if out is not None:
            assert_close(out, sums, size, indices.numel())
            assert not out[torch.bincount(indices.flatten(), minlength=F) == 0].any()
        if vals_grad is not None:
            assert_close(vals_grad, dots, dot_size, D)
