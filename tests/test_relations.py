"""What the losses must satisfy whatever the numbers are."""

import itertools

import pytest
import torch
from support import (
    LOSSES,
    assert_agree,
    assert_right,
    deterministic_algorithms,
    make_problem,
    run,
    triton_loss,
)
from truth import Problem, Result

pytestmark = pytest.mark.kernels_ci


def test_topk_does_not_depend_on_the_order_of_columns(flex, device):
    problem = make_problem(5, 7, 9, 33, device=device, pattern="duplicates")
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4], device=device)
    permuted = problem._replace(indices=problem.indices[:, order], vals=problem.vals[:, order])
    result, other = run(flex.triton_topk_sae_loss, problem), run(flex.triton_topk_sae_loss, permuted)
    assert_agree("topk", problem, result, other._replace(vals=other.vals[:, order.argsort()]))


def test_hierarchical_depends_on_the_order_of_columns(flex, device):
    problem = make_problem(5, 7, 9, 33, device=device)
    # vals of very different size: then the order shows well above rounding
    problem = problem._replace(vals=problem.vals * torch.arange(7, 0, -1, device=device))
    reversed_columns = problem._replace(indices=problem.indices.flip(1), vals=problem.vals.flip(1))
    loss, other = (flex.triton_hierarchical_sae_loss(*p).item() for p in (problem, reversed_columns))
    assert abs(loss - other) > 1e-2 * loss


def test_hierarchical_with_one_column_is_topk(flex, device):
    problem = make_problem(5, 1, 9, 33, device=device)
    results = (run(triton_loss(flex, kind), problem) for kind in LOSSES)
    assert_agree("hierarchical", problem, *results)


def test_hierarchical_is_the_mean_of_topk_over_the_prefixes(flex, device):
    problem = make_problem(4, 6, 9, 33, device=device)
    prefixes = [problem._replace(indices=problem.indices[:, :j], vals=problem.vals[:, :j]) for j in range(1, 7)]
    results = [run(flex.triton_topk_sae_loss, prefix) for prefix in prefixes]
    results = [r._replace(vals=torch.nn.functional.pad(r.vals, (0, 6 - r.vals.shape[1]))) for r in results]
    mean = Result(*(torch.stack(values).mean(0) for values in zip(*results, strict=True)))
    assert_agree("hierarchical", problem, run(flex.triton_hierarchical_sae_loss, problem), mean)


def test_zero_vals_add_nothing_to_topk(flex, device):
    problem = make_problem(5, 4, 9, 33, device=device)
    extra = torch.arange(15, device=device).view(5, 3) % 9
    padded = problem._replace(
        indices=torch.cat([problem.indices, extra], dim=1),
        vals=torch.cat([problem.vals, torch.zeros(5, 3, device=device)], dim=1),
    )
    result, other = run(flex.triton_topk_sae_loss, problem), run(flex.triton_topk_sae_loss, padded)
    assert_agree("topk", problem, result, other._replace(vals=other.vals[:, :4]))
    assert_right("topk", padded, other)  # a zero val has a gradient all the same


@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_is_the_mean_of_its_parts(flex, device, kind):
    problem = make_problem(7, 4, 9, 33, device=device)
    loss = triton_loss(flex, kind)
    parts = [(slice(0, 3), 3 / 7), (slice(3, 7), 4 / 7)]
    pieces = [
        Result(*(share * value for value in run(loss, problem._replace(
            indices=problem.indices[rows], vals=problem.vals[rows], target=problem.target[rows]
        ))))
        for rows, share in parts
    ]  # fmt: skip
    left, right = pieces
    combined = Result(
        loss=left.loss + right.loss,
        weight=left.weight + right.weight,
        vals=torch.cat([left.vals, right.vals]),
        bias=left.bias + right.bias,
        target=torch.cat([left.target, right.target]),
    )
    assert_agree(kind, problem, run(loss, problem), combined)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("grad_out", [0.0, 1.0, -1.0, 2.5, -1e-3, 65536.0])
def test_gradients_scale_with_grad_out(flex, device, kind, grad_out):
    problem = make_problem(4, 5, 9, 33, device=device)
    assert_right(kind, problem, run(triton_loss(flex, kind), problem, torch.tensor(grad_out, device=device)), grad_out)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("F", [9, 300])  # 300: so many that zeros are written first
def test_features_without_pairs_have_no_gradient_whatever_grad_out_is(flex, device, kind, deterministic, F):
    problem = make_problem(4, 5, F, 33, device=device)
    problem.indices.clamp_(max=7)
    with deterministic_algorithms(deterministic):
        result = run(triton_loss(flex, kind), problem, torch.tensor(float("inf"), device=device))
    assert not result.weight[8:].any()
    assert not result.weight[problem.indices].isfinite().any()


@pytest.mark.parametrize("kind", LOSSES)
def test_grad_out_may_come_from_an_expanded_loss(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    loss = triton_loss(flex, kind)
    result = run(lambda *inputs: loss(*inputs).expand(4).sum(), problem)
    assert_right(kind, problem, result._replace(loss=result.loss / 4), 4.0)
    one = torch.ones(1, device=device).expand(3)[1]  # a view of a stride-0 tensor, not a tensor of its own
    assert_right(kind, problem, run(loss, problem, one))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_may_be_used_twice_in_one_graph(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    loss = triton_loss(flex, kind)
    result = run(lambda *inputs: loss(*inputs) - 3 * loss(*inputs), problem)
    assert_right(kind, problem, result._replace(loss=result.loss / -2), -2.0)


SUBSETS = [names for n in range(1, 5) for names in itertools.combinations(Problem._fields[1:], n)]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_each_subset_of_gradients_is_right(flex, device, kind, names):
    problem = make_problem(3, 5, 9, 33, device=device)
    inputs = problem._replace(**{name: getattr(problem, name).requires_grad_() for name in names})
    gradients = dict(
        zip(
            names,
            torch.autograd.grad(triton_loss(flex, kind)(*inputs), [getattr(inputs, n) for n in names]),
            strict=True,
        )
    )
    for tensor in inputs[1:]:
        tensor.requires_grad_(False)
    everything = run(triton_loss(flex, kind), problem)
    assert_right(kind, problem, everything._replace(**gradients))
