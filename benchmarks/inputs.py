"""Inputs of the losses, and the check that a row computes the right thing before it is timed."""

import math
import sys
from pathlib import Path

import torch
from cases import Case, Shape

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from truth import Problem, truth

DEVICE = "cuda"
# Sets of indices, vals and target that take turns, so that no step sees those of the step before.
SETS = 3


def make_indices(shape: Shape) -> torch.Tensor:
    """K distinct features a row [B, K]: all equally likely, or with probability proportional to 1 / rank (Zipf)."""
    popularity = torch.ones(shape.F, device=DEVICE)
    if shape.distribution == "zipf":
        popularity /= 1 + torch.randperm(shape.F, device=DEVICE)
    drawn = []
    rows = max(1, 2**26 // shape.F)  # 2**26 floats at a time: 256 MiB instead of B * F
    for start in range(0, shape.B, rows):
        # The K first in a race of exponential clocks with these rates are K draws without replacement.
        clocks = torch.empty(min(rows, shape.B - start), shape.F, device=DEVICE).exponential_().div_(popularity)
        drawn.append(clocks.topk(shape.K, largest=False).indices)
    indices = torch.cat(drawn)
    # topk puts the popular features first; shuffle, so that the order of the columns says nothing.
    return indices.gather(1, torch.rand(indices.shape, device=DEVICE).argsort(1))


class Inputs:
    """SETS problems that share weight and bias; weight, bias and vals require grad."""

    def __init__(self, shape: Shape):
        torch.manual_seed(0)
        dtype = getattr(torch, shape.dtype)
        self.weight = torch.randn(shape.F, shape.D, device=DEVICE, dtype=dtype).div_(shape.D**0.5).requires_grad_()
        self.bias = torch.randn(shape.D, device=DEVICE, dtype=dtype).requires_grad_()
        self.sets = []
        for _ in range(SETS):
            vals = torch.randn(shape.B, shape.K, device=DEVICE).abs_().sort(dim=1, descending=True).values
            target = torch.randn(shape.B, shape.D, device=DEVICE, dtype=dtype)
            vals = vals.to(dtype).requires_grad_()
            self.sets.append(Problem(make_indices(shape), self.weight, vals, self.bias, target))

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The tensors with gradients."""
        return [self.weight, self.bias, *(problem.vals for problem in self.sets)]

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def step(self, function, i: int) -> dict[str, torch.Tensor]:
        """The loss of set `i` and its gradients by name."""
        self.clear()
        loss = function(*self.sets[i])
        loss.backward()
        return {
            "loss": loss.detach(),
            **{name: getattr(self.sets[i], name).grad for name in ("weight", "vals", "bias")},
        }

    def truths(self, loss: str) -> list[dict[str, torch.Tensor]]:
        """What step gives for each set, in float64: loss and gradients of set 0, the loss alone of the others."""
        first = truth(loss, self.sets[0])
        return [
            {"loss": first.loss, "weight": first.weight, "vals": first.vals, "bias": first.bias},
            *({"loss": truth(loss, problem).loss} for problem in self.sets[1:]),
        ]


class ParityError(Exception):
    """A row computes something else."""


def bounds(case: Case) -> tuple[float, float]:
    """The relative errors (Frobenius norm) that rounding explains: of a whole result, and of a row of d weight.

    A result, and one quantity that it is made of, are rounded to the dtype: at most eps / 2 each. Sums are taken in
    float32. The longest run over samples (bias) or columns (vals); in a sum of n terms with random signs, rounding
    errors grow relative to the sum as sqrt(n) * eps / 2. A feature that is active only at a late step of the
    hierarchical loss gets the small end of a sum over K residuals, so that its row may be off by K times as much.
    """
    shape, float32 = case.shape, torch.finfo(torch.float32).eps
    rounding = torch.finfo(getattr(torch, shape.dtype)).eps
    summing = math.sqrt(max(shape.B, shape.D)) * float32 / 2
    return rounding + summing, rounding + summing * (shape.K if case.loss == "hierarchical" else 1)


def check(case: Case, step, truths: list[dict[str, torch.Tensor]]) -> float:
    """The largest relative error of `step` on all sets; raises ParityError where one is beyond its bound or NaN."""
    bound, row_bound = bounds(case)
    largest = 0.0
    for i, want in enumerate(truths):
        got = step(i)
        for name, expected in want.items():
            if got[name] is None:
                raise ParityError(f"{name} has no gradient")
            difference = got[name].double().sub_(expected)
            error = (difference.norm() / expected.norm()).item()
            if not error <= bound:
                raise ParityError(f"{name} of set {i} is off by {error:.1e}, allowed {bound:.1e}")
            largest = max(largest, error)
            if name == "weight":  # a lost row does not show in the norm of all
                off = (difference.norm(dim=1) > row_bound * expected.norm(dim=1)).nonzero()
                if len(off):
                    raise ParityError(f"weight is off in {len(off)} rows, the first is {off[0].item()}")
    return largest


def check_repeats(step) -> None:
    """Raise ParityError unless two runs give the same bits."""
    first, again = step(0), step(0)
    for name in first:
        if not torch.equal(first[name], again[name]):
            raise ParityError(f"{name} differs between two deterministic runs")
