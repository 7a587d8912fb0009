"""The decode of fixed and ragged rows, beside other ways to compute the same."""

import functools
import math
import sys
from types import ModuleType

import inputs
import measure
import torch
from cases import DECODE_PEERS, Case
from inputs import Inputs, ParityError
from peers import ROOT
from truth import DecodeProblem, decode_truth

sys.path.append(str(ROOT / "examples" / "trainers"))
from pairs import ragged_pairs

DENSE = ("dense codes", "flex_sae, of dense codes")


class DecodeInputs:
    """The pairs and weights of the losses; target is the gradient of recon. Dense codes [B, F] are made as needed."""

    def __init__(self, made: Inputs):
        self.made = made

    @property
    def leaves(self) -> list[torch.Tensor]:
        codes = self.codes if "codes" in vars(self) else []
        return [*self.made.leaves, *codes]

    @functools.cached_property
    def codes(self) -> list[torch.Tensor]:
        F = len(self.made.weight)
        return [
            p.vals.new_zeros(len(p.vals), F).scatter(1, p.indices, p.vals.detach()).requires_grad_()
            for p in self.made.sets
        ]

    def drop_codes(self) -> None:
        vars(self).pop("codes", None)

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    @property
    def sets(self):
        return self.made.sets


def lengths_of(row: str, B: int, K: int) -> torch.Tensor:
    """Pairs of each sample [B], B * K in all: K; as many as fall on it at random; or proportional to 1 / rank."""
    P = B * K
    if row.endswith("random rows"):
        return torch.randint(B, (P,)).bincount(minlength=B)
    if row.endswith("Zipf rows"):
        shares = 1 / (1 + torch.randperm(B).double())
        lengths = (shares / shares.sum() * P).long()
        lengths[: P - int(lengths.sum())] += 1
        return lengths
    return torch.full((B,), K)


def embedding_bag(indices, weight, vals, bias):
    return torch.nn.functional.embedding_bag(indices, weight, per_sample_weights=vals, mode="sum") + bias


def sparse_product(indices, weight, vals, bias):
    B, K = indices.shape
    samples = torch.arange(B, device=indices.device).repeat_interleave(K)
    places = torch.stack([samples, indices.flatten()])
    codes = torch.sparse_coo_tensor(places, vals.flatten(), (B, len(weight)), check_invariants=False)
    return torch.sparse.mm(codes, weight) + bias


def implementations(case: Case, made: DecodeInputs, package: ModuleType) -> dict:
    """For each row a function of a set's number that gives recon, and the lengths of its samples' rows."""
    B, K = case.shape.B, case.shape.K
    decode = package.triton_sae_decode
    torch.manual_seed(0)

    def of_pairs(function):
        def run(i):
            indices, weight, vals, bias, _ = made.sets[i]
            return function(indices, weight, vals, bias)

        return run

    def ragged(lengths):
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(inputs.DEVICE)

        def function(indices, weight, vals, bias):
            return decode(indices.flatten(), weight, vals.flatten(), bias, offsets=offsets)

        return of_pairs(function)

    def pairs_of_codes(i):
        indices, vals, offsets = ragged_pairs(made.codes[i], B * K)
        return decode(indices, made.made.weight, vals, made.made.bias, offsets=offsets)

    lengths = {row: lengths_of(row, B, K) for row in ("flex_sae", *DECODE_PEERS)}
    functions = {
        "flex_sae": of_pairs(decode),
        "flex_sae, random rows": ragged(lengths["flex_sae, random rows"]),
        "flex_sae, Zipf rows": ragged(lengths["flex_sae, Zipf rows"]),
        "embedding_bag": of_pairs(embedding_bag),
        "torch.sparse": of_pairs(sparse_product),
        "dense codes": lambda i: torch.addmm(made.made.bias, made.codes[i], made.made.weight),
        "flex_sae, of dense codes": pairs_of_codes,
    }
    return {row: (functions[row], lengths[row]) for row in case.rows}


def prepare(case: Case, made: DecodeInputs, row: str, function) -> tuple:
    """Check a row. Returns the step to time, and what its record gets."""
    forward, lengths = function
    if row not in DENSE:
        made.drop_codes()

    def step(i):
        made.clear()
        recon = forward(i)
        recon.backward(made.sets[i].target)
        return recon.detach()

    record = {"status": "ok", "error": check(case, made, row, step, lengths)}
    return step, {**record, **measure.memory(made, step, None)}


def check(case: Case, made: DecodeInputs, row: str, step, lengths: torch.Tensor) -> float:
    """The largest relative error of recon and gradients of set 0; raises ParityError where one is beyond its bound."""
    recon = step(0)
    problem = made.sets[0]
    vals_grad = made.codes[0].grad.gather(1, problem.indices) if row in DENSE else problem.vals.grad
    got = recon, problem.weight.grad, vals_grad.flatten(), problem.bias.grad
    samples = torch.repeat_interleave(lengths).to(inputs.DEVICE)
    pairs = problem.indices.flatten(), problem.weight, problem.vals.flatten(), problem.bias, samples
    expected = decode_truth(DecodeProblem(*pairs, problem.target))
    # As for the losses, see inputs.bounds; a row of pairs may be longer than all other sums.
    longest = max(case.shape.B, case.shape.D, int(lengths.max()))
    bound = torch.finfo(problem.weight.dtype).eps + math.sqrt(longest) * torch.finfo(torch.float32).eps / 2
    if row in ("dense codes", "torch.sparse") and problem.weight.dtype == torch.float32:
        bound += 2.0**-10  # of TF32
    largest = 0.0
    for name, value, true in zip(expected._fields, got, expected, strict=True):
        error = ((value.double() - true).norm() / true.norm()).item()
        if not error <= bound:
            raise ParityError(f"{name} is off by {error:.1e}, allowed {bound:.1e}")
        largest = max(largest, error)
    return largest
