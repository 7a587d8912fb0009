"""What both losses do if asked: samples have weights, and the reconstruction is returned."""

from functools import partial

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import (
    BACKEND,
    DTYPES,
    LAYOUTS,
    PATTERNS,
    RecordedOps,
    accumulation_dtype,
    allowed_error,
    assert_right,
    check,
    deterministic_algorithms,
    laid_out,
    make_problem,
    modes,
    reference_loss,
    run,
    triton_loss,
)
from torch.utils._pytree import tree_map_only
from truth import DecodeProblem, decode_truth

F32 = torch.float32


def make_weights(B, device, dtype=F32, seed=0):
    """Of both signs, every other one zero, over six powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(B, generator=generator) * 10 ** (6 * torch.rand(B, generator=generator) - 3)
    weights[::2] = 0
    return weights.to(device, dtype)


def recon_truth(problem, absolute=False):
    B, K = problem.indices.shape
    samples = torch.arange(B, device=problem.indices.device).repeat_interleave(K)
    decoded = DecodeProblem(
        problem.indices.flatten(), problem.weight, problem.vals.flatten(), problem.bias, samples, problem.target
    )
    return decode_truth(decoded, absolute).recon


@hypothesis.settings(phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate])
@hypothesis.given(
    sizes=st.tuples(*map(st.sampled_from, ((1, 2, 5, 13), (1, 5, 33), (1, 7, 40), (3, 33, 64)))),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
    weights_dtype=st.sampled_from([torch.float16, F32]),
    layout=st.sampled_from(LAYOUTS),
    grad_out=st.sampled_from([1.0, -3.0]),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_weighted_samples_are_right_for_any_input(
    flex, device, kind, sizes, pattern, dtype, weights_dtype, layout, grad_out, deterministic, seed
):
    problem = make_problem(*sizes, device=device, pattern=pattern, dtypes=dtype, seed=seed)
    weights = laid_out(make_weights(sizes[0], device, weights_dtype, seed), layout)
    check(flex, kind, problem, grad_out, deterministic, weights)


@modes
@pytest.mark.parametrize("pick", [triton_loss, reference_loss])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_of_weight_zero_adds_nothing(flex, device, kind, deterministic, pick, dtype):
    problem = make_problem(6, 5, 9, 33, device=device, dtypes=dtype)
    problem.indices[1::2] = 8
    problem.indices[::2].clamp_(max=7)
    mask = torch.tensor([1.0, 0, 1, 0, 1, 0], device=device)
    with deterministic_algorithms(deterministic):
        result = run(partial(pick(flex, kind), sample_weight=mask), problem)
    assert_right(kind, problem, result, sample_weight=mask)
    for value in (result.vals[1::2], result.target[1::2], result.weight[8]):
        assert not value.count_nonzero()


@pytest.mark.parametrize("pick", [triton_loss, reference_loss])
def test_a_weight_in_float64_makes_all_sums_float64(flex, device, kind, pick):
    problem = make_problem(4, 5, 9, 33, device=device)
    loss = partial(pick(flex, kind), sample_weight=make_weights(4, device, torch.float64))
    assert run(loss, problem).loss.dtype == torch.float64


MIXES = [(torch.float16, F32, F32, F32), (F32, torch.float16, torch.float16, torch.float64)]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("pick", [triton_loss, reference_loss])
@pytest.mark.parametrize("dtypes", [*DTYPES, *MIXES], ids=str)
@pytest.mark.parametrize("sizes", [(4, 5, 9, 33), (2, 64, 40, 64)], ids=str)
def test_the_reconstruction_is_that_of_the_decode(flex, device, kind, pick, dtypes, sizes):
    problem = make_problem(*sizes, device=device, dtypes=dtypes)
    # A reconstruction that came from the residual would lose digits.
    problem.target.mul_(1e4)
    _, recon = pick(flex, kind)(*problem, return_recon=True)
    decoded = flex.triton_sae_decode(*problem[:4])
    assert (recon.shape, recon.dtype) == (decoded.shape, decoded.dtype)
    accumulation = accumulation_dtype(problem._replace(target=problem.bias))
    true, size = recon_truth(problem), recon_truth(problem, absolute=True)
    error = (recon.double() - true).abs() / allowed_error(sizes[1] + 2, accumulation, size, true, recon.dtype)
    assert error.max() <= 1


@pytest.mark.parametrize("pick", [triton_loss, reference_loss])
def test_the_reconstruction_has_no_gradient_and_changes_none(flex, device, kind, pick):
    problem = make_problem(4, 5, 9, 33, device=device)
    loss = pick(flex, kind)
    recons = []

    def keeping(*inputs):
        value, recon = loss(*inputs, return_recon=True)
        recons.append(recon)
        return value

    with deterministic_algorithms():
        for value, other in zip(run(loss, problem), run(keeping, problem), strict=True):
            assert torch.equal(value, other)
    assert not recons[0].requires_grad


@pytest.mark.parametrize("pick", [triton_loss, reference_loss])
def test_an_empty_batch_has_an_empty_reconstruction(flex, device, kind, pick):
    problem = make_problem(0, 5, 9, 33, device=device)
    weights = torch.zeros(0, device=device)
    loss, recon = pick(flex, kind)(*problem, sample_weight=weights, return_recon=True)
    assert loss.isnan()
    assert recon.shape == (0, 33)


@pytest.mark.parametrize("pick", [triton_loss, reference_loss])
def test_without_features_the_reconstruction_is_the_bias(flex, device, kind, pick):
    problem = make_problem(4, 0, 9, 33, device=device)
    _, recon = pick(flex, kind)(*problem, return_recon=True)
    assert torch.equal(recon, problem.bias.expand(4, 33))


def test_nothing_is_kept_of_what_is_not_asked_for(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    with RecordedOps(flex) as ops, torch.no_grad():
        triton_loss(flex, kind)(*problem)
    assert sum(output.numel() for output in ops.outputs) == 1


@modes
def test_ops_pass_opcheck_with_options(flex, device, kind, deterministic):
    problem = make_problem(4, 5, 9, 33, device=device, dtypes=torch.float16)
    loss = triton_loss(flex, kind)
    weights = make_weights(4, device)
    with deterministic_algorithms(deterministic), RecordedOps(flex) as ops:
        run(lambda *inputs: loss(*inputs, sample_weight=weights, return_recon=True)[0], problem)
    assert len(ops.calls) == 2
    # Atomic additions differ in their last bits from call to call.
    with deterministic_algorithms(True):
        for op, arguments in ops.calls:
            torch.library.opcheck(op, tree_map_only(torch.Tensor, torch.Tensor.detach, arguments))


def test_compiled_with_options_without_a_graph_break(flex, device, kind, fresh_dynamo):
    problem, weights = make_problem(4, 5, 9, 33, device=device), make_weights(4, device)
    compiled = torch.compile(triton_loss(flex, kind), fullgraph=True, backend=BACKEND)
    result = run(lambda *inputs: compiled(*inputs, sample_weight=weights, return_recon=True)[0], problem)
    assert_right(kind, problem, result, sample_weight=weights)
