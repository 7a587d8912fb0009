"""Launches without Triton's own look-up."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from support import (
    deterministic_algorithms,
    make_problem,
    modes,
    needs_cuda,
    record_compilations,
    run,
    submodule,
    triton_loss,
)
from triton.runtime.jit import JITFunction


@triton.jit(do_not_specialize=["n"])
def _some_kernel(out_ptr, in_ptr, n, m, BLOCK: tl.constexpr):
    pass


@pytest.fixture
def key(flex):
    """The key of a launch of a kernel with two pointers, a plain and a specialised integer, and a constant."""
    # The interpreter has its own kind of function; the launcher needs the parameters of a compiled one.
    kernel = JITFunction(_some_kernel.fn, do_not_specialize=["n"])
    launcher = submodule(flex, "launch")._CachedLauncher(kernel)
    return lambda *args, BLOCK=1: launcher._key_and_addresses(args, {"BLOCK": BLOCK})[0]


def aligned(dtype=torch.float32, offset=0):
    buffer = torch.zeros(64, dtype=dtype)
    return buffer[-buffer.data_ptr() % 16 // buffer.itemsize + offset :]


def test_a_launch_has_the_key_of_what_its_compilation_depends_on(key):
    first, second = aligned(), aligned()
    same = key(first, second, 5, 7)
    assert same is not None
    assert same == key(second, first, 6, 7)  # addresses and plain integers do not matter
    assert same == key(first[4:], second, 5, 7)  # 16 bytes further
    others = [key(first, None, 5, 7), key(first, aligned(torch.float64), 5, 7)]
    others += [key(first, second, 5, 8), key(first, second, 5, 7, BLOCK=2)]
    assert len({same, *others}) == 5
    # Triton looks itself where an address is not aligned or an integer is long.
    assert key(first, aligned(offset=1), 5, 7) is None
    assert key(first, None, 2**31, 7) is None
    assert key(first, None, 2**31 - 1, 7) is not None


@pytest.mark.parametrize("devices", [(0, 1), (1, 0), (0, -1), (-1, 0)], ids=str)
def test_tensors_of_one_launch_must_be_on_one_device(key, devices):
    def on(number):  # -1 is a CPU
        return SimpleNamespace(get_device=lambda: number, device=f"device {number}", dtype=None, data_ptr=lambda: 0)

    first, second = devices
    with pytest.raises(ValueError, match=f"must be on one device, got device {first} and device {second}"):
        key(on(first), on(second), 5, 7)
    assert key(on(first), on(first), 5, 7) != key(on(second), on(second), 5, 7)


@needs_cuda
@modes
def test_saved_tensors_that_do_not_come_back_to_their_gpu_are_refused(flex, kind, deterministic):
    problem = make_problem(4, 5, 9, 33, device="cuda")
    loss = triton_loss(flex, kind)
    with deterministic_algorithms(deterministic):
        run(loss, problem)  # compiles

        # Weight alone is on the CPU: plain torch operations on the rest do not notice.
        def unpack(tensor):
            return tensor.cpu() if tensor.shape == problem.weight.shape else tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            result = loss(*problem._replace(vals=problem.vals.requires_grad_()))
            with pytest.raises(ValueError, match="must be on one device, got"):
                result.backward()


@needs_cuda
@modes
def test_other_batch_sizes_and_dictionaries_do_not_recompile_kernels(flex, monkeypatch, kind, deterministic):
    def run_one(B, F, grad_out=None):
        run(triton_loss(flex, kind), make_problem(B, 20, F, 200, device="cuda"), grad_out)

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
def test_a_step_like_another_is_launched_without_asking_triton(flex, monkeypatch, kind):
    asked, jit_run = [], JITFunction.run

    def asked_for(self, *args, warmup, **kwargs):
        if not warmup:
            asked.append(self.__name__)
        return jit_run(self, *args, warmup=warmup, **kwargs)

    monkeypatch.setattr(JITFunction, "run", asked_for)
    for B, F in ((64, 4096), (50, 4095)):
        asked.clear()
        run(triton_loss(flex, kind), make_problem(B, 20, F, 200, device="cuda"))
    assert not asked
