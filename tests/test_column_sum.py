"""The gradient of bias: sums over the samples."""

import pytest
import torch
from support import submodule

F16, F32, F64 = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("rows_dtype, dtype", [(F32, F32), (F64, F64), (F16, F32)], ids=str)
@pytest.mark.parametrize("B", [1, 511, 8192, 8193])
@pytest.mark.parametrize("D", [1, 3, 33])
def test_columns_are_summed_and_scaled(flex, device, B, D, rows_dtype, dtype):
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(B, D, generator=generator, device=device, dtype=rows_dtype)
    scale = torch.tensor(-0.3, device=device, dtype=dtype)
    sums = submodule(flex, "column_sum").sum_columns(rows, scale)
    assert (sums.shape, sums.dtype) == ((D,), dtype)
    expected, magnitude = (t.double().sum(0) * scale.double() for t in (rows, rows.abs()))
    roundings = B + 1  # B additions and a product; the truth rounds too, see support.py
    unit = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float64).eps / 2
    allowed = min(roundings, 4 * roundings**0.5) * unit * magnitude.abs()
    assert ((sums.double() - expected).abs() <= allowed).all()
