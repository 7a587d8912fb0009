"""AuxK as docs/trainers.md has it: a whole step with its code against dense autograd in float64."""

import re
from pathlib import Path

import pytest
import torch
from support import allowed_error

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "trainers.md").read_text()
SECTION = re.search(r"^## Dead features: AuxK\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)[1]
FUNCTION, LOOP = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)

B, D, F, K = 8, 12, 40, 4
AUX_K, AUX_B = D // 2, B // 4  # of AuxK
STEP = 10_000_000  # later than any feature may stay silent, and one at which `dead` is refreshed
STRONG = 0  # always fires
SILENT = F - 1  # its pre-activations are all negative

# Features that did not fire before this step, and how many of them are dead after it.
CASES = {
    "none dead": ([], 0),
    "one dead": ([SILENT - 1], 1),
    "fewer dead than k": ([2, 3, 20, SILENT], 4),
    "as many dead as k": ([2, 3, 5, 11, 20, 30], 6),
    "many dead": (range(F // 4, F), 30),
    "only a silent one": ([SILENT], 1),
    "one fires again": ([STRONG, 2, 3], 2),
    "some chosen with a zero, which is not firing": (range(K - 1, F), F - K + 1),
}


def make_parameters(case, dtype, device):
    """x [B, D], and weight [F, D], bias [F] of the encoder, decoder [F, D], bias [D]; no old feature but STRONG
    fires."""
    generator = torch.Generator().manual_seed(0)
    x, weight, decoder = (torch.randn(n, D, generator=generator) for n in (B, F, F))
    bias = torch.randn(D, generator=generator) / 4
    encoder_bias = torch.randn(F, generator=generator) / 4
    old, count = CASES[case]
    weak = torch.zeros(F, dtype=torch.bool)
    weak[list(old)] = True
    weak[STRONG] = False
    weight[weak] /= 64
    encoder_bias[weak] /= 64
    encoder_bias[~weak] += 2
    encoder_bias[STRONG] = 20
    encoder_bias[SILENT] = -100
    if count > F - K:  # fewer than K features are left
        encoder_bias[weak] = -100
    return [tensor.to(device, dtype) for tensor in (x, weight, encoder_bias, decoder, bias)]


def step_of_the_document(flex, parameters, old, spoil=False):
    """The losses, the gradients and the dead features of a step with the document's code."""
    x, weight, encoder_bias, decoder, bias = parameters
    encoder = torch.nn.Linear(D, F, device=x.device, dtype=x.dtype)
    encoder.weight.data, encoder.bias.data = weight.clone(), encoder_bias.clone()
    decoder, bias = decoder.clone().requires_grad_(), bias.clone().requires_grad_()
    vals, indices = flex.triton_topk_encode(x - bias, encoder.weight, encoder.bias, K)
    loss = flex.triton_topk_sae_loss(indices, decoder, vals, bias, x)
    loss.backward()
    recon = flex.triton_sae_decode(indices, decoder, vals, bias).detach()
    if spoil:
        recon[1, 2] = float("nan")
    last_fired = torch.full((F,), STEP - 1, device=x.device)
    last_fired[list(old)] = 0
    names = dict(x=x, encoder=encoder, decoder=decoder, bias=bias, vals=vals, indices=indices, recon=recon)
    names |= dict(last_fired=last_fired, step=STEP, B=B, D=D, aux_loss=0)
    exec(FUNCTION + LOOP, names)
    gradients = [leaf.grad for leaf in (encoder.weight, encoder.bias, decoder, bias)]
    return loss.detach(), names["aux_loss"], gradients, names["dead"].tolist()


def dense_step(parameters, old, scale):
    """The same in float64 from the whole [B, F] of pre-activations."""
    x, *leaves = (tensor.double() for tensor in parameters)
    weight, encoder_bias, decoder, bias = (leaf.requires_grad_() for leaf in leaves)

    def keep_topk(pre, k):
        chosen = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1)
        return pre.relu() * chosen

    codes = keep_topk((x - bias) @ weight.T + encoder_bias, K)
    recon = codes @ decoder + bias
    loss = (recon - x).square().mean()
    is_dead = torch.zeros(F, dtype=torch.bool, device=x.device)
    is_dead[list(old)] = True
    is_dead &= ~(codes > 0).any(0)
    aux_loss = 0
    if is_dead.any():
        pre = (x - bias)[:AUX_B].detach() @ weight.T + encoder_bias
        aux_codes = keep_topk(pre.masked_fill(~is_dead, -torch.inf), AUX_K)
        aux_loss = (aux_codes @ decoder - (x - recon)[:AUX_B].detach()).square().mean()
    gradients = torch.autograd.grad(loss + scale * aux_loss, (weight, encoder_bias, decoder, bias))
    return loss.detach(), torch.as_tensor(aux_loss).detach(), gradients, is_dead.nonzero().squeeze(1).tolist()


def assert_close(value, expected, dtype):
    """Within the roundings of pre-activations, reconstruction, their gradients and a sum over samples, each of terms
    no larger than the largest element."""
    value, expected = torch.as_tensor(value).double(), torch.as_tensor(expected)
    tolerance = allowed_error(2 * D + 2 * AUX_K + B * D, dtype, expected.abs().max(), expected, dtype)
    assert ((value - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_a_step_with_auxk_has_the_gradients_of_the_dense_form(flex, device, case, dtype):
    old, count = CASES[case]
    parameters = make_parameters(case, dtype, device)
    loss, aux_loss, gradients, dead = step_of_the_document(flex, parameters, old)
    true_loss, true_aux_loss, true_gradients, true_dead = dense_step(parameters, old, scale=1 / 32)
    assert dead == true_dead
    assert len(dead) == count
    assert_close(loss, true_loss, dtype)
    assert_close(aux_loss, true_aux_loss, dtype)
    for gradient, expected in zip(gradients, true_gradients, strict=True):
        assert_close(gradient, expected, dtype)
    for gradient, expected in zip(gradients[:3], true_gradients[:3], strict=True):
        if dead:  # on their own: only AuxK gives them a gradient, which is small beside the others
            assert_close(gradient[dead], expected[dead], dtype)
        assert (gradient[SILENT] == 0).all()


def test_an_auxk_loss_that_is_nan_adds_nothing(flex, device):
    old, _ = CASES["many dead"]
    parameters = make_parameters("many dead", torch.float32, device)
    _, aux_loss, gradients, dead = step_of_the_document(flex, parameters, old, spoil=True)
    _, _, true_gradients, _ = dense_step(parameters, old, scale=0)
    assert dead and aux_loss == 0
    for gradient, expected in zip(gradients, true_gradients, strict=True):
        assert_close(gradient, expected, torch.float32)
