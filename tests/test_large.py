"""Sizes at which 32 bits no longer hold an offset, or only just a place in the order of pairs."""

import pytest
import torch
from support import (
    deterministic_algorithms,
    make_problem,
    needs_cuda,
    record_compilations,
    relative_error,
    run,
    triton_loss,
)
from truth import Problem, Result, truth

pytestmark = needs_cuda

# B, K, F, D; how many samples and columns of the truth to compute at a time; GiB of memory that have to be free
CASES = {
    "F * D > 2**31": ((512, 32, 131072, 16400), (512, 2050), 68),
    "B * D > 2**31": ((131149, 4, 4096, 16400), (131149, 1025), 69),
    "B * K near 2**31": ((2**26 - 2**17, 31, 2**21, 2), (2**22, 2), 136),
}


def truth_in_parts(kind, problem, samples, columns):
    """The truth over blocks of samples and columns: every gradient is a sum over them, or made of them."""
    indices, weight, vals, bias, target = problem
    B, D = target.shape
    total = Result(0.0, *(torch.zeros_like(tensor, dtype=torch.float64) for tensor in problem[1:]))
    loss = 0.0
    for b in range(0, B, samples):
        for d in range(0, D, columns):
            rows, cols = slice(b, b + samples), slice(d, d + columns)
            part = Problem(indices[rows], weight[:, cols], vals[rows], bias[cols], target[rows, cols])
            share = part.target.numel() / target.numel()
            result = truth(kind, part, share)
            loss += share * result.loss
            total.weight[:, cols] += result.weight
            total.vals[rows] += result.vals
            total.bias[cols] += result.bias
            total.target[rows, cols] = result.target
    return total._replace(loss=loss)


@pytest.fixture(autouse=True)
def give_memory_back():
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "case, pattern, deterministic, dtype",
    [
        *((case, "uniform", False, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)),
        ("F * D > 2**31", "one_hot_feature", False, torch.float32),  # the replicas lie behind all rows
        ("B * K near 2**31", "uniform", True, torch.float32),
        # Half of the pairs have one feature: in a sum of 2**30 numbers rounding alone may exceed the limit for float32.
        ("B * K near 2**31", "one_hot_feature", True, torch.bfloat16),
    ],
)
def test_large_problems_are_right(flex, monkeypatch, kind, case, dtype, pattern, deterministic):
    sizes, (samples, columns), gigabytes = CASES[case]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, there are {free:.0f}")
    problem = make_problem(*sizes, device="cuda", dtypes=dtype, index_dtype=torch.int32, pattern=pattern)
    # 16-bit gradients near zero would all be subnormal for these sizes if the loss were not scaled.
    grad_out = float(problem.target.numel())
    with deterministic_algorithms(deterministic):
        run(triton_loss(flex, kind), Problem(*(t[:64] if t.shape[0] == sizes[0] else t for t in problem)))
        compiled = record_compilations(monkeypatch)
        result = run(triton_loss(flex, kind), problem, torch.tensor(grad_out, device="cuda"))
    assert not compiled, f"more than 64 samples compiled {compiled}"
    expected = truth_in_parts(kind, problem, samples, columns)
    assert relative_error(result.loss, expected.loss) <= 5e-6
    for name in Problem._fields[1:]:
        true = getattr(expected, name).mul_(grad_out)
        limit = 5e-6 if dtype == torch.float32 else 1.1 * relative_error(true.to(dtype), true)
        assert relative_error(getattr(result, name), true) <= limit, name
