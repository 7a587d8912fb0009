"""Gradients summed in the order of features: scratch, its float16 form, and the digits of shrinking residuals."""

import pytest
import torch
from support import (
    DTYPES,
    INTERPRETED,
    assert_right,
    check,
    deterministic_algorithms,
    make_problem,
    modes,
    relative_error,
    result_dtypes,
    run,
    submodule,
    triton_loss,
)
from truth import Problem, Result, truth


# Sums take tiles of 512 columns, and half a one for up to 256 that are left.
@pytest.mark.parametrize("D, dtype", [*((513, dtype) for dtype in DTYPES), (1031, torch.float32)], ids=str)
def test_the_last_columns_may_fill_half_a_tile(flex, device, kind, D, dtype):
    problem = make_problem(17, 16, 3, D, device=device, dtypes=dtype, pattern="one_hot_feature")  # 136 pairs in one
    check(flex, kind, problem, deterministic=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [("weight", "vals"), ("weight",), ("vals",)], ids="+".join)
@pytest.mark.parametrize("tiles", [1, 2])
def test_scratch_for_some_of_the_columns_is_enough(flex, device, monkeypatch, tiles, names, dtype):
    itemsize = {torch.float64: 8, torch.bfloat16: 2}.get(dtype, 4)  # of a number in scratch
    tile = 256 // itemsize
    # Two launches of `tiles` tiles and one of less; a feature of 272 pairs is heavy, the others are light.
    B, K, F, D = 16, 33, 6, (2 * tiles + 1) * tile - 5
    problem = make_problem(B, K, F, D, device=device, dtypes=dtype, pattern="one_hot_feature")
    exact = truth("hierarchical", problem)
    rounded = Result(*(value.to(dtype) for value, dtype in zip(exact, result_dtypes(problem), strict=True)))

    monkeypatch.setattr(submodule(flex, "hierarchical_backward"), "_SCRATCH_BYTES", K * tiles * tile * itemsize)
    sums, first_columns = submodule(flex, "segment_sum").SegmentSum, []
    add = sums.add

    def spy(self, rows, first_column=0, **options):
        first_columns.append(first_column)
        add(self, rows, first_column, **options)

    monkeypatch.setattr(sums, "add", spy)
    leaves = [getattr(problem, name).clone().requires_grad_() for name in names]
    with deterministic_algorithms():
        loss = flex.triton_hierarchical_sae_loss(*problem._replace(**dict(zip(names, leaves, strict=True))))
        gradients = torch.autograd.grad(loss, leaves)
    assert first_columns == ([0, tiles * tile, 2 * tiles * tile] if "weight" in names else [])
    assert_right("hierarchical", problem, rounded._replace(**dict(zip(names, gradients, strict=True))))


# The hierarchical gradient of a bfloat16 weight passes through float16 scratch, scaled row by row.
BF16_SIZES = (5, 6, 30, 127) if INTERPRETED else (64, 32, 2048, 513)  # F = B * K: a feature belongs to one sample


def bf16_problem(device):
    B, K, F, _ = BF16_SIZES
    problem = make_problem(*BF16_SIZES, device=device, dtypes=torch.bfloat16)
    indices = torch.randperm(F, generator=torch.Generator().manual_seed(0)).view(B, K).to(device)
    return problem._replace(indices=indices, bias=torch.zeros_like(problem.bias))


def assert_errs_by_one_rounding(value, true):
    assert value.isfinite().all()
    # Storing bfloat16, the interpreter truncates: about twice the error of rounding, and few numbers to average over.
    slack = 4 if INTERPRETED else 1.1
    assert relative_error(value, true) <= slack * relative_error(true.bfloat16(), true)


@pytest.mark.parametrize(
    "names, scale", [*((("vals", "bias", "target"), s) for s in (1e-15, 1.0, 1e15)), (("target",), 1e20)], ids=str
)
@pytest.mark.parametrize("pattern", ["uniform", "one_hot_feature"])
def test_bfloat16_gradients_err_by_one_rounding_at_any_scale(flex, device, kind, names, scale, pattern):
    problem = make_problem(*BF16_SIZES, device=device, dtypes=torch.bfloat16, pattern=pattern)
    problem = problem._replace(**{name: getattr(problem, name) * scale for name in names})
    result, expected = run(triton_loss(flex, kind), problem), truth(kind, problem)
    assert result.loss.isinf() == (scale == 1e20)
    for name in Problem._fields[1:]:
        assert_errs_by_one_rounding(getattr(result, name), getattr(expected, name))


def test_bfloat16_samples_of_any_scales_share_a_batch(flex, device, kind):
    problem = bf16_problem(device)
    scales = (1e-6, 1e6, 1.0)
    for b, scale in enumerate(scales):
        problem.vals[b] *= scale
        problem.target[b] *= scale
    # A sample whose residuals are all zero
    problem.target[3] = 0
    problem.weight[problem.indices[3]] = 0
    result, expected = run(triton_loss(flex, kind), problem), truth(kind, problem)
    for b in range(len(scales)):
        assert_errs_by_one_rounding(result.weight[problem.indices[b]], expected.weight[problem.indices[b]])
        assert_errs_by_one_rounding(result.vals[b], expected.vals[b])
    assert not result.weight[problem.indices[3]].any()
    assert not result.vals[3].any()


def test_an_outlier_column_takes_no_digits_from_the_others(flex, device, kind):
    problem = bf16_problem(device)
    problem.target[:, 7] *= 1e5
    result, expected = run(triton_loss(flex, kind), problem), truth(kind, problem)
    others = [column for column in range(BF16_SIZES[3]) if column != 7]
    assert_errs_by_one_rounding(result.weight[:, 7], expected.weight[:, 7])
    assert_errs_by_one_rounding(result.weight[:, others], expected.weight[:, others])


def problem_of_shrinking_residuals(B, K, fall, device):
    """Residuals that fall `fall`-fold along K: each step removes a share of what is left, with a feature of its own.

    What is left of the target is noise of its own in every step, not one direction.
    """
    D, generator = 33, torch.Generator().manual_seed(0)
    weight, vals = torch.empty(B, K, D), torch.rand(B, K, generator=generator) + 0.5
    target = torch.randn(B, D, generator=generator)
    residual = -target.double()
    share = 1 - fall ** (-1 / K)
    for step in range(K):
        noise = torch.randn(B, D, generator=generator) * residual.square().mean(1, keepdim=True).sqrt()
        weight[:, step] = share * (0.1 * noise - residual) / vals[:, step, None]
        residual += vals[:, step, None].double() * weight[:, step].double()
    indices = torch.randperm(B * K, generator=generator).view(B, K)
    rows = torch.empty(B * K, D)
    rows[indices.flatten()] = weight.view(-1, D)
    norms = torch.linalg.vector_norm(residual, dim=1), torch.linalg.vector_norm(target, dim=1)
    assert (norms[1] / norms[0]).median() > fall / 2
    return Problem(*(tensor.to(device) for tensor in (indices, rows, vals, torch.zeros(D), target)))


@torch.no_grad()
def step_by_step(problem):
    """d weight (a feature has one pair) and d vals in float32, each S_i a sum of residuals from the last to the first.

    The torch reference does this on a GPU. On a CPU torch's cumsum keeps its running sum in float64.
    """
    indices, weight, vals, bias, target = problem
    residuals = [bias - target]
    for step in range(indices.shape[1]):
        residuals.append(torch.addcmul(residuals[-1], vals[:, step, None], weight[indices[:, step]]))
    suffix, d_weight, d_vals = torch.zeros_like(target), torch.empty_like(weight), torch.empty_like(vals)
    scale = 2 / (indices.shape[1] * target.numel())
    for step in reversed(range(indices.shape[1])):
        suffix += residuals[step + 1]
        d_weight[indices[:, step]] = scale * vals[:, step, None] * suffix
        d_vals[:, step] = scale * (weight[indices[:, step]] * suffix).sum(1)
    return {"weight": d_weight, "vals": d_vals}


# Five times the error of the plain loop is room for another order of the additions.
@modes
@pytest.mark.parametrize("K, fall", [(64, 100), (128, 10), (128, 100), (256, 1000)])
def test_late_steps_keep_their_digits_where_residuals_shrink(flex, device, K, fall, deterministic):
    problem = problem_of_shrinking_residuals(4, K, fall, device)
    with deterministic_algorithms(deterministic):
        result = run(flex.triton_hierarchical_sae_loss, problem)
    plain, exact = step_by_step(problem), truth("hierarchical", problem)
    for name, rows in (("weight", (problem.indices[:, -1],)), ("vals", (slice(None), slice(-8, None)))):
        true = getattr(exact, name)[rows]
        error, allowed = (relative_error(value[rows], true) for value in (getattr(result, name), plain[name]))
        assert error <= 5 * allowed, f"d {name} errs by {error:.3g}, the plain loop by {allowed:.3g}"
