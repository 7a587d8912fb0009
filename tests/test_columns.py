"""The gradient of bias: sums over the samples."""

import pytest
import torch
from support import submodule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("B", [1, 511, 8192, 8193])
@pytest.mark.parametrize("D", [1, 3, 33])
def test_columns_are_summed_and_scaled(flex, device, B, D, dtype):
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(B, D, generator=generator, device=device, dtype=dtype)
    grad_out = torch.tensor(-0.3, device=device, dtype=dtype)
    sums, scale = submodule(flex, "columns").sum_columns(rows, grad_out, 7)
    assert (sums.shape, sums.dtype, scale.shape, scale.dtype) == ((D,), dtype, (), dtype)
    exact_scale = 2 * grad_out.double() / (B * 7 * D)
    expected = rows.double().sum(0) * exact_scale
    magnitude = rows.double().abs().sum(0) * exact_scale.abs()
    # As in support.py: three products and a division, which may err by four units, then a product with B additions.
    roundings = B + 8
    unit = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float64).eps / 2
    assert (scale.double() - exact_scale).abs() <= 7 * unit * exact_scale.abs()
    allowed = min(roundings, 4 * roundings**0.5) * unit * magnitude
    assert ((sums.double() - expected).abs() <= allowed).all()


def test_the_parts_of_many_rows_add_up(flex, device, monkeypatch):
    module = submodule(flex, "columns")
    monkeypatch.setattr(module, "_ROWS", 8)
    monkeypatch.setattr(module, "_BLOCK_B", 4)
    rows = torch.arange(3 * 597, device=device, dtype=torch.float64).view(597, 3)  # 75 parts, the last one of 5
    sums, scale = module.sum_columns(rows, rows.new_ones(()), 1)
    # Sums of integers are exact; each part is scaled, and added to the others.
    torch.testing.assert_close(sums, rows.sum(0) * scale, rtol=77 * torch.finfo(torch.float64).eps / 2, atol=0)
