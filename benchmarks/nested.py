"""Nested losses, beside the other losses and a masked decode in torch for each level."""

from types import ModuleType

import inputs
import measure
import torch
from cases import NESTED, Case
from inputs import Inputs, ParityError
from truth import nested_truth


def make_ends(L: int, per_sample: bool, B: int, K: int) -> torch.Tensor:
    """L equal steps up to K, [L]; or of each sample [B, L], drawn at random, the last end K."""
    if per_sample:
        ends = torch.randint(K + 1, (B, L)).sort(dim=1).values
        ends[:, -1] = K
        return ends.to(inputs.DEVICE)
    return torch.arange(1, L + 1, device=inputs.DEVICE) * K // L


def masked_decodes(indices, weight, vals, bias, target, ends):
    """A decode by torch's embedding_bag for each level, of vals that are zero behind its end."""
    steps, losses = torch.arange(vals.shape[1], device=vals.device), []
    for end in ends.unbind():
        kept = vals.where(steps < end, 0)
        recon = torch.nn.functional.embedding_bag(indices, weight, per_sample_weights=kept, mode="sum") + bias
        losses.append(torch.nn.functional.mse_loss(recon, target))
    return torch.stack(losses)


def implementations(case: Case, package: ModuleType) -> dict:
    """For each row a function of the arguments of a loss that gives losses [L], and their ends."""
    torch.manual_seed(0)
    functions = {}
    for row in case.rows:
        loss = masked_decodes if row == "5 masked decodes" else package.triton_nested_sae_loss
        functions[row] = loss, make_ends(*NESTED[row], case.shape.B, case.shape.K)
    return functions


def prepare(case: Case, made: Inputs, row: str, function) -> tuple:
    """Check a row. Returns the step to time, and what its record gets."""
    loss, ends = function

    def step(i):
        return made.step(lambda *arguments: loss(*arguments, ends).sum(), i)

    record = {"status": "ok", "error": check(case, made, step, ends)}
    return step, {**record, **measure.memory(made, step, None)}


def check(case: Case, made: Inputs, step, ends: torch.Tensor) -> float:
    """The largest relative error of the sum of the losses and its gradients on set 0; raises ParityError where one is
    beyond its bound."""
    bound, _ = inputs.bounds(case)
    true = nested_truth(made.sets[0], ends, torch.ones(ends.shape[-1], device=ends.device))
    expected = {"loss": true.loss.sum(), "weight": true.weight, "vals": true.vals, "bias": true.bias}
    largest = 0.0
    for name, value in step(0).items():
        error = ((value.double() - expected[name]).norm() / expected[name].norm()).item()
        if not error <= bound:
            raise ParityError(f"{name} is off by {error:.1e}, allowed {bound:.1e}")
        largest = max(largest, error)
    return largest
