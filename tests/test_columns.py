"""The gradient of bias: sums over the samples."""

import pytest
import torch
from support import submodule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("B", [1, 511, 8192, 8193])
@pytest.mark.parametrize("D, width", [(1, 1), (3, 4), (33, 48)])
def test_columns_are_summed_and_scaled(flex, device, B, D, width, dtype):
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(B, width, generator=generator, device=device, dtype=dtype)
    rows[:, D:] = float("nan")  # no part of the sums
    scale = torch.tensor(-0.3, device=device, dtype=dtype)
    sums = submodule(flex, "columns").sum_columns(rows, D, scale)
    assert (sums.shape, sums.dtype) == ((D,), dtype)
    expected = rows[:, :D].double().sum(0) * scale.double()
    magnitude = rows[:, :D].double().abs().sum(0) * 0.3
    # As in support.py: at most B additions, and the product with scale.
    roundings = B + 1
    unit = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float64).eps / 2
    allowed = min(roundings, 4 * roundings**0.5) * unit * magnitude
    assert ((sums.double() - expected).abs() <= allowed).all()


def test_the_parts_of_many_rows_add_up(flex, device, monkeypatch):
    module = submodule(flex, "columns")
    monkeypatch.setattr(module, "_ROWS", 8)
    monkeypatch.setattr(module, "_BLOCK_B", 4)
    rows = torch.arange(3 * 597, device=device, dtype=torch.float64).view(597, 3)  # 75 parts, the last one of 5
    assert torch.equal(module.sum_columns(rows, 3, rows.new_ones(())), rows.sum(0))
