"""The losses as citizens of torch: autograd, torch.library, torch.compile, streams, graphs, determinism."""

import contextlib
import math
from functools import partial

import pytest
import torch
from support import (
    INTERPRETED,
    LOSSES,
    assert_agree,
    assert_right,
    deterministic_algorithms,
    laid_out,
    make_problem,
    needs_cuda,
    record_compilations,
    run,
    submodule,
    triton_loss,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction
from truth import Problem, Result, magnitude


@pytest.mark.kernels_ci
@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck_in_float64(flex, device, kind):
    problem = make_problem(2, 3, 4, 5, device=device, dtypes=torch.float64, pattern="duplicates")
    leaves = [tensor.requires_grad_() for tensor in problem[1:]]
    nondet_tol = 0.0
    if kind == "hierarchical":
        # Atomic additions come in any order. Two orders of a sum of n terms differ by n - 1 roundings each.
        most_pairs = torch.bincount(problem.indices.flatten()).max().item()
        sizes = magnitude(kind, problem).weight
        nondet_tol = 2 * (most_pairs - 1) * torch.finfo(torch.float64).eps / 2 * sizes.max().item()
    loss = partial(triton_loss(flex, kind), problem.indices)
    assert torch.autograd.gradcheck(loss, leaves, nondet_tol=nondet_tol)


# With the plain loss, grad_out is a constant: nothing but the refusal tells the penalty that its gradient is missing.
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("outer", [torch.Tensor.clone, torch.square], ids=["plain", "squared"])
def test_a_second_derivative_is_refused(flex, device, kind, outer):
    problem = make_problem(2, 3, 4, 5, device=device)
    vals = problem.vals.requires_grad_()
    loss = outer(triton_loss(flex, kind)(*problem))
    with pytest.raises(RuntimeError, match="second derivative"):
        (gradient,) = torch.autograd.grad(loss, vals, create_graph=True)
        (loss + gradient.square().sum()).backward()


def saved_bytes(loss, problem):
    """Bytes of the tensors that autograd keeps for the backward pass, the inputs themselves not counted."""
    inputs = {tensor.data_ptr() for tensor in problem}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss(*problem)
    return sum(t.nbytes for t in kept if t.data_ptr() not in inputs)


class OutputsOfOps(TorchDispatchMode):
    """Collects the names of the package's ops and the tensors that they return."""

    def __init__(self, flex):
        super().__init__()
        self.namespace = flex._ops._OPS_NAME
        self.names, self.tensors = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == self.namespace:
            self.names.append(func.name().split("::")[1])
            self.tensors += tree_leaves(outputs)
        return outputs


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("names", [("weight",), ("vals",), ("bias", "target")], ids="+".join)
def test_a_training_step_keeps_one_tensor_the_size_of_target(flex, device, kind, deterministic, names):
    B, K, F, D = 4, 3, 9, 33
    problem = make_problem(B, K, F, D, device=device)
    for name in names:
        getattr(problem, name).requires_grad_()
    # And where it is needed the order of the pairs, 18 bytes for each, 8 for each of bias and for each feature, or the
    # plan of copies.
    ordered = "weight" in names and deterministic if kind == "hierarchical" else names != ("bias", "target")
    planned = kind == "hierarchical" and "weight" in names and not deterministic
    with deterministic_algorithms(deterministic):
        saved = saved_bytes(triton_loss(flex, kind), problem)
    width = 48 if kind == "topk" else D  # rows of TopK's gradient are a multiple of 16 long
    bias_pairs = B if kind == "topk" else 0
    assert saved == 4 * B * width + ordered * (18 * B * K + 8 * bias_pairs + 8 * F) + planned * 4 * (F + 1 + 2048)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("forward", [False, True])
def test_deterministic_mode_may_change_between_forward_and_backward(flex, device, kind, forward):
    problem = make_problem(5, 7, 9, 33, device=device, pattern="duplicates")
    leaves = [tensor.clone().requires_grad_() for tensor in problem[1:]]
    with deterministic_algorithms(forward):
        loss = triton_loss(flex, kind)(problem.indices, *leaves)
    with deterministic_algorithms(not forward):
        assert_right(kind, problem, Result(loss.detach(), *torch.autograd.grad(loss, leaves)))


@contextlib.contextmanager
def enable_grad_in_inference_mode():
    with torch.inference_mode(), torch.enable_grad():
        yield


@pytest.mark.parametrize("kind", LOSSES)
def test_tensors_made_in_inference_mode_may_be_trained_on(flex, device, kind):
    with torch.inference_mode():
        problem = make_problem(4, 3, 9, 33, device=device)
    for trained in ("weight", "vals"):
        inputs = problem._replace(**{trained: getattr(problem, trained).clone().requires_grad_()})
        loss = triton_loss(flex, kind)(*inputs)
        (gradient,) = torch.autograd.grad(loss, getattr(inputs, trained))
        everything = run(triton_loss(flex, kind), Problem(*(tensor.clone() for tensor in problem)))
        assert_right(kind, problem, everything._replace(loss=loss.detach(), **{trained: gradient}))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, enable_grad_in_inference_mode], ids=lambda mode: mode.__name__
)
def test_without_gradients_the_forward_pass_makes_nothing_but_the_loss(flex, device, kind, mode):
    problem = make_problem(4, 3, 9, 33, device=device)

    def made():
        with OutputsOfOps(flex) as outputs:
            loss = triton_loss(flex, kind)(*problem)
        assert loss.requires_grad == (sum(tensor.numel() for tensor in outputs.tensors) > 1)
        return loss

    assert not made().requires_grad
    problem.weight.requires_grad_()
    assert made().requires_grad
    with mode():
        loss = made()
        assert not loss.requires_grad
    assert_right(kind, problem, run(triton_loss(flex, kind), problem)._replace(loss=loss))


@needs_cuda
@pytest.mark.parametrize("kind", LOSSES)
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
@pytest.mark.parametrize("sizes", [(512, 32, 65536, 1024), (16384, 64, 4096, 256), (4096, 64, 2**17, 256)], ids=str)
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
def test_a_training_step_takes_no_more_memory_than_readme_says(flex, kind, sizes, dtype, deterministic, layout):
    B, K, F, D = sizes
    ordered = kind == "topk" or deterministic or dtype != torch.float32
    size = 8 if dtype == torch.float64 else 4  # of a sum
    forward = size * B * D + ordered * 48 * B * (K + 1) + 8 * F
    backward = size * B * D + ordered * (16 + size) * B * (K + 1) + 8 * F
    # Pieces of features that hold many pairs, two for each 128 pairs, and of bias; or rows behind d weight
    backward += size * D * (min(4096, 2 * B * K // 128) + math.isqrt(B) + 2 if ordered else 2048)
    if kind == "topk":
        forward += 2 * B * D if dtype == torch.bfloat16 and K >= 48 else 0
        backward += size * B * (K + 1) * math.ceil(D / 512)
    elif ordered:
        backward += B * (max(32768, 256 * K) + size * (2 * K + 128))
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
    assert peak <= shares + max(forward, kept + backward)


@pytest.mark.parametrize("kind", LOSSES)
def test_function_transforms_and_forward_mode_are_refused(flex, device, kind):
    indices, weight, *others = make_problem(4, 3, 9, 33, device=device)

    def loss(weight):
        return triton_loss(flex, kind)(indices, weight, *others)

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(weight)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(loss)(weight.expand(2, -1, -1))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        loss(torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight)))


def op_arguments(flex, device, monkeypatch):
    """Arguments for each of the ops, as the autograd Functions pass them."""
    monkeypatch.setattr(submodule(flex, "topk_kernels"), "_NARROW_K", 1)
    inputs = make_problem(3, 5, 7, 9, device=device, pattern="duplicates")
    scalar, state = torch.tensor(0.1, device=device), torch.randn_like(inputs.target)
    # Where all are bfloat16 the rows of g have units.
    narrow = make_problem(3, 5, 7, 9, device=device, dtypes=torch.bfloat16)
    passed_on = [(p, *flex._ops.ops.topk_forward(*p, True, True)[1:]) for p in (inputs, narrow)]
    *_, units, plan, by_slot = flex._ops.ops.hierarchical_forward(*inputs, True, True, True)
    for needs in ((True, True), (True, False), (False, False)):
        yield "topk_forward", (*inputs, *needs)
        yield "topk_forward", (*narrow, *needs)
    for needs in ((True, True, False), (True, False, True), (True, False, False), (False, False, False)):
        yield "hierarchical_forward", (*inputs, *needs)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        for p, recon_grad, row_units, pairs in passed_on:
            yield "topk_backward", (scalar, recon_grad, row_units, p.weight, p.vals, p.bias.dtype, pairs, *needs)
        for pairs in ([], by_slot):
            yield "hierarchical_backward", (scalar, state, units, plan, *inputs, pairs, *needs)


@pytest.mark.parametrize("op", ["topk_forward", "topk_backward", "hierarchical_forward", "hierarchical_backward"])
def test_ops_pass_opcheck(flex, device, monkeypatch, op):
    for name, arguments in op_arguments(flex, device, monkeypatch):
        if name == op:
            torch.library.opcheck(getattr(flex._ops.ops, op).default, arguments)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_mode_sees_the_ops(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    with OutputsOfOps(flex) as mode:
        seen = run(triton_loss(flex, kind), problem)
    assert mode.names == [f"{kind}_forward", f"{kind}_backward"]
    assert_agree(kind, problem, seen, run(triton_loss(flex, kind), problem))


@pytest.mark.parametrize("kind", LOSSES)
def test_fake_tensors_see_the_ops(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    mode = FakeTensorMode()
    fake = Problem(*(mode.from_tensor(tensor) for tensor in problem))
    leaves = [tensor.requires_grad_() for tensor in fake[1:]]
    loss = triton_loss(flex, kind)(*fake)  # outside the mode: it is the tensors that know
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.shape == ()
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in problem[1:]]


@needs_cuda
@pytest.mark.parametrize("kind", LOSSES)
def test_saved_tensors_that_do_not_come_back_to_the_gpu_are_refused(flex, kind):
    problem = make_problem(4, 5, 9, 33, device="cuda")
    loss = triton_loss(flex, kind)
    run(loss, problem)  # compiles
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.cpu(), lambda tensor: tensor):
        result = loss(*problem._replace(weight=problem.weight.requires_grad_()))
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        result.backward()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_grad_out_that_torch_negates_lazily_is_right(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    negated = []

    def step(*inputs):  # i times the conjugate of i times the loss is the loss
        loss = triton_loss(flex, kind)(*inputs)
        loss.register_hook(lambda grad_out: negated.append(grad_out.is_neg()))
        return (torch.complex(torch.zeros_like(loss), loss).conj() * 1j).real

    assert_right(kind, problem, run(step, problem))
    assert negated == [True]


# Inductor needs a C++ compiler on a CPU. The ops are the same to both: only what is around them gets compiled.
BACKEND = "aot_eager" if INTERPRETED else "inductor"


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", LOSSES)
def test_compiled_without_a_graph_break_equals_eager(flex, device, kind, fresh_dynamo):
    problem = make_problem(4, 5, 9, 33, device=device)

    def step(indices, weight, vals, bias, target):
        return 2 * triton_loss(flex, kind)(indices, weight, vals.relu(), bias, target)

    compiled = torch.compile(step, fullgraph=True, backend=BACKEND)
    assert_agree(kind, problem, *(halved(run(function, problem)) for function in (compiled, step)))


def halved(result):
    return Result(*(value / 2 for value in result))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_last_smaller_batch_is_not_traced_again(flex, device, kind, fresh_dynamo):
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(triton_loss(flex, kind), fullgraph=True, backend=counter)
    for B in (8, 5, 3):
        problem = make_problem(B, 5, 9, 33, device=device)
        for name in ("indices", "vals", "target"):
            torch._dynamo.mark_dynamic(getattr(problem, name), 0)
        leaves = [t.requires_grad_() for t in problem[1:]]
        loss = compiled(*problem)
        gradients = torch.autograd.grad(loss, leaves)
        detached = problem._replace(**{name: getattr(problem, name).detach() for name in problem._fields[1:]})
        assert_right(kind, detached, Result(loss.detach(), *gradients))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", LOSSES)
def test_a_second_derivative_is_refused_when_compiled(flex, device, kind, fresh_dynamo):
    problem = make_problem(2, 3, 4, 5, device=device)
    vals = problem.vals.requires_grad_()
    loss = torch.compile(triton_loss(flex, kind), fullgraph=True, backend=BACKEND)(*problem)
    with pytest.raises(RuntimeError, match=r"double backward|second derivative|create_graph=False"):
        (gradient,) = torch.autograd.grad(loss, vals, create_graph=True)
        gradient.square().sum().backward()


@needs_cuda
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_other_batch_sizes_and_dictionaries_do_not_recompile_kernels(flex, monkeypatch, kind, deterministic):
    def run_one(B, F, grad_out=None):
        run(triton_loss(flex, kind), make_problem(B, 20, F, 320, device="cuda"), grad_out)

    with deterministic_algorithms(deterministic):
        run_one(64, 4096)
        compiled = record_compilations(monkeypatch)
        for B, F in ((64, 4096), (63, 4096), (1, 4096), (16, 4096), (64, 4095), (640, 1), (1000, 70001), (5000, 9)):
            run_one(B, F)
            assert not compiled, f"B={B} F={F} compiled {compiled}"
        # As where several losses share a tensor
        run_one(64, 4096, grad_out=torch.ones(2, device="cuda")[1])
        assert not compiled, f"a grad_out that is not aligned compiled {compiled}"


@needs_cuda
@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_like_another_is_launched_without_asking_triton(flex, monkeypatch, kind):
    asked, jit_run = [], JITFunction.run

    def asked_for(self, *args, warmup, **kwargs):
        if not warmup:
            asked.append(self.__name__)
        return jit_run(self, *args, warmup=warmup, **kwargs)

    monkeypatch.setattr(JITFunction, "run", asked_for)
    for B, F in ((64, 4096), (50, 4095)):
        asked.clear()
        run(triton_loss(flex, kind), make_problem(B, 20, F, 321, device="cuda"))
    assert not asked


# On a GPU large enough that atomics would come in another order every time.
REPEATABLE = (4, 20, 5, 33) if INTERPRETED else (4096, 64, 5000, 768)


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


@pytest.mark.parametrize("kind", LOSSES)
def test_autocast_changes_nothing(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_right(kind, problem, run(triton_loss(flex, kind), problem))


@pytest.mark.parametrize("kind", LOSSES)
def test_inputs_are_left_as_they_were(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    copies = [tensor.clone() for tensor in problem]
    run(triton_loss(flex, kind), problem)
    assert all(map(torch.equal, problem, copies))


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_accumulate_in_a_training_loop(flex, device, kind):
    problem = make_problem(4, 5, 9, 33, device=device)
    weight = torch.nn.Parameter(problem.weight.clone())
    for _ in range(2):
        triton_loss(flex, kind)(*problem._replace(weight=weight)).backward()
    result = run(triton_loss(flex, kind), problem)
    assert_agree(kind, problem, result, result._replace(weight=weight.grad / 2))


@pytest.fixture(params=[False, True], ids=["one stream", "two streams"])
def streams(request, flex, monkeypatch):
    """Pairs are sorted on a second stream in large steps: here in all, or in none."""
    monkeypatch.setattr(submodule(flex, "checks"), "_WORTH_A_STREAM", 0 if request.param else math.inf)


# In bfloat16 the hierarchical gradient of weight takes its ordered form, and TopK keeps residuals in float16.
@needs_cuda
@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_on_fresh_data(flex, kind, dtype):
    problem = make_problem(640, 50, 500, 320, device="cuda", dtypes=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(triton_loss(flex, kind), problem)  # capture allows no compilation
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(triton_loss(flex, kind), problem)
    for seed, pattern in ((1, "uniform"), (2, "one_hot_feature")):
        fresh = make_problem(640, 50, 500, 320, device="cuda", dtypes=dtype, pattern=pattern, seed=seed)
        for static, values in zip(problem, fresh, strict=True):
            static.copy_(values)
        graph.replay()
        assert_right(kind, fresh, result)


@needs_cuda
@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "padded"])
def test_work_goes_to_the_current_stream(flex, kind, dtype, layout):
    problem = make_problem(640, 50, 500, 320, device="cuda", dtypes=dtype)
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
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_stream_changes_no_bit(flex, monkeypatch, kind, dtype):
    checks = submodule(flex, "checks")
    problem = make_problem(1024, 64, 3000, 2048, device="cuda", dtypes=dtype, pattern="one_hot_feature")
    assert problem.vals.numel() * problem.target.shape[1] >= checks._WORTH_A_STREAM
    with deterministic_algorithms():
        run(triton_loss(flex, kind), problem)
        torch.cuda._sleep(100_000_000)  # so that the device works without a pause on memory that is used again
        many = [run(triton_loss(flex, kind), problem) for _ in range(10)]
        monkeypatch.setattr(checks, "_WORTH_A_STREAM", math.inf)
        one = run(triton_loss(flex, kind), problem)
    for name in Result._fields:
        for result in many:
            assert torch.equal(getattr(result, name), getattr(one, name)), name


@needs_cuda
@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_waits_for_the_device(flex, kind, dtype):
    problem = make_problem(640, 50, 500, 320, device="cuda", dtypes=dtype)
    run(triton_loss(flex, kind), problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(triton_loss(flex, kind), problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("kind", LOSSES)
def test_tensors_may_live_on_a_device_that_is_not_current(flex, kind):
    problem = make_problem(640, 20, 500, 320, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_right(kind, problem, run(triton_loss(flex, kind), problem))
