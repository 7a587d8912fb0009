"""The decode: reconstructions of fixed and ragged pairs, their gradients, and both as citizens of torch."""

from functools import partial

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
    allowed_error,
    laid_out,
    make_indices,
    needs_cuda,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only
from truth import DecodeProblem, DecodeResult, decode_truth

f16, f32, f64 = torch.float16, torch.float32, torch.float64
MIXES = [(f16, f32, f32), (f32, f16, f64), (f64, f16, f16), (f32, f32, f16)]  # of weight, vals, bias
# Samples without pairs first, last and in between; more pairs than a tile
LENGTHS = (0, 3, 17, 0, 1, 33, 0)


def make_decode_problem(
    lengths, F, D, *, device, pattern="uniform", dtypes=f32, index_dtype=torch.int64, integers=False, seed=0
):
    """Ragged pairs, or small integers, so that every result is exact. Every fifth val is zero."""
    generator = torch.Generator(device).manual_seed(seed)
    weight_dtype, vals_dtype, bias_dtype = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 3
    recon_dtype = torch.promote_types(torch.promote_types(weight_dtype, vals_dtype), bias_dtype)

    def draw(dtype, *shape):
        if integers:
            return torch.randint(-2, 3, shape, generator=generator, device=device).to(dtype)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    P = sum(lengths)
    vals = draw(vals_dtype, P)
    vals[4::5] = 0
    return DecodeProblem(
        indices=make_indices(pattern, 1, P, F, generator)[0].to(index_dtype),
        weight=draw(weight_dtype, F, D).mul_(1 if integers else D**-0.5),
        vals=vals,
        bias=draw(bias_dtype, D),
        samples=torch.repeat_interleave(torch.tensor(lengths)).to(device),
        recon_grad=draw(recon_dtype, len(lengths), D),
    )


def offsets_of(lengths, device, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def run_decode(function, problem, shape=None, **options):
    """recon and the gradients of weight, vals and bias; pairs of a fixed K in a shape [B, K]."""
    leaves = [tensor.detach().requires_grad_() for tensor in (problem.weight, problem.vals, problem.bias)]
    weight, vals, bias = leaves
    pairs = (problem.indices, vals) if shape is None else (problem.indices.view(shape), vals.view(shape))
    recon = function(pairs[0], weight, pairs[1], bias, **options)
    return DecodeResult(recon.detach(), *torch.autograd.grad(recon, leaves, problem.recon_grad))


def assert_within_budget(problem, result):
    expected, sizes = decode_truth(problem), decode_truth(problem, absolute=True)
    inputs = (problem.weight, problem.vals, problem.bias)
    accumulation = f64 if any(tensor.dtype == f64 for tensor in inputs) else f32
    most = [int(torch.bincount(ids.long(), minlength=1).max()) for ids in (problem.samples, problem.indices)]
    B, D = problem.recon_grad.shape
    roundings = DecodeResult(most[0] + 2, most[1] + 2, D + 2, B + 2)
    given = (problem.recon_grad, *inputs)
    for name, n, value, true, size, like in zip(result._fields, roundings, result, expected, sizes, given, strict=True):
        assert (value.shape, value.dtype) == (like.shape, like.dtype), name
        error = ((value.double() - true).abs() / allowed_error(n, accumulation, size, true, like.dtype)).max().item()
        assert error <= 1, f"{name}: {error:.3g} times the error budget"


def assert_exact(result, problem):
    for name, value, true in zip(result._fields, result, decode_truth(problem), strict=True):
        assert torch.equal(value.double(), true), name


exact = partial(make_decode_problem, integers=True)


@hypothesis.settings(phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate])
@hypothesis.given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 16, 33]), min_size=1, max_size=5).filter(sum),
    fixed=st.booleans(),
    F=st.sampled_from((1, 7, 40) if INTERPRETED else (1, 31, 256, 5000)),
    D=st.sampled_from(WIDTHS),
    pattern=st.sampled_from(PATTERNS),
    dtypes=st.sampled_from([*DTYPES, *MIXES]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    seed=st.integers(0, 2**31),
)
def test_decode_and_gradients_are_right_for_any_input(
    flex, device, lengths, fixed, F, D, pattern, dtypes, index_dtype, layouts, seed
):
    lengths = [max(lengths)] * len(lengths) if fixed else lengths
    problem = make_decode_problem(
        lengths, F, D, device=device, pattern=pattern, dtypes=dtypes, index_dtype=index_dtype, seed=seed
    )
    weight, bias, grad = map(laid_out, (problem.weight, problem.bias, problem.recon_grad), layouts)
    problem = problem._replace(weight=weight, bias=bias, recon_grad=grad)
    shape = (len(lengths), lengths[0]) if fixed else None
    options = {} if fixed else {"offsets": offsets_of(lengths, device)}
    assert_within_budget(problem, run_decode(flex.triton_sae_decode, problem, shape, **options))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", ["triton_sae_decode", "sae_decode"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ragged_rows_are_summed_and_spare_room_is_not(flex, device, name, dtype):
    problem = exact(LENGTHS, 9, 33, device=device)
    garbage = torch.tensor([-1, 9, 2**31 - 1], device=device)
    spare = problem._replace(
        indices=torch.cat([problem.indices, garbage]),
        vals=torch.cat([problem.vals, torch.full((3,), float("nan"), device=device)]),
    )
    result = run_decode(getattr(flex, name), spare, offsets=offsets_of(LENGTHS, device, dtype))
    assert not result.vals[-3:].count_nonzero()
    assert_exact(result._replace(vals=result.vals[:-3]), problem)


@pytest.mark.parametrize(
    "lengths",
    [
        (256, 257, 0, 900),
        (512, 3, 700, 1, 300),  # from a chunk's start on; two in one chunk
        (1000,),
        (5, 768, 4, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("spare", [0, 600])
def test_samples_longer_than_a_chunk_are_summed_in_parts(flex, device, lengths, spare):
    problem = exact(lengths, 9, 33, device=device)
    P = sum(lengths) + spare
    assert max(lengths) > flex.decode_kernels.chunk_pairs(P)[0]
    indices, vals = problem.indices.new_full((P,), -1), problem.vals.new_full((P,), float("nan"))
    indices[: sum(lengths)], vals[: sum(lengths)] = problem.indices, problem.vals
    roomy = problem._replace(indices=indices, vals=vals)
    result = run_decode(flex.triton_sae_decode, roomy, offsets=offsets_of(lengths, device))
    assert not result.vals[sum(lengths) :].count_nonzero()
    assert_exact(result._replace(vals=result.vals[: sum(lengths)]), problem)


@pytest.mark.parametrize("name", ["triton_sae_decode", "sae_decode"])
@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (30, 1), (1, 30)], ids=str)
def test_a_fixed_k_is_ragged_rows_of_one_length(flex, device, name, shape):
    problem = exact([shape[1]] * shape[0], 9, 33, device=device)
    assert_exact(run_decode(getattr(flex, name), problem, shape), problem)
    assert_exact(run_decode(getattr(flex, name), problem, offsets=offsets_of([shape[1]] * shape[0], device)), problem)


@pytest.mark.parametrize("name", ["triton_sae_decode", "sae_decode"])
def test_an_index_out_of_range_makes_its_sample_nan_and_no_other(flex, device, name):
    problem = exact([5] * 4, 9, 33, device=device)
    indices = problem.indices.clone()
    indices[7] = 9
    recon = run_decode(getattr(flex, name), problem._replace(indices=indices), (4, 5)).recon
    assert recon[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(recon[others].double(), decode_truth(problem).recon[others])


@pytest.mark.parametrize("names", [("weight",), ("vals",), ("bias",), ("weight", "vals")], ids="+".join)
def test_only_the_gradients_asked_for_are_computed(flex, device, names):
    problem = exact([5] * 4, 9, 33, device=device)
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in names}
    indices, weight, vals, bias, *_ = problem._replace(**leaves)
    recon = flex.triton_sae_decode(indices.view(4, 5), weight, vals.view(4, 5), bias)
    with RecordedOps(flex) as ops:
        gradients = torch.autograd.grad(recon, [*leaves.values()], problem.recon_grad)
    assert sum(output.numel() for output in ops.outputs) == sum(leaf.numel() for leaf in leaves.values())
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.equal(gradient.double(), getattr(decode_truth(problem), name)), name


@pytest.mark.kernels_ci
def test_gradcheck_in_float64(flex, device):
    problem = make_decode_problem([3, 0, 2], 4, 5, device=device, dtypes=f64, pattern="duplicates")
    leaves = [tensor.requires_grad_() for tensor in (problem.weight, problem.vals, problem.bias)]
    offsets = offsets_of([3, 0, 2], device)
    decode = flex.triton_sae_decode
    assert torch.autograd.gradcheck(lambda w, v, b: decode(problem.indices, w, v, b, offsets=offsets), leaves)


def test_ops_pass_opcheck(flex, device):
    problem = exact(LENGTHS, 9, 3, device=device)
    with RecordedOps(flex) as ops:
        run_decode(flex.triton_sae_decode, problem, offsets=offsets_of(LENGTHS, device))
        run_decode(flex.triton_sae_decode, exact([3] * 4, 9, 3, device=device), (4, 3))
    assert [op.name().split("::")[1] for op, _ in ops.calls] == ["sae_decode", "sae_decode_backward"] * 2
    for op, arguments in ops.calls:
        torch.library.opcheck(op, tree_map_only(torch.Tensor, torch.Tensor.detach, arguments))


def test_compiled_without_a_graph_break(flex, device, fresh_dynamo):
    counter = CompileCounterWithBackend(BACKEND)
    problem = exact(LENGTHS, 9, 33, device=device)
    compiled = torch.compile(flex.triton_sae_decode, fullgraph=True, backend=counter)
    assert_exact(run_decode(compiled, problem, offsets=offsets_of(LENGTHS, device)), problem)
    assert counter.frame_count == 1


def test_a_second_derivative_is_refused(flex, device):
    problem = exact([5] * 4, 9, 33, device=device)
    vals = problem.vals.clone().requires_grad_()
    recon = flex.triton_sae_decode(problem.indices.view(4, 5), problem.weight, vals.view(4, 5))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(recon.sum(), vals, create_graph=True)


def test_an_empty_batch_is_empty(flex, device):
    weight = torch.ones(9, 33, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for options in ({}, {"offsets": torch.zeros(1, dtype=torch.int64, device=device)}):
        indices = none if options else none.view(0, 3)
        assert flex.triton_sae_decode(indices, weight, indices.float(), **options).shape == (0, 33)
    spare = torch.full((5,), 9, device=device)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    assert flex.triton_sae_decode(spare, weight, spare.float(), offsets=offsets).shape == (0, 33)
    offsets = torch.zeros(3, dtype=torch.int64, device=device)
    bias = torch.arange(33.0, device=device)
    assert torch.equal(flex.triton_sae_decode(none, weight, none.float(), bias, offsets=offsets), bias.expand(2, 33))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_may_be_strided(flex, device, layout):
    problem = exact(LENGTHS, 9, 33, device=device)
    offsets = laid_out(offsets_of(LENGTHS, device), layout)
    assert_exact(run_decode(flex.triton_sae_decode, problem, offsets=offsets), problem)


# On a GPU


SIZES = (40, 500, 200)  # B, F, D


def ragged_problem(seed, device="cuda"):
    """Samples of other lengths for another seed, one of them longer than a chunk, and as many pairs in all."""
    B, F, D = SIZES
    lengths = torch.multinomial(torch.ones(B - 1), 300, True, generator=torch.Generator().manual_seed(seed))
    lengths = [*lengths.bincount(minlength=B - 1).tolist(), 700]
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed)).tolist()
    lengths = [lengths[b] for b in order]
    return exact(lengths, F, D, device=device, seed=seed), offsets_of(lengths, device)


@needs_cuda
def test_a_captured_ragged_decode_replays_on_other_lengths(flex):
    static, static_offsets = ragged_problem(0)
    run_decode(flex.triton_sae_decode, static, offsets=static_offsets)  # capture allows no compilation
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run_decode(flex.triton_sae_decode, static, offsets=static_offsets)
    for seed in (1, 2):
        problem, offsets = ragged_problem(seed)
        for tensor, values in zip((*static, static_offsets), (*problem, offsets), strict=True):
            tensor.copy_(values)
        graph.replay()
        assert_exact(result, problem)


@needs_cuda
def test_work_goes_to_the_current_stream(flex):
    problem, offsets = ragged_problem(0)
    late, late_offsets = DecodeProblem(*map(torch.zeros_like, problem)), torch.zeros_like(offsets)
    run_decode(flex.triton_sae_decode, late, offsets=late_offsets)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds: a launch that does not wait would read the zeros
        for tensor, values in zip((*late, late_offsets), (*problem, offsets), strict=True):
            tensor.copy_(values)
        result = run_decode(flex.triton_sae_decode, late, offsets=late_offsets)
    torch.cuda.synchronize()
    assert_exact(result, problem)


@needs_cuda
def test_nothing_waits_for_the_device(flex):
    problem, offsets = ragged_problem(0)
    run_decode(flex.triton_sae_decode, problem, offsets=offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_decode(flex.triton_sae_decode, problem, offsets=offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_may_live_on_a_device_that_is_not_current(flex):
    problem, offsets = ragged_problem(0, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert_exact(run_decode(flex.triton_sae_decode, problem, offsets=offsets), problem)
