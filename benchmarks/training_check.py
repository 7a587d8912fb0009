"""The check that a training step computes the right thing, against float64, before it is timed."""

import math

import inputs
import torch
from cases import Case
from inputs import SETS, ParityError
from truth import EncoderProblem, Problem, encoder_truth, truth

# How much a matmul errs by in each number that it is given, relative to it: TF32 keeps 11 bits and may truncate,
# bfloat16 rounds to 8.
ROUNDING = {"float32": 0.0, "TF32": 2.0**-10, "autocast": 2.0**-8}
# A sum of independent errors exceeds so many times its scale with probability 2 exp(-8**2 / 2) = 3e-14 (Hoeffding).
DEVIATIONS = 8
# Elements of a float64 block of [B, F]: 512 MiB
BLOCK = 2**26


def check(case: Case, made, step, row: str) -> float:
    """The largest relative error of a step; raises ParityError where it computes something else.

    Loss and gradients are compared with float64 for the vals and indices that the step has chosen, of the other sets
    than set 0 the losses alone.
    """
    loss, vals, indices = step(0)
    x, encoder, encoder_bias, decoder, bias = (tensor.detach() for tensor in made.sets[0])
    # Of a captured step they are overwritten by its next run.
    got = dict(zip(("encoder", "encoder_bias", "decoder", "bias"), (leaf.grad for leaf in made.leaves), strict=True))
    made.clear()
    check_selection(case, x - bias, encoder, encoder_bias, vals, indices)

    float32, _ = inputs.bounds(case)
    u = ROUNDING[case.precision]
    # Dense gradients: both factors of a matmul, its result, and partial sums of it. Sparse ones: the gradient of vals,
    # which has their dtype.
    roundings = (1 if case.precision == "autocast" else 0) if row == "flex_sae" else 4
    encoder_bound = float32 + roundings * u
    errors = []
    if case.loss:
        first = truth(case.loss, Problem(indices, decoder, vals, bias, x))
        errors.append(compare("loss", loss, first.loss, float32))
        errors.append(compare("decoder", got.pop("decoder"), first.weight, float32))
        vals_grad, bias_grad = first.vals, first.bias
        del first
    else:
        vals_grad, bias_grad = made.vals_grad.to(vals.dtype).double(), 0
    vals_grad = torch.where(vals > 0, vals_grad, 0)
    second = encoder_truth(EncoderProblem(x - bias, encoder, encoder_bias, indices, vals_grad))
    errors.append(compare("encoder", got.pop("encoder"), second.weight, encoder_bound))
    errors.append(compare("encoder_bias", got.pop("encoder_bias"), second.bias, encoder_bound))
    errors.append(compare("bias", got.pop("bias"), bias_grad - second.x.sum(0), encoder_bound))
    for i in range(1, SETS) if case.loss else ():
        loss, vals, indices = step(i)
        true = truth(case.loss, Problem(indices, decoder, vals, bias, made.sets[i].x)).loss
        errors.append(compare(f"loss of set {i}", loss, true, float32))
    made.clear()
    return max(errors)


def compare(name: str, got: torch.Tensor | None, expected: torch.Tensor, bound: float) -> float:
    """The relative error (Frobenius norm); raises ParityError where it, or that of a row, is beyond the bound."""
    if got is None:
        raise ParityError(f"{name} has no gradient")
    difference, norm = got.double().sub_(expected), expected.norm()
    error = (difference.norm() / norm).item()
    if not error <= bound:
        raise ParityError(f"{name} is off by {error:.1e}, allowed {bound:.1e}")
    if expected.ndim == 2:
        # A lost row does not show in the norm of all. What cancels in a row is of the size of usual rows.
        usual = norm / math.sqrt(len(expected))
        off = (difference.norm(dim=1) > bound * (expected.norm(dim=1) + usual)).nonzero()
        if len(off):
            raise ParityError(f"{name} is off in {len(off)} rows, the first is {off[0].item()}")
    return error


@torch.no_grad()
def check_selection(case: Case, x, encoder, encoder_bias, vals, indices) -> None:
    """Raise ParityError unless vals are relu of pre at indices, and these are the K largest, as precision explains.

    With u the rounding of a factor, e = 2**-23 that of a float32 sum, and n = |x * w| over D, the norm of the products,

        |pre - truth| <= (4 u + sqrt(D) e) (|truth| + |bias|) + 8 (2 u + sqrt(D) e) n:

    products err by 2 u at most, which is a bias (truncation) and independent deviations from it; pre and bias are
    rounded, pre twice; and D additions round sums of the size of truth and n.
    """
    u, summing = ROUNDING[case.precision], math.sqrt(x.shape[1]) * 2.0**-23
    if (indices.sort(dim=1).values.diff(dim=1) == 0).any():
        raise ParityError("a sample has a feature twice")
    weight, bias = encoder.double().T, encoder_bias.double()
    squares = weight.square()
    rows = max(1, BLOCK // len(encoder))
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        some, chosen, got = x[block].double(), indices[block], vals[block].double()
        pre = torch.addmm(bias, some, weight)
        allowed = (some.square() @ squares).sqrt_().mul_(DEVIATIONS * (2 * u + summing))
        allowed += (4 * u + summing) * (pre.abs() + bias.abs())
        off = (got - pre.gather(1, chosen).relu_()).abs_() / allowed.gather(1, chosen)
        if not off.max() <= 1:
            raise ParityError(f"vals are off by {off.max().item():.1e} times what is allowed")
        missed = pre.sub_(allowed).scatter_(1, chosen, -math.inf).amax(dim=1) > got.amin(dim=1)
        if missed.any():
            raise ParityError(f"{missed.sum().item()} samples of a block miss a larger feature")
