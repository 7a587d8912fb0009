"""Losses, encoder and gradients in float64, straight from the formulas: what tests, benchmarks and example compare to.

It is written apart from the package's own torch references, one step of the K axis at a time, so that no tensor is
larger than ``[F, D]`` or ``[B, D]``.
"""

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """The arguments of a loss."""

    indices: torch.Tensor  # [B, K]
    weight: torch.Tensor  # [F, D]
    vals: torch.Tensor  # [B, K]
    bias: torch.Tensor  # [D]
    target: torch.Tensor  # [B, D]


class Result(NamedTuple):
    """A loss and its gradients, or one number or tensor about each of them."""

    loss: object
    weight: object
    vals: object
    bias: object
    target: object


class EncoderProblem(NamedTuple):
    """The arguments of the sparse encoder, and the gradient of what it returns."""

    x: torch.Tensor  # [B, D]
    weight: torch.Tensor  # [F, D]
    bias: torch.Tensor  # [F]
    indices: torch.Tensor  # [B, K]
    vals_grad: torch.Tensor  # [B, K]


class EncoderResult(NamedTuple):
    """Pre-activations and gradients, or one number or tensor about each of them."""

    vals: object
    x: object
    weight: object
    bias: object


class DecodeProblem(NamedTuple):
    """The arguments of the decode, P pairs, with the sample of each; and the gradient of what it returns."""

    indices: torch.Tensor  # [P]
    weight: torch.Tensor  # [F, D]
    vals: torch.Tensor  # [P]
    bias: torch.Tensor  # [D]
    samples: torch.Tensor  # [P]
    recon_grad: torch.Tensor  # [B, D]


class DecodeResult(NamedTuple):
    """Reconstructions and gradients, or one number or tensor about each of them."""

    recon: object
    weight: object
    vals: object
    bias: object


def truth(kind: str, problem: Problem, grad_out: float = 1.0, sample_weight: torch.Tensor | None = None) -> Result:
    """Loss and gradients of the "topk" or "hierarchical" loss in float64, the gradients times ``grad_out``."""
    doubles = Problem(problem.indices.long(), *(t.detach().double() for t in problem[1:]))
    return _formulas(kind, doubles, grad_out, 1.0 if sample_weight is None else sample_weight.double(), -1.0)


def magnitude(kind: str, problem: Problem, grad_out: float = 1.0, sample_weight: torch.Tensor | None = None) -> Result:
    """The truth with every term replaced by its absolute value: the scale of rounding errors, element by element."""
    absolutes = Problem(problem.indices.long(), *(t.detach().double().abs() for t in problem[1:]))
    weights = 1.0 if sample_weight is None else sample_weight.double().abs()
    return _formulas(kind, absolutes, abs(grad_out), weights, 1.0)


@torch.no_grad()
def _formulas(kind, problem, grad_out, sample_weight, minus):
    """``sample_weight`` is [B], or 1; ``minus`` is -1, or 1 to turn every subtraction into an addition."""
    indices, weight, vals, bias, target = problem
    K, hierarchical = indices.shape[1], kind == "hierarchical"
    residual = bias + minus * target
    # The sum of the residuals that the loss is made of: the last one of TopK, all K prefixes of HierarchicalTopK
    suffix, squares = torch.zeros_like(target), 0.0
    for step in range(K):
        residual = torch.addcmul(residual, vals[:, step, None], weight[indices[:, step]])
        if hierarchical:
            suffix += residual
            squares = squares + residual.square().sum(1)
    if not hierarchical:
        suffix, squares = residual, residual.square().sum(1)
    count = target.numel() * (K if hierarchical else 1)
    factor = (2 * grad_out / max(count, 1) * sample_weight * torch.ones_like(squares))[:, None]
    d_bias, d_target = (factor * suffix).sum(0), minus * factor * suffix
    d_weight, d_vals = torch.zeros_like(weight), torch.zeros_like(vals)
    # From the last step to the first, so that the short sums of late steps are not differences of long ones
    tail = torch.zeros_like(target)
    for step in reversed(range(K)):
        row, val = weight[indices[:, step]], vals[:, step, None]
        tail = tail + residual if hierarchical else residual
        d_weight.index_add_(0, indices[:, step], factor * val * tail)
        d_vals[:, step] = factor[:, 0] * (row * tail).sum(1)
        if hierarchical:
            residual = torch.addcmul(residual, val, row, value=minus)
    loss = (sample_weight * squares).sum() / count if count else torch.full_like(bias[0], float("nan"))
    return Result(loss, d_weight, d_vals, d_bias, d_target)


@torch.no_grad()
def nested_truth(problem: Problem, ends: torch.Tensor, losses_grad: torch.Tensor, absolute: bool = False) -> Result:
    """Nested losses [L] of ends [L] or [B, L], and gradients in float64; or of absolute inputs, the scale of rounding
    errors, with every subtraction turned into an addition."""
    tensors = [tensor.detach().double() for tensor in (*problem[1:], losses_grad)]
    weight, vals, bias, target, losses_grad = [t.abs() for t in tensors] if absolute else tensors
    minus = 1.0 if absolute else -1.0
    indices, (B, K), L = problem.indices.long(), problem.indices.shape, ends.shape[-1]
    ends, samples = ends.long().expand(B, L), torch.arange(B, device=ends.device)
    prefix, residuals = bias + minus * target, target.new_zeros(L, *target.shape)
    for step in range(K + 1):
        if step:
            prefix = torch.addcmul(prefix, vals[:, step - 1, None], weight[indices[:, step - 1]])
        for level in range(L):
            residuals[level, ends[:, level] == step] = prefix[ends[:, level] == step]
    scaled = residuals * (2 / target.numel() * losses_grad)[:, None, None]
    suffixes = torch.cat([scaled.flip(0).cumsum(0).flip(0), torch.zeros_like(scaled[:1])])  # zeros beyond all ends
    d_weight, d_vals = torch.zeros_like(weight), torch.zeros_like(vals)
    for step in range(K):
        row, tail = weight[indices[:, step]], suffixes[(ends <= step).sum(1), samples]
        d_weight.index_add_(0, indices[:, step], vals[:, step, None] * tail)
        d_vals[:, step] = (row * tail).sum(1)
    return Result(residuals.square().mean((1, 2)), d_weight, d_vals, suffixes[0].sum(0), minus * suffixes[0])


@torch.no_grad()
def encoder_truth(problem: EncoderProblem, absolute: bool = False) -> EncoderResult:
    """Pre-activations at the indices and gradients in float64; or of absolute inputs, the scale of rounding errors."""
    x, weight, bias, vals_grad = (
        tensor.detach().double().abs() if absolute else tensor.detach().double()
        for tensor in (problem.x, problem.weight, problem.bias, problem.vals_grad)
    )
    indices, vals = problem.indices.long(), torch.empty_like(vals_grad)
    d_x, d_weight, d_bias = torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(indices.shape[1]):
        features, grad = indices[:, step], vals_grad[:, step]
        vals[:, step] = (x * weight[features]).sum(1) + bias[features]
        d_x.addcmul_(grad[:, None], weight[features])
        d_weight.index_add_(0, features, grad[:, None] * x)
        d_bias.index_add_(0, features, grad)
    return EncoderResult(vals, d_x, d_weight, d_bias)


@torch.no_grad()
def decode_truth(problem: DecodeProblem, absolute: bool = False) -> DecodeResult:
    """Reconstructions and gradients in float64; or of absolute inputs, the scale of rounding errors."""
    weight, vals, bias, grad = (
        tensor.detach().double().abs() if absolute else tensor.detach().double()
        for tensor in (problem.weight, problem.vals, problem.bias, problem.recon_grad)
    )
    indices, samples = problem.indices.long(), problem.samples
    recon = bias.repeat(len(grad), 1).index_add(0, samples, vals[:, None] * weight[indices])
    d_weight = torch.zeros_like(weight).index_add(0, indices, vals[:, None] * grad[samples])
    return DecodeResult(recon, d_weight, (weight[indices] * grad[samples]).sum(1), grad.sum(0))
