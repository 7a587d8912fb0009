"""What the losses must satisfy whatever the numbers are."""

from itertools import combinations

import pytest
import torch
from support import assert_agree, assert_right, deterministic_algorithms, make_problem, modes, run, triton_loss
from torch.nn.functional import pad
from truth import Problem, Result

pytestmark = pytest.mark.kernels_ci


def test_topk_does_not_depend_on_the_order_of_columns(flex, device):
    problem = make_problem(5, 7, 9, 33, device=device, pattern="duplicates")
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4], device=device)
    permuted = problem._replace(indices=problem.indices[:, order], vals=problem.vals[:, order])
    result, other = run(flex.triton_topk_sae_loss, problem), run(flex.triton_topk_sae_loss, permuted)
    assert_agree("topk", problem, result, other._replace(vals=other.vals[:, order.argsort()]))


@pytest.mark.parametrize("K", [1, 6])
def test_hierarchical_is_the_mean_of_topk_over_the_prefixes(flex, device, K):
    problem = make_problem(4, K, 9, 33, device=device)
    prefixes = [problem._replace(indices=problem.indices[:, :j], vals=problem.vals[:, :j]) for j in range(1, K + 1)]
    results = [run(flex.triton_topk_sae_loss, prefix) for prefix in prefixes]
    results = [r._replace(vals=pad(r.vals, (0, K - r.vals.shape[1]))) for r in results]
    mean = Result(*(torch.stack(values).mean(0) for values in zip(*results, strict=True)))
    assert_agree("hierarchical", problem, run(flex.triton_hierarchical_sae_loss, problem), mean)


def test_zero_vals_add_nothing_to_topk(flex, device):
    problem = make_problem(5, 4, 9, 33, device=device)
    padded = problem._replace(indices=pad(problem.indices, (0, 3), value=8), vals=pad(problem.vals, (0, 3)))
    result, other = run(flex.triton_topk_sae_loss, problem), run(flex.triton_topk_sae_loss, padded)
    assert_agree("topk", problem, result, other._replace(vals=other.vals[:, :4]))
    assert_right("topk", padded, other)  # a zero val has a gradient all the same


def test_a_batch_is_the_mean_of_its_parts(flex, device, kind):
    problem = make_problem(7, 4, 9, 33, device=device)
    loss = triton_loss(flex, kind)
    parts = []
    for rows in (slice(0, 3), slice(3, 7)):
        fields = {name: getattr(problem, name)[rows] for name in ("indices", "vals", "target")}
        part = run(loss, problem._replace(**fields))
        parts.append(Result(*(len(fields["vals"]) / 7 * value for value in part)))
    combined = Result(*map(torch.add, *(part._replace(vals=part.bias, target=part.bias) for part in parts)))
    vals, target = (torch.cat([getattr(part, name) for part in parts]) for name in ("vals", "target"))
    combined = combined._replace(vals=vals, target=target)
    assert_agree(kind, problem, run(loss, problem), combined)


@pytest.mark.parametrize("grad_out", [0.0, 1.0, -1.0, 2.5, -1e-3, 65536.0])
def test_gradients_scale_with_grad_out(flex, device, kind, grad_out):
    problem = make_problem(4, 5, 9, 33, device=device)
    assert_right(kind, problem, run(triton_loss(flex, kind), problem, torch.tensor(grad_out, device=device)), grad_out)


@modes
@pytest.mark.parametrize("F", [9, 300])
def test_features_without_pairs_have_no_gradient_whatever_grad_out_is(flex, device, kind, deterministic, F):
    problem = make_problem(4, 5, F, 33, device=device)
    problem.indices.clamp_(max=7)
    with deterministic_algorithms(deterministic):
        result = run(triton_loss(flex, kind), problem, torch.tensor(float("inf"), device=device))
    assert not result.weight[8:].any()
    assert not result.weight[problem.indices].isfinite().any()


def test_grad_out_may_come_from_an_expanded_loss(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    loss = triton_loss(flex, kind)
    result = run(lambda *inputs: loss(*inputs).expand(4).sum(), problem)
    assert_right(kind, problem, result._replace(loss=result.loss / 4), 4.0)
    one = torch.ones(1, device=device).expand(3)[1]  # a view of a stride-0 tensor, not a tensor of its own
    assert_right(kind, problem, run(loss, problem, one))


@pytest.mark.parametrize("names", [c for n in range(1, 5) for c in combinations(Problem._fields[1:], n)], ids="+".join)
def test_each_subset_of_gradients_is_right(flex, device, kind, names):
    problem = make_problem(3, 5, 9, 33, device=device)
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in names}
    gradients = torch.autograd.grad(triton_loss(flex, kind)(*problem._replace(**leaves)), [*leaves.values()])
    everything = run(triton_loss(flex, kind), problem)
    assert_right(kind, problem, everything._replace(**dict(zip(names, gradients, strict=True))))
