"""The losses as citizens of torch: autograd, torch.library, torch.compile, checkpoints, streams, graphs."""

import contextlib
import math
from functools import partial

import pytest
import torch
from support import (
    BACKEND,
    INTERPRETED,
    RecordedOps,
    assert_right,
    deterministic_algorithms,
    laid_out,
    make_problem,
    modes,
    needs_cuda,
    run,
    triton_loss,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from truth import Problem, Result


@pytest.mark.kernels_ci
def test_gradcheck_in_float64(flex, device, kind):
    problem = make_problem(2, 3, 4, 5, device=device, dtypes=torch.float64, pattern="duplicates")
    leaves = [tensor.requires_grad_() for tensor in problem[1:]]
    with deterministic_algorithms():  # atomic additions come in any order
        assert torch.autograd.gradcheck(partial(triton_loss(flex, kind), problem.indices), leaves)


# With the plain loss, grad_out is a constant: nothing but the refusal tells the penalty that its gradient is missing.
@pytest.mark.parametrize("outer", [torch.Tensor.clone, torch.square], ids=["plain", "squared"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_refused(flex, device, kind, outer, compiled, fresh_dynamo):
    problem = make_problem(2, 3, 4, 5, device=device)
    vals, function = problem.vals.requires_grad_(), triton_loss(flex, kind)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend=BACKEND)
    loss = outer(function(*problem))
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False" if compiled else "second derivative"):
        (gradient,) = torch.autograd.grad(loss, vals, create_graph=True)
        (loss + gradient.square().sum()).backward()


def saved_bytes(loss, problem):
    """Bytes of the tensors that autograd keeps for the backward pass, the inputs themselves not counted."""
    inputs = {tensor.data_ptr() for tensor in problem}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss(*problem)
    return sum(t.nbytes for t in kept if t.data_ptr() not in inputs)


@modes
@pytest.mark.parametrize("names", [("weight",), ("vals",), ("bias", "target")], ids="+".join)
def test_a_decoder_step_saves_tensors_the_size_of_target(flex, device, kind, deterministic, names):
    B, K, F, D = 4, 3, 9, 33
    problem = make_problem(B, K, F, D, device=device)
    for name in names:
        getattr(problem, name).requires_grad_()
    with deterministic_algorithms(deterministic):
        saved = saved_bytes(triton_loss(flex, kind), problem)
    # The residual; and of the hierarchical loss S_0, and each feature's number of pairs where d weight is asked for, in
    # both modes.
    counts = F if kind == "hierarchical" and "weight" in names else 0
    assert saved == 4 * ((2 if kind == "hierarchical" else 1) * B * D + counts)


# A checkpoint runs the forward pass again in the other mode.
@modes
@pytest.mark.parametrize("checkpointed", [False, True])
def test_deterministic_mode_may_change_before_the_backward_pass(flex, device, kind, checkpointed, deterministic):
    problem = make_problem(5, 7, 9, 33, device=device, pattern="duplicates")
    leaves = [tensor.clone().requires_grad_() for tensor in problem[1:]]
    function = triton_loss(flex, kind)
    if checkpointed:
        function = partial(checkpoint, function, use_reentrant=False)
    with deterministic_algorithms(not deterministic):
        loss = function(problem.indices, *leaves)
    with deterministic_algorithms(deterministic):
        assert_right(kind, problem, Result(loss.detach(), *torch.autograd.grad(loss, leaves)))


@modes
def test_a_second_backward_pass_gives_the_same_gradients(flex, device, kind, deterministic):
    problem = make_problem(5, 7, 9, 33, device=device, pattern="duplicates")
    leaves = [tensor.clone().requires_grad_() for tensor in problem[1:]]
    loss = triton_loss(flex, kind)(problem.indices, *leaves)
    with deterministic_algorithms(deterministic):
        first, second = (Result(loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)) for _ in range(2))
    assert_right(kind, problem, first)
    assert_right(kind, problem, second)
    if deterministic or kind == "topk":  # atomic additions come in any order
        assert all(map(torch.equal, first, second))


# A hook owes values, size, dtype and device of what it gives back, not strides.
HOOKS = {
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "padded": lambda t: laid_out(t, "padded") if t.dim() == 2 else t,
    "stride 2": lambda t: laid_out(t, "every_other_column") if t.dim() == 1 and t.numel() else t,
    "all": lambda t: laid_out(t, "every_other_column" if t.dim() == 2 or t.numel() else "contiguous"),
}


@modes
@pytest.mark.parametrize("unpack", HOOKS.values(), ids=HOOKS.keys())
@pytest.mark.parametrize("dtypes", [torch.float32, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
def test_saved_tensors_may_come_back_with_other_strides(flex, device, kind, unpack, dtypes, deterministic):
    problem = make_problem(6, 5, 40, 33, device=device, dtypes=dtypes, pattern="duplicates")
    leaves = [tensor.clone().requires_grad_() for tensor in problem[1:]]
    with deterministic_algorithms(deterministic), torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        loss = triton_loss(flex, kind)(problem.indices, *leaves)
        assert_right(kind, problem, Result(loss.detach(), *torch.autograd.grad(loss, leaves)))


@contextlib.contextmanager
def enable_grad_in_inference_mode():
    with torch.inference_mode(), torch.enable_grad():
        yield


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, enable_grad_in_inference_mode], ids=lambda mode: mode.__name__
)
def test_without_gradients_the_forward_pass_makes_nothing_but_the_loss(flex, device, kind, mode):
    problem = make_problem(4, 3, 9, 33, device=device)

    def made():
        with RecordedOps(flex) as ops:
            loss = triton_loss(flex, kind)(*problem)
        assert loss.requires_grad == (sum(tensor.numel() for tensor in ops.outputs) > 1)
        return loss

    assert not made().requires_grad
    problem.weight.requires_grad_()
    assert made().requires_grad
    with mode():
        loss = made()
        assert not loss.requires_grad
    assert_right(kind, problem, run(triton_loss(flex, kind), problem)._replace(loss=loss))


@needs_cuda
def test_without_gradients_no_state_is_written(flex, kind):
    problem = make_problem(2048, 4, 1000, 512, device="cuda")
    problem.weight.requires_grad_()
    with torch.no_grad():
        triton_loss(flex, kind)(*problem)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        triton_loss(flex, kind)(*problem)
        assert torch.cuda.max_memory_allocated() - before < problem.target.nbytes / 2


@needs_cuda
@pytest.mark.parametrize("layout", ["contiguous", "padded"])
@pytest.mark.parametrize("sizes", [(512, 32, 65536, 512), (16384, 64, 4096, 200), (4096, 64, 2**17, 200)], ids=str)
@pytest.mark.parametrize(
    "kind, dtype, deterministic",
    [
        ("topk", torch.float32, False),
        ("topk", torch.bfloat16, False),
        ("hierarchical", torch.float32, False),
        ("hierarchical", torch.float32, True),
        ("hierarchical", torch.float64, True),
        ("hierarchical", torch.bfloat16, False),
    ],
)
def test_a_decoder_step_takes_no_more_memory_than_it_must(flex, kind, sizes, dtype, deterministic, layout):
    B, K, F, D = sizes
    ordered = kind == "topk" or deterministic or dtype != torch.float32
    size = 8 if dtype == torch.float64 else 4  # of a sum
    states = size * B * D * (2 if kind == "hierarchical" else 1)
    # Each pair has its order (8 bytes), feature, sample, slot and coefficient; torch's sort holds keys, their sorted
    # form and its own buffers, no more than 48 bytes together.
    pairs = B * K * (8 + 3 * 4 + size + 48) + 8 * F
    # Partial sums, two for each chunk of 128 pairs and 4096 at most; or replicas
    rows = size * D * (min(4096, 2 * math.ceil(B * K / 128)) if ordered else 2048)
    backward = states + rows + (pairs if ordered else 4 * (2 * F + 2048) + size * B * K)
    # Gradients of target and bias are made in the sum's dtype, then rounded.
    backward += size * B * D
    if kind == "topk":
        backward += size * B * K * math.ceil(D * size / 2048)  # dot products
    elif ordered:
        # Scratch, and d vals of each of its tiles of 256 bytes a row
        backward += B * max(65536, 256 * K) + size * B * K * (math.ceil(65536 / (256 * K)) + 1)
    problem = make_problem(B, K, F, D, device="cuda", dtypes=dtype)
    leaves = [laid_out(problem.weight, layout), problem.vals, problem.bias]
    for leaf in leaves:
        leaf.requires_grad_()

    def step():
        return torch.autograd.grad(triton_loss(flex, kind)(problem.indices, *leaves, problem.target), leaves)

    with deterministic_algorithms(deterministic):
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = step()
    torch.cuda.synchronize()
    peak, kept = torch.cuda.max_memory_allocated() - before, sum(gradient.nbytes for gradient in gradients)
    shares = size * B * D // 32 + 2**20  # of the loss, and what is rounded up
    assert peak <= shares + kept + backward


def test_function_transforms_and_forward_mode_are_refused(flex, device, kind):
    indices, weight, *others = make_problem(4, 3, 9, 33, device=device)
    loss = partial(triton_loss(flex, kind), indices)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(weight, *others)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        loss(torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight)), *others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_pass_opcheck(flex, device, kind, dtype):
    with RecordedOps(flex) as ops:
        for names in (("weight", "vals", "bias", "target"), ("weight",), ("vals", "target"), ("bias",), ()):
            problem = make_problem(3, 5, 7, 33, device=device, dtypes=dtype, pattern="duplicates")
            leaves = [getattr(problem, name).requires_grad_() for name in names]
            loss = triton_loss(flex, kind)(*problem)
            if leaves:
                torch.autograd.grad(loss, leaves)
    names = [op.name().split("::")[1] for op, _ in ops.calls]
    assert names == [f"{kind}_forward", f"{kind}_backward"] * 4 + [f"{kind}_forward"]
    for op, arguments in ops.calls:
        torch.library.opcheck(op, tree_map_only(torch.Tensor, torch.Tensor.detach, arguments))


def test_fake_tensors_see_the_ops(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    mode = FakeTensorMode()
    fake = Problem(*(mode.from_tensor(tensor) for tensor in problem))
    leaves = [tensor.requires_grad_() for tensor in fake[1:]]
    loss = triton_loss(flex, kind)(*fake)  # outside the mode: it is the tensors that know
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.shape == ()
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in problem[1:]]


def test_a_grad_out_that_torch_negates_lazily_is_right(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    negated = []

    def step(*inputs):  # i times the conjugate of i times the loss is the loss
        loss = triton_loss(flex, kind)(*inputs)
        loss.register_hook(lambda grad_out: negated.append(grad_out.is_neg()))
        return (torch.complex(torch.zeros_like(loss), loss).conj() * 1j).real

    assert_right(kind, problem, run(step, problem))
    assert negated == [True]


def test_compiled_without_a_graph_break_a_smaller_batch_is_not_traced_again(flex, device, kind, fresh_dynamo):
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(triton_loss(flex, kind), fullgraph=True, backend=counter)

    def with_a_dynamic_batch(indices, weight, vals, bias, target):
        for tensor in (indices, vals, target):
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(indices, weight, vals, bias, target)

    for B in (8, 5, 3):
        problem = make_problem(B, 5, 9, 33, device=device)
        assert_right(kind, problem, run(with_a_dynamic_batch, problem))
    assert counter.frame_count == 1


# On a GPU large enough that atomics would come in another order every time.
REPEATABLE = (4, 20, 5, 33) if INTERPRETED else (4096, 64, 5000, 512)


@pytest.mark.parametrize("pattern", ["uniform", "one_hot_feature"])
@pytest.mark.parametrize(
    "kind, dtype, deterministic, names",
    [
        ("topk", torch.float32, False, Result._fields),
        ("topk", torch.bfloat16, False, Result._fields),
        ("hierarchical", torch.float32, True, Result._fields),
        ("hierarchical", torch.bfloat16, True, Result._fields),
        ("hierarchical", torch.float32, False, ("loss", "bias", "target")),
        ("hierarchical", torch.bfloat16, False, ("loss", "weight", "bias", "target")),
        ("hierarchical", torch.float16, False, ("loss", "weight", "bias", "target")),
    ],
)
def test_results_are_the_same_bits_wherever_readme_says_so(flex, device, kind, dtype, deterministic, names, pattern):
    problem = make_problem(*REPEATABLE, device=device, pattern=pattern, dtypes=dtype)
    with deterministic_algorithms(deterministic):
        first, *others = [run(triton_loss(flex, kind), problem) for _ in range(4)]
    for name in names:
        for again in others:
            assert torch.equal(getattr(first, name), getattr(again, name)), f"{name} differs between two runs"


def test_autocast_changes_nothing_and_inputs_are_left_as_they_were(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    copies = [tensor.clone() for tensor in problem]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_right(kind, problem, run(triton_loss(flex, kind), problem))
    assert all(map(torch.equal, problem, copies))


# In bfloat16 the hierarchical gradient of weight takes its ordered form.
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_on_fresh_data(flex, kind, dtype):
    problem = make_problem(640, 50, 500, 200, device="cuda", dtypes=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(triton_loss(flex, kind), problem)  # capture allows no compilation
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(triton_loss(flex, kind), problem)
    for seed, pattern in ((1, "uniform"), (2, "one_hot_feature")):
        fresh = make_problem(640, 50, 500, 200, device="cuda", dtypes=dtype, pattern=pattern, seed=seed)
        for static, values in zip(problem, fresh, strict=True):
            static.copy_(values)
        graph.replay()
        assert_right(kind, fresh, result)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "padded"])
def test_work_goes_to_the_current_stream(flex, kind, dtype, layout):
    problem = make_problem(640, 50, 500, 200, device="cuda", dtypes=dtype)
    late = Problem(*(laid_out(torch.zeros_like(tensor), layout) for tensor in problem))
    run(triton_loss(flex, kind), late)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds: a launch that does not wait would read the zeros
        for tensor, values in zip(late, problem, strict=True):
            tensor.copy_(values)
        result = run(triton_loss(flex, kind), late)
    torch.cuda.synchronize()
    assert_right(kind, problem, result)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_waits_for_the_device(flex, kind, dtype):
    problem = make_problem(640, 50, 500, 200, device="cuda", dtypes=dtype)
    run(triton_loss(flex, kind), problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(triton_loss(flex, kind), problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_may_live_on_a_device_that_is_not_current(flex, kind):
    problem = make_problem(640, 20, 500, 200, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_right(kind, problem, run(triton_loss(flex, kind), problem))
