"""The gradient of bias: sums over the samples."""

import pytest
import torch
from support import submodule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("B", [1, 511, 4096, 4097, 8193])
@pytest.mark.parametrize("D, width", [(1, 1), (3, 4), (33, 48)])
def test_columns_are_summed_and_scaled(flex, device, B, D, width, dtype, out_dtype):
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(B, width, generator=generator, device=device, dtype=dtype)
    rows[:, D:] = float("nan")  # no part of the sums
    scale = torch.tensor(-0.3, device=device, dtype=dtype)
    out = torch.full((D,), float("nan"), device=device, dtype=out_dtype)
    submodule(flex, "columns").sum_columns(rows, scale, out)
    expected = rows[:, :D].double().sum(0) * scale.double()
    magnitude = rows[:, :D].double().abs().sum(0) * 0.3
    bound = 4 * B**0.5 * torch.finfo(dtype).eps / 2 * magnitude + torch.finfo(out_dtype).eps * expected.abs()
    assert ((out.double() - expected).abs() <= bound).all()


def test_more_rows_than_two_launches_take(flex, device, monkeypatch):
    module = submodule(flex, "columns")
    monkeypatch.setattr(module, "_ROWS", 8)
    monkeypatch.setattr(module, "_BLOCK_B", 4)
    rows = torch.arange(3 * 600, device=device, dtype=torch.float64).view(600, 3)  # 75 sums, then 10, 2 and 1
    out = rows.new_empty(3)
    module.sum_columns(rows, rows.new_ones(()), out)
    assert torch.equal(out, rows.sum(0))
