"""BatchTopK as docs/trainers.md has it, against dense autograd in float64."""

import re
from pathlib import Path

import pytest
import torch
from support import allowed_error

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "trainers.md").read_text()
SECTION = re.search(r"^## BatchTopK\n(.*?)^## ", DOCUMENT, re.MULTILINE | re.DOTALL)[1]
(CODE,) = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)

B, D, F = 8, 12, 40


def dense_loss(x, weight, encoder_bias, decoder, bias, k):
    pre = (x - bias) @ weight.T + encoder_bias
    chosen = torch.zeros_like(pre).flatten().scatter(0, pre.flatten().topk(B * k).indices, 1).view_as(pre)
    assert len(chosen.sum(1).unique()) > 1  # rows differ in length
    return ((pre.relu() * chosen) @ decoder + bias - x).square().mean()


# The latter chooses negative pre-activations too, which relu makes zero.
@pytest.mark.parametrize("k", [3, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_topk_is_that_of_dense_codes(flex, device, dtype, k):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((B, D), (F, D), (F,), (F, D), (D,))]
    x, *leaves = (tensor.to(device, dtype) for tensor in tensors)
    encoder = torch.nn.Linear(D, F, device=device, dtype=dtype)
    encoder.weight.data, encoder.bias.data = leaves[:2]
    decoder, bias = (leaf.requires_grad_() for leaf in leaves[2:])
    names = {"flex": flex, "x": x, "encoder": encoder, "decoder": decoder, "bias": bias, "k": k}
    exec(CODE, names)
    parameters = encoder.weight, encoder.bias, decoder, bias
    got = names["loss"], *torch.autograd.grad(names["loss"], parameters)
    exact = [parameter.detach().double().requires_grad_() for parameter in parameters]
    true = dense_loss(x.double(), *exact, k)
    for value, expected in zip(got, (true, *torch.autograd.grad(true, exact)), strict=True):
        # The roundings of pre-activations, reconstruction, their gradients and sums over samples, each of terms no
        # larger than the largest element
        tolerance = allowed_error(2 * D + 2 * k + B * D, dtype, expected.abs().max(), expected, dtype)
        assert ((value.double() - expected).abs() <= tolerance).all()
