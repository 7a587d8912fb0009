"""The nested losses: values and gradients for any ends, relations to the other losses, citizens of torch."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import (
    BACKEND,
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    PATTERNS,
    WIDTHS,
    RecordedOps,
    accumulation_dtype,
    allowed_error,
    assert_agree,
    laid_out,
    make_problem,
    needs_cuda,
    record_compilations,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only
from truth import Problem, Result, nested_truth

f16, f32, f64 = torch.float16, torch.float32, torch.float64
MIXES = [(f16, f32, f32, f32), (f32, f16, f64, f16), (f64, f16, f32, f16)]  # of weight, vals, bias, target
BOTH = pytest.mark.parametrize("name", ["triton_nested_sae_loss", "nested_sae_loss"])


def make_ends(K, *shape, device, dtype=torch.int64, seed=0):
    """Random ends from 0 to K that ascend along the last axis; some are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(K + 1, shape, generator=generator).sort(-1).values.to(device, dtype)


def make_grad(L, device, dtype=f32, seed=0):
    return torch.randn(L, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run_nested(loss, problem, ends, losses_grad):
    return run(lambda *inputs: loss(*inputs, ends), problem, losses_grad)


def assert_right(problem, ends, losses_grad, result):
    (B, K), D, L = problem.indices.shape, problem.weight.shape[1], ends.shape[-1]
    expected = nested_truth(problem, ends, losses_grad)
    sizes = nested_truth(problem, ends, losses_grad, absolute=True)
    most_pairs = int(torch.bincount(problem.indices.flatten().long(), minlength=1).max())
    residual = K + 2  # a product, K additions, the target
    suffix = residual + L + 4  # the gradient of a loss and 2 / (B D), their product, L additions
    roundings = Result(2 * residual + B * D + 4, suffix + most_pairs + 1, suffix + D, suffix + B, suffix)
    accumulation = accumulation_dtype(problem)
    dtypes = Result(accumulation, *(tensor.dtype for tensor in problem[1:]))
    assert result.loss.shape == (L,)
    for name, n, value, true, size, dtype in zip(
        Result._fields, roundings, result, expected, sizes, dtypes, strict=True
    ):
        assert (value.shape, value.dtype) == (true.shape, dtype), name
        error = ((value.double() - true).abs() / allowed_error(n, accumulation, size, true, dtype)).max().item()
        assert error <= 1, f"{name}: {error:.3g} times the error budget"


@hypothesis.settings(phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate])
@hypothesis.given(
    B=st.sampled_from([1, 2, 5] if INTERPRETED else [1, 2, 13, 257]),
    K=st.sampled_from([1, 5, 32, 33, 70]),
    F=st.sampled_from([1, 7, 40] if INTERPRETED else [1, 31, 1009, 5000]),
    D=st.sampled_from(WIDTHS),
    L=st.sampled_from([1, 2, 5, 64]),
    per_sample=st.booleans(),
    pattern=st.sampled_from(PATTERNS),
    dtypes=st.sampled_from([*DTYPES, *MIXES]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    ends_dtype=st.sampled_from([torch.int32, torch.int64]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 6),
    seed=st.integers(0, 2**31),
)
def test_losses_and_gradients_are_right_for_any_input(
    flex, device, B, K, F, D, L, per_sample, pattern, dtypes, index_dtype, ends_dtype, layouts, seed
):
    problem = make_problem(
        B, K, F, D, device=device, pattern=pattern, dtypes=dtypes, index_dtype=index_dtype, seed=seed
    )
    problem = Problem(*map(laid_out, problem, layouts[:5]))
    shape = (B, L) if per_sample else (L,)
    ends = laid_out(make_ends(K, *shape, device=device, dtype=ends_dtype, seed=seed), layouts[5])
    grad = make_grad(L, device, accumulation_dtype(problem), seed)
    assert_right(problem, ends, grad, run_nested(flex.triton_nested_sae_loss, problem, ends, grad))


@pytest.mark.kernels_ci
@BOTH
@pytest.mark.parametrize(
    "ends", [[0], [5], [0, 0, 5, 5], [2, 2, 3], [0, 1, 2, 3, 4, 5], [[0, 5], [1, 1], [5, 5], [0, 0]]], ids=str
)
def test_ends_may_be_zero_equal_and_of_each_sample(flex, device, name, ends):
    problem = make_problem(4, 5, 9, 300, device=device)  # more columns than are summed at a time
    ends = torch.tensor(ends, device=device)
    grad = make_grad(ends.shape[-1], device)
    result = run_nested(getattr(flex, name), problem, ends, grad)
    assert_right(problem, ends, grad, result)
    outside = torch.arange(5, device=device) >= ends[..., -1:].expand(4, 1)
    assert not result.vals[outside].count_nonzero()


@BOTH
def test_what_stands_behind_the_last_end_is_ignored(flex, device, name):
    problem = make_problem(4, 7, 9, 33, device=device)
    ends = torch.tensor([[0, 2], [1, 5], [3, 7], [0, 0]], device=device)
    grad = make_grad(2, device)
    outside = torch.arange(7, device=device) >= ends[:, -1:]
    padded = problem._replace(
        indices=problem.indices.masked_fill(outside, -1), vals=problem.vals.masked_fill(outside, float("nan"))
    )
    result = run_nested(getattr(flex, name), padded, ends, grad)
    assert not result.vals[outside].count_nonzero()
    assert_right(problem, ends, grad, result)


def test_one_end_of_all_features_is_topk(flex, device):
    problem = make_problem(4, 40, 9, 33, device=device)
    ends = torch.tensor([40], device=device)
    nested = run(lambda *inputs: flex.triton_nested_sae_loss(*inputs, ends)[0], problem)
    assert_agree("topk", problem, nested, run(flex.triton_topk_sae_loss, problem))


def test_all_ends_averaged_are_hierarchical(flex, device):
    problem = make_problem(4, 40, 9, 33, device=device)
    ends = torch.arange(1, 41, device=device)
    nested = run(lambda *inputs: flex.triton_nested_sae_loss(*inputs, ends).mean(), problem)
    assert_agree("hierarchical", problem, nested, run(flex.triton_hierarchical_sae_loss, problem))


def test_a_level_alone_has_the_gradient_of_its_prefix(flex, device):
    problem, ends = make_problem(4, 5, 9, 33, device=device), torch.tensor([1, 3, 4], device=device)
    for level, end in enumerate(ends.tolist()):
        result = run(lambda *inputs, level=level: flex.triton_nested_sae_loss(*inputs, ends)[level], problem)
        prefix = problem._replace(indices=problem.indices[:, :end], vals=problem.vals[:, :end])
        expected = run(flex.triton_topk_sae_loss, prefix)
        assert not result.vals[:, end:].count_nonzero()
        assert_agree("topk", prefix, result._replace(vals=result.vals[:, :end]), expected)


@BOTH
@pytest.mark.parametrize(
    ("ends", "wrong"),
    [([-1, 2, 3], 0), ([1, 3, 2], 2), ([0, 3, 6], 2), ([2, 1, 5], 1), ([[1, 2, 3], [1, 2, 3], [1, 7, 5]], 1)],
    ids=str,
)
def test_a_wrong_end_spoils_its_level_and_those_behind_it(flex, device, name, ends, wrong):
    problem = make_problem(3, 5, 9, 33, device=device)
    result = run_nested(getattr(flex, name), problem, torch.tensor(ends, device=device), make_grad(3, device))
    assert result.loss.isnan().tolist() == [level >= wrong for level in range(3)]
    assert result.bias.isnan().all()


@BOTH
def test_an_index_out_of_range_spoils_the_levels_that_count_it(flex, device, name):
    problem = make_problem(3, 5, 9, 33, device=device)
    problem.indices[1, 2] = 9
    losses = getattr(flex, name)(*problem, torch.tensor([1, 2, 3, 5], device=device))
    assert losses.isnan().tolist() == [False, False, True, True]


@pytest.mark.kernels_ci
def test_gradcheck_in_float64(flex, device):
    problem = make_problem(3, 4, 5, 6, device=device, dtypes=f64, pattern="duplicates")
    indices, *leaves = problem
    leaves = [leaf.requires_grad_() for leaf in leaves]
    ends = torch.tensor([[0, 2, 3], [1, 1, 4], [2, 3, 3]], device=device)
    assert torch.autograd.gradcheck(lambda *inputs: flex.triton_nested_sae_loss(indices, *inputs, ends), leaves)


def test_the_same_inputs_give_the_same_bits(flex, device):
    problem = make_problem(30, 17, 12, 33, device=device, pattern="one_hot_feature")
    ends, grad = make_ends(17, 30, 4, device=device), make_grad(4, device)
    results = [run_nested(flex.triton_nested_sae_loss, problem, ends, grad) for _ in range(2)]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["weight", "vals", "bias", "target"])
def test_only_the_gradients_asked_for_are_computed(flex, device, name):
    problem, ends = make_problem(4, 5, 9, 33, device=device), make_ends(5, 4, 3, device=device)
    leaf = getattr(problem, name).clone().requires_grad_()
    losses = flex.triton_nested_sae_loss(*problem._replace(**{name: leaf}), ends)
    with RecordedOps(flex) as ops:
        (gradient,) = torch.autograd.grad(losses, leaf, make_grad(3, device))
    assert sum(output.numel() for output in ops.outputs) == leaf.numel()
    everything = run_nested(flex.triton_nested_sae_loss, problem, ends, make_grad(3, device))
    assert torch.equal(gradient, getattr(everything, name))


def test_ops_pass_opcheck(flex, device):
    problem = make_problem(4, 5, 9, 3, device=device, dtypes=f16)
    with RecordedOps(flex) as ops:
        for ends in (make_ends(5, 3, device=device), make_ends(5, 4, 1, device=device)):
            grad = make_grad(ends.shape[-1], device)
            run_nested(flex.triton_nested_sae_loss, problem, ends, grad)
    assert [op.name().split("::")[1] for op, _ in ops.calls] == ["nested_forward", "nested_backward"] * 2
    for op, arguments in ops.calls:
        torch.library.opcheck(op, tree_map_only(torch.Tensor, torch.Tensor.detach, arguments))


def test_compiled_without_a_graph_break_for_new_ends(flex, device, fresh_dynamo):
    counter = CompileCounterWithBackend(BACKEND)
    problem, grad = make_problem(4, 5, 9, 33, device=device), make_grad(3, device)
    compiled = torch.compile(flex.triton_nested_sae_loss, fullgraph=True, backend=counter)
    for seed in (0, 1):
        ends = make_ends(5, 4, 3, device=device, seed=seed)
        assert_right(problem, ends, grad, run_nested(compiled, problem, ends, grad))
    assert counter.frame_count == 1


@BOTH
def test_an_empty_batch_has_losses_that_are_nan(flex, device, name):
    losses = getattr(flex, name)(*make_problem(0, 5, 9, 33, device=device), torch.tensor([1, 2], device=device))
    assert losses.isnan().tolist() == [True, True]


def test_a_second_derivative_is_refused(flex, device):
    problem = make_problem(4, 5, 9, 33, device=device)
    problem.vals.requires_grad_()
    losses = flex.triton_nested_sae_loss(*problem, torch.tensor([1, 2], device=device))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(losses.sum(), problem.vals, create_graph=True)


# On a GPU


@needs_cuda
def test_no_end_and_no_number_of_levels_is_compiled_again(flex, monkeypatch):
    def step(B, L, per_sample):
        problem = make_problem(B, 20, 4096, 200, device="cuda")
        ends = make_ends(20, *((B, L) if per_sample else (L,)), device="cuda")
        run_nested(flex.triton_nested_sae_loss, problem, ends, make_grad(L, "cuda"))

    step(64, 2, True)
    compiled = record_compilations(monkeypatch)
    for B, L, per_sample in ((64, 3, True), (63, 16, True), (1, 7, False), (64, 64, False)):
        step(B, L, per_sample)
        assert not compiled, f"B={B} L={L} compiled {compiled}"


@needs_cuda
def test_a_captured_step_replays_on_fresh_ends(flex):
    problem, grad = make_problem(40, 50, 500, 200, device="cuda"), make_grad(5, "cuda")
    ends = make_ends(50, 40, 5, device="cuda")
    run_nested(flex.triton_nested_sae_loss, problem, ends, grad)  # capture allows no compilation
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run_nested(flex.triton_nested_sae_loss, problem, ends, grad)
    for seed in (1, 2):
        ends.copy_(make_ends(50, 40, 5, device="cuda", seed=seed))
        graph.replay()
        assert_right(problem, ends, grad, result)


@needs_cuda
def test_nothing_waits_for_the_device(flex):
    problem, grad = make_problem(40, 50, 500, 200, device="cuda"), make_grad(5, "cuda")
    ends = make_ends(50, 5, device="cuda")
    run_nested(flex.triton_nested_sae_loss, problem, ends, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_nested(flex.triton_nested_sae_loss, problem, ends, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_may_live_on_a_device_that_is_not_current(flex):
    problem, ends = make_problem(40, 50, 500, 200, device="cuda:1"), make_ends(50, 40, 5, device="cuda:1")
    grad = make_grad(5, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert_right(problem, ends, grad, run_nested(flex.triton_nested_sae_loss, problem, ends, grad))
