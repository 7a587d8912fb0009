"""The encoders: what they choose and return, their gradients, and both as citizens of torch."""

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
    encoder_budget,
    laid_out,
    make_encoder_problem,
    needs_cuda,
    relative_error,
    submodule,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from truth import EncoderProblem, EncoderResult, encoder_truth

f16, f32, f64 = torch.float16, torch.float32, torch.float64
# of x, weight, bias
MIXES = [(f16, f32, f32), (f32, f16, f64), (f64, f16, f16), (f32, f32, f16)]
SIZES = (5, 7, 9, 33) if INTERPRETED else (640, 50, 500, 200)

exact = partial(make_encoder_problem, integers=True)


def run_sparse(function, problem, **options):
    """vals and the gradients of x, weight and bias; leaves keep the strides of the problem."""
    leaves = [tensor.detach().requires_grad_() for tensor in problem[:3]]
    vals = function(*leaves, problem.indices, **options)
    return EncoderResult(vals.detach(), *torch.autograd.grad(vals, leaves, problem.vals_grad))


def run_topk(function, problem, relu=True):
    """The same of as many features as the problem has indices; and the chosen ones."""
    leaves = [tensor.detach().requires_grad_() for tensor in problem[:3]]
    vals, indices = function(*leaves, problem.indices.shape[1], relu=relu)
    return EncoderResult(vals.detach(), *torch.autograd.grad(vals, leaves, problem.vals_grad)), indices


def topk_truth(problem, indices, relu=True):
    """The truth of the pairs that were chosen, as far as relu lets them through."""
    expected = encoder_truth(problem._replace(indices=indices))
    if not relu:
        return expected
    passed = problem.vals_grad.masked_fill(expected.vals <= 0, 0)
    expected = encoder_truth(problem._replace(indices=indices, vals_grad=passed))
    return expected._replace(vals=expected.vals.relu())


def assert_within_budget(problem, result, expected):
    for name, value, true, allowed in zip(
        result._fields, result, expected, encoder_budget(problem, expected), strict=True
    ):
        assert value.dtype == (problem.vals_grad if name == "vals" else getattr(problem, name)).dtype
        assert value.shape == true.shape
        error = ((value.double() - true).abs() / allowed).max().item() if value.numel() else 0
        assert error <= 1, f"{name}: {error:.3g} times the error budget"


def assert_exact(result, expected):
    for name, value, true in zip(result._fields, result, expected, strict=True):
        assert torch.equal(value.double(), true), name


def check_exact(flex, problem):
    """Both encoders on small integers, in which all sums are exact and most pre-activations have equals."""
    assert_exact(run_sparse(flex.triton_sparse_encode, problem), encoder_truth(problem))
    result, indices = run_topk(flex.triton_topk_encode, problem)
    x, weight, bias = (tensor.double() for tensor in problem[:3])
    order = (x @ weight.T + bias).cpu().sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(indices.cpu(), order[:, : indices.shape[1]])
    assert_exact(result, topk_truth(problem, indices))


@hypothesis.settings(phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate])
@hypothesis.given(
    B=st.sampled_from((1, 2, 5) if INTERPRETED else (1, 2, 13, 257)),
    K=st.sampled_from((1, 5, 17, 33) if INTERPRETED else (1, 5, 16, 33, 128)),
    F=st.sampled_from((1, 7, 40) if INTERPRETED else (1, 31, 256, 5000)),
    D=st.sampled_from(WIDTHS),
    pattern=st.sampled_from(PATTERNS),
    dtypes=st.sampled_from([*DTYPES, *MIXES]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
    seed=st.integers(0, 2**31),
)
def test_sparse_encode_and_gradients_are_right_for_any_input(
    flex, device, B, K, F, D, pattern, dtypes, index_dtype, layouts, seed
):
    problem = make_encoder_problem(
        B, K, F, D, device=device, pattern=pattern, dtypes=dtypes, index_dtype=index_dtype, seed=seed
    )
    problem = EncoderProblem(*map(laid_out, problem, layouts))
    assert_within_budget(problem, run_sparse(flex.triton_sparse_encode, problem), encoder_truth(problem))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtypes", [*DTYPES, *MIXES], ids=str)
@pytest.mark.parametrize("K", [1, 9])
def test_topk_encode_chooses_what_the_reference_does_and_gradients_are_right(flex, device, dtypes, relu, K):
    problem = make_encoder_problem(10, K, 9, 33, device=device, dtypes=dtypes)
    result, indices = run_topk(flex.triton_topk_encode, problem, relu)
    reference, chosen = run_topk(flex.topk_encode, problem, relu)
    assert torch.equal(indices, chosen)
    assert torch.equal(result.vals, reference.vals)
    expected = topk_truth(problem, indices, relu)
    # pre is torch's own, in a dtype that may be as narrow as the inputs'.
    assert_within_budget(
        problem._replace(indices=indices), result._replace(vals=expected.vals.to(result.vals.dtype)), expected
    )


@pytest.mark.parametrize("pattern", ["all_same", "one_hot_feature", "two_heavy_features"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_on_every_sample_are_summed_right(flex, device, pattern, dtype):
    problem = make_encoder_problem(
        *((60, 9, 12, 33) if INTERPRETED else (4096, 64, 16384, 200)), device=device, pattern=pattern, dtypes=dtype
    )
    assert_within_budget(problem, run_sparse(flex.triton_sparse_encode, problem), encoder_truth(problem))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2], ids=str)
def test_16_bit_results_err_by_one_rounding(flex, device, dtype):
    problem = make_encoder_problem(
        *((24, 16, 20, 40) if INTERPRETED else (4096, 64, 65536, 512)), device=device, dtypes=dtype
    )
    result, expected = run_sparse(flex.triton_sparse_encode, problem), encoder_truth(problem)
    for name, value, true in zip(result._fields, result, expected, strict=True):
        assert relative_error(value, true) <= 1.1 * relative_error(true.to(dtype), true), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "indices", "vals_grad"])
def test_every_input_may_be_strided(flex, device, name, layout):
    problem = exact(3, 5, 9, 33, device=device)
    check_exact(flex, problem._replace(**{name: laid_out(getattr(problem, name), layout)}))


@pytest.mark.kernels_ci
def test_many_blocks_of_samples_give_what_one_does(flex, device, monkeypatch):
    x, weight, bias, *_ = exact(140, 3, 9, 5, device=device)
    kernels, blocks = submodule(flex, "encode_kernels"), []
    select = kernels.select_largest
    monkeypatch.setattr(kernels, "select_largest", lambda pre, *out: blocks.append(len(pre)) or select(pre, *out))
    monkeypatch.setattr(kernels, "_PRE_BYTES", 0)
    monkeypatch.setattr(kernels, "_MIN_ROWS", 1)
    assert all(map(torch.equal, flex.triton_topk_encode(x, weight, bias, 3), flex.topk_encode(x, weight, bias, 3)))
    assert blocks == [128, 12]


@pytest.mark.parametrize("name", ["triton_topk_encode", "topk_encode", "triton_sparse_encode", "sparse_encode"])
def test_without_a_bias_it_is_zero(flex, device, name):
    x, weight, bias, indices, vals_grad = exact(*SIZES, device=device)
    results = []
    for term in (None, torch.zeros_like(bias)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = getattr(flex, name)(*leaves, term, 7 if "topk" in name else indices[:, :7].contiguous())
        vals = out[0] if "topk" in name else out
        results.append((vals, *torch.autograd.grad(vals, leaves, vals_grad[:, :7])))
    assert all(map(torch.equal, *results))


def test_an_empty_batch_has_no_vals_and_zero_gradients(flex, device):
    problem = exact(0, 3, 9, 33, device=device)
    for result in (run_sparse(flex.triton_sparse_encode, problem), run_topk(flex.triton_topk_encode, problem)[0]):
        assert result.vals.shape == (0, 3) and result.x.shape == (0, 33)
        assert result.weight.shape == (9, 33) and not result.weight.any() and not result.bias.any()


SUBSETS = [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias"), ("x", "weight")]


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_only_the_gradients_asked_for_are_computed(flex, device, names):
    problem = exact(*SIZES, device=device)
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in names}
    x, weight, bias, indices, vals_grad = problem._replace(**leaves)
    topk_vals, chosen = flex.triton_topk_encode(x, weight, bias, indices.shape[1])
    vals = flex.triton_sparse_encode(x, weight, bias, indices)
    for out, expected in ((topk_vals, topk_truth(problem, chosen)), (vals, encoder_truth(problem))):
        with RecordedOps(flex) as ops:
            gradients = torch.autograd.grad(out, [*leaves.values()], vals_grad)
        assert sum(output.numel() for output in ops.outputs) == sum(leaf.numel() for leaf in leaves.values())
        for name, gradient in zip(names, gradients, strict=True):
            assert torch.equal(gradient.double(), getattr(expected, name)), name


def test_a_second_backward_pass_gives_the_same_bits(flex, device):
    problem = make_encoder_problem(*SIZES, device=device, pattern="duplicates")
    leaves = [tensor.clone().requires_grad_() for tensor in problem[:3]]
    vals, _ = flex.triton_topk_encode(*leaves, problem.indices.shape[1])
    for out in (vals, flex.triton_sparse_encode(*leaves, problem.indices)):
        first, second = (torch.autograd.grad(out, leaves, problem.vals_grad, retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second))


@pytest.mark.kernels_ci
def test_gradcheck_in_float64(flex, device):
    problem = make_encoder_problem(2, 3, 4, 5, device=device, dtypes=f64, pattern="duplicates")
    leaves = [tensor.requires_grad_() for tensor in problem[:3]]
    assert torch.autograd.gradcheck(lambda *leaves: flex.triton_sparse_encode(*leaves, problem.indices), leaves)
    # Finite differences leave the order as it is.
    pre = torch.nn.functional.linear(*leaves).sort(dim=1).values
    assert pre.diff(dim=1).min() > 1e-3
    assert torch.autograd.gradcheck(lambda *leaves: flex.triton_topk_encode(*leaves, 3, relu=False)[0], leaves)


# Samples without pairs first, last and in between; more pairs than a tile of 16
LENGTHS = (0, 3, 17, 0, 1, 33, 0)


def ragged(problem, dtype, spare):
    """Indices [P], offsets and gradient of a problem whose samples have LENGTHS of its pairs; and the problem with the
    gradients of these alone. Spare room holds what must not be read."""
    lengths = torch.tensor(LENGTHS, device=problem.x.device)
    exists = torch.arange(problem.indices.shape[1], device=problem.x.device) < lengths[:, None]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(dtype)
    garbage = torch.tensor([-1, 9, 2**31 - 1, -(2**31)], device=problem.x.device)[:spare]
    indices = torch.cat([problem.indices[exists], garbage.to(problem.indices.dtype)])
    vals_grad = torch.nn.functional.pad(problem.vals_grad[exists], (0, spare), value=float("nan"))
    return indices, offsets, vals_grad, exists, problem._replace(vals_grad=problem.vals_grad.where(exists, 0))


@pytest.mark.parametrize("name", ["triton_sparse_encode", "sparse_encode"])
@pytest.mark.parametrize("spare", [0, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_ragged_pairs_are_those_of_their_samples_and_spare_room_is_zero(flex, device, name, spare, dtype, index_dtype):
    problem = exact(len(LENGTHS), max(LENGTHS), 9, 33, device=device, index_dtype=index_dtype)
    indices, offsets, vals_grad, exists, fixed = ragged(problem, dtype, spare)
    result = run_sparse(getattr(flex, name), problem._replace(indices=indices, vals_grad=vals_grad), offsets=offsets)
    expected = encoder_truth(fixed)
    true = torch.nn.functional.pad(expected.vals[exists], (0, spare))
    assert_exact(result, expected._replace(vals=true))


@pytest.mark.parametrize("name", ["triton_sparse_encode", "sparse_encode"])
@pytest.mark.parametrize("B", [0, 2])
def test_spare_room_belongs_to_no_sample(flex, device, name, B):
    x = torch.full((B, 33), float("inf"), device=device, requires_grad=True)
    weight = torch.ones(9, 33, device=device, requires_grad=True)
    spare, offsets = torch.tensor([0, 5, 77], device=device), torch.zeros(B + 1, dtype=torch.int64, device=device)
    vals = getattr(flex, name)(x, weight, None, spare, offsets=offsets)
    for result in (vals, *torch.autograd.grad(vals, (x, weight), torch.ones_like(vals))):
        assert not result.count_nonzero()


@pytest.mark.parametrize("name", ["triton_sparse_encode", "sparse_encode"])
@pytest.mark.parametrize("index", [-1, 9, -(2**31), 2**31 - 1, 2**32 + 3, 2**63 - 1])
def test_an_index_out_of_range_gives_nan_there_and_nowhere_else(flex, device, name, index):
    right = exact(4, 5, 9, 33, device=device)
    wrong = right._replace(indices=right.indices.clone())
    wrong.indices[1, 3] = index
    result, expected = run_sparse(getattr(flex, name), wrong), encoder_truth(right)
    assert torch.equal(result.vals.isnan().nonzero(), torch.tensor([[1, 3]], device=device))
    assert torch.equal(result.vals.nan_to_num().double(), expected.vals.where(~result.vals.isnan(), 0))
    others = [0, 2, 3]
    assert torch.equal(result.x[others].double(), expected.x[others])


# As citizens of torch


@pytest.fixture(params=["topk", "sparse"])
def encoder(request, flex):
    """A function of x, weight, bias and indices that returns vals: those of as many features where it chooses them."""
    if request.param == "sparse":
        return flex.triton_sparse_encode
    return lambda x, weight, bias, indices: flex.triton_topk_encode(x, weight, bias, indices.shape[1])[0]


def reference(flex, encoder, problem):
    """What the encoder makes of small integers, by autograd of the torch reference: exact."""
    if encoder is flex.triton_sparse_encode:
        return run_sparse(flex.sparse_encode, problem)
    return run_topk(flex.topk_encode, problem)[0]


def assert_same(result, expected):
    assert all(map(torch.equal, result, expected)), result


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_refused(device, encoder, compiled, fresh_dynamo):
    x, *others, vals_grad = exact(2, 3, 4, 5, device=device)
    function = torch.compile(encoder, fullgraph=True, backend=BACKEND) if compiled else encoder
    vals = function(x.requires_grad_(), *others)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False" if compiled else "second derivative"):
        (gradient,) = torch.autograd.grad(vals, x, vals_grad, create_graph=True)
        gradient.square().sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_nothing_but_inputs_and_results_is_saved_and_without_gradients_nothing(device, encoder, mode):
    x, weight, bias, indices, _ = exact(4, 3, 9, 33, device=device)
    copies, saved = [tensor.clone() for tensor in (x, weight, bias, indices)], []
    weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        assert encoder(x, weight, bias, indices).requires_grad
        kept = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in (x.data_ptr(), weight.data_ptr()))
        saved.clear()
        with mode():
            assert not encoder(x, weight, bias, indices).requires_grad
    assert kept <= 4 * 3 * (4 + 8) and not saved  # vals and indices
    assert all(map(torch.equal, (x, weight, bias, indices), copies))


def test_ops_pass_opcheck(flex, device):
    with RecordedOps(flex) as ops:
        for names in (("x", "weight", "bias"), ("weight",)):
            problem = exact(len(LENGTHS), max(LENGTHS), 9, 3, device=device)
            leaves = [getattr(problem, name).requires_grad_() for name in names]
            indices, offsets, vals_grad, *_ = ragged(problem, torch.int32, 0)
            vals = flex.triton_sparse_encode(*problem[:3], indices, offsets=offsets)
            torch.autograd.grad(vals, leaves, vals_grad)
            bias = problem.bias if "bias" in names else None
            vals, _ = flex.triton_topk_encode(problem.x, problem.weight, bias, 3, relu=bias is None)
            torch.autograd.grad(vals, leaves, torch.ones_like(vals))
    names = [op.name().split("::")[1] for op, _ in ops.calls]
    assert names == ["sparse_encode", "encode_backward", "topk_encode", "encode_backward"] * 2
    for op, arguments in ops.calls:
        torch.library.opcheck(op, tree_map_only(torch.Tensor, torch.Tensor.detach, arguments))


def test_fake_tensors_see_the_ops(device, encoder):
    problem = exact(4, 5, 9, 33, device=device, dtypes=(f16, f32, f32))
    fake = EncoderProblem(*map(FakeTensorMode().from_tensor, problem))
    result = run_sparse(encoder, fake)
    given = EncoderResult(problem.vals_grad, *problem[:3])
    assert [(fake.shape, fake.dtype) for fake in result] == [(real.shape, real.dtype) for real in given]


def test_compiled_without_a_graph_break_a_smaller_batch_is_not_traced_again(flex, device, encoder, fresh_dynamo):
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(encoder, fullgraph=True, backend=counter)

    def with_a_dynamic_batch(x, weight, bias, indices):
        for tensor in (x, indices):
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(x, weight, bias, indices)

    for B in (8, 5, 3):
        problem = exact(B, 5, 9, 33, device=device)
        assert_same(run_sparse(with_a_dynamic_batch, problem), reference(flex, encoder, problem))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, f16], ids=str)
def test_autocast_narrows_vals_and_not_the_gradients(flex, device, encoder, dtype):
    problem = exact(4, 5, 9, 33, device=device)
    with torch.autocast(device, dtype=dtype):
        narrow = problem._replace(vals_grad=problem.vals_grad.to(dtype))
        result = run_sparse(encoder, narrow)
    assert [value.dtype for value in result] == [dtype, f32, f32, f32]
    assert_same(result._replace(vals=result.vals.float()), reference(flex, encoder, problem))
    wide = exact(4, 5, 9, 33, device=device, dtypes=f64)  # which autocast leaves alone
    with torch.autocast(device, dtype=dtype):
        assert_same(run_sparse(encoder, wide), reference(flex, encoder, wide))


# One training step: the encoder, a loss, every gradient

STEP_SIZES = (640, 50, 500, 200)  # B, K, F, D


def make_step(sizes, device, seed=0, dtype=f32):
    """x, encoder, its bias, decoder, its bias"""
    B, _, F, D = sizes
    generator = torch.Generator(device).manual_seed(seed)
    shapes = ((B, D), (F, D), (F,), (F, D), (D,))
    return [torch.randn(shape, generator=generator, device=device).div(10).to(dtype) for shape in shapes]


def run_step(encode, loss_function, k, tensors):
    x, *parameters = (tensor.detach().requires_grad_() for tensor in tensors)
    encoder, encoder_bias, decoder, bias = parameters
    vals, indices = encode(x - bias, encoder, encoder_bias, k)
    loss = loss_function(indices, decoder, vals, bias, x)
    return loss.detach(), indices, *torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("kind", ["topk", "hierarchical"])
def test_training_goes_as_in_plain_torch(flex, device, kind):
    B, k, _, D = sizes = (4, 2, 12, 16) if INTERPRETED else (512, 16, 2048, 128)
    parameters = make_step(sizes, device)[1:]

    def plain_encode(x, weight, bias, k):
        return torch.nn.functional.linear(x, weight, bias).relu().topk(k, dim=1)

    runs = []
    for encode, loss_function in (
        (flex.triton_topk_encode, getattr(flex, f"triton_{kind}_sae_loss")),
        (plain_encode, getattr(flex, f"{kind}_sae_loss")),
    ):
        leaves = [parameter.clone().requires_grad_() for parameter in parameters]
        optimizer, steps = torch.optim.Adam(leaves, lr=1e-3), []
        for step in range(20):
            batch = torch.randn(B, D, generator=torch.Generator(device).manual_seed(step), device=device)
            loss, indices, *gradients = run_step(encode, loss_function, k, [batch, *leaves])
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
            steps.append((loss, indices.sort(dim=1).values))
        runs.append(steps)
    same = 0
    for (loss, chosen), (plain_loss, plain_chosen) in zip(*runs, strict=True):
        if not torch.equal(chosen, plain_chosen):
            break
        torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
        same += 1
    assert same >= (20 if INTERPRETED else 1)
    assert runs[0][-1][0] < runs[0][0][0]


@needs_cuda
@pytest.mark.parametrize("dtype", [f32, torch.bfloat16], ids=str)
def test_a_captured_step_replays_on_fresh_data(flex, dtype):
    step = partial(run_step, flex.triton_topk_encode, flex.triton_topk_sae_loss, STEP_SIZES[1])
    static = make_step(STEP_SIZES, "cuda", dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static)  # capture allows no compilation
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(static)
    for seed in (1, 2):
        fresh = make_step(STEP_SIZES, "cuda", seed, dtype)
        for tensor, values in zip(static, fresh, strict=True):
            tensor.copy_(values)
        graph.replay()
        assert_same(result, step(fresh))


@needs_cuda
@pytest.mark.parametrize("layout", ["contiguous", "padded"])
def test_work_goes_to_the_current_stream(flex, encoder, layout):
    problem = exact(*SIZES, device="cuda")
    late = EncoderProblem(*(laid_out(torch.zeros_like(tensor), layout) for tensor in problem))
    run_sparse(encoder, late)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds: a launch that does not wait would read the zeros
        for tensor, values in zip(late, problem, strict=True):
            tensor.copy_(values)
        result = run_sparse(encoder, late)
    torch.cuda.synchronize()
    assert_same(result, reference(flex, encoder, problem))


@needs_cuda
def test_nothing_waits_for_the_device(encoder):
    problem = exact(*SIZES, device="cuda")
    run_sparse(encoder, problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_sparse(encoder, problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_may_live_on_a_device_that_is_not_current(flex, encoder):
    problem = exact(*SIZES, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_same(run_sparse(encoder, problem), reference(flex, encoder, problem))


@needs_cuda
@pytest.mark.parametrize("dtype", [f32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K, F", [(64, 65536), (300, 4096), (300, 24576)])
def test_the_encoder_takes_300_mib_beyond_its_gradients(flex, K, F, dtype):
    B, D = 8192, 512
    leaves = [t.requires_grad_() for t in make_encoder_problem(B, K, F, D, device="cuda", dtypes=dtype)[:3]]

    def step():
        vals, _ = flex.triton_topk_encode(*leaves, K)
        return torch.autograd.grad(vals, leaves, torch.ones_like(vals))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)
    assert extra <= 300 * 2**20
