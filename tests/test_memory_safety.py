"""No result depends on memory that nobody wrote, and no index reaches memory that is not the weight's."""

import itertools

import pytest
import torch
from support import (
    INTERPRETED,
    LAYOUTS,
    assert_only_sample_1_is_spoilt,
    assert_right,
    deterministic_algorithms,
    laid_out,
    make_problem,
    modes,
    needs_cuda,
    reference_loss,
    run,
    submodule,
    triton_loss,
)
from truth import Problem

GUARD = 64  # elements on either side of an allocation: a multiple of 16 bytes, so that alignment stays


def poison_of(dtype):
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


@pytest.fixture(params=[False, True], ids=["default", "deterministic"])
def guarded(request, flex, monkeypatch):
    """Tensors that the package allocates start out as poison and lie between poison; yields the buffers.

    Deterministic mode comes along because the hierarchical gradient of weight then takes another path; otherwise
    every feature of two pairs has replicas.
    """
    buffers = []
    monkeypatch.setattr(submodule(flex, "replicas"), "_PAIRS", 2)

    def guard(tensor, fill):
        buffer = torch.full(
            (tensor.numel() + 2 * GUARD,), poison_of(tensor.dtype), dtype=tensor.dtype, device=tensor.device
        )
        buffers.append(buffer)
        inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        return inner.zero_() if fill == "zeros" else inner

    def guarding(allocate, fill):
        return lambda *args, **kwargs: guard(allocate(*args, **kwargs), fill)

    for fill in ("empty", "zeros"):
        monkeypatch.setattr(torch, fill, guarding(getattr(torch, fill), fill))
        monkeypatch.setattr(torch, f"{fill}_like", guarding(getattr(torch, f"{fill}_like"), fill))
        monkeypatch.setattr(torch.Tensor, f"new_{fill}", guarding(getattr(torch.Tensor, f"new_{fill}"), fill))
    with deterministic_algorithms(request.param):
        yield buffers


def assert_nothing_else_was_written(buffers):
    assert buffers, "the package allocates in a way that this test does not see"
    for edge in (edge for buffer in buffers for edge in (buffer[:GUARD], buffer[-GUARD:])):
        assert (edge.isnan() if edge.is_floating_point() else edge == poison_of(edge.dtype)).all()


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "sizes, layout, dtype",
    [
        # Tiles end with K and D. All sizes compile every kernel: one is enough for the quick subset.
        pytest.param((4, 8, 9, 64), LAYOUTS[0], F32, marks=pytest.mark.kernels_ci),
        *(((4, 8, 9, 64), layout, F32) for layout in LAYOUTS[1:]),
        *itertools.product([(3, 5, 9, 33), (20, 17, 40, 3), (2, 1, 70, 127)], LAYOUTS, [F32]),
        # The gradient of a bfloat16 weight passes through float16 scratch, scaled row by row.
        *itertools.product([(4, 8, 9, 64), (3, 5, 9, 33)], LAYOUTS[:1], [BF16]),
    ],
    ids=str,
)
def test_only_what_was_written_is_read_and_nothing_else_is_written(flex, device, guarded, kind, sizes, layout, dtype):
    problem = make_problem(*sizes, device=device, dtypes=dtype, pattern="one_hot_feature")
    problem = Problem(*(laid_out(tensor, layout) for tensor in problem))
    guarded.clear()
    result = run(triton_loss(flex, kind), problem)
    assert_nothing_else_was_written(guarded)
    assert all(value.isfinite().all() for value in result)
    if dtype == F32 or not INTERPRETED:  # which truncates to bfloat16
        assert_right(kind, problem, result)


@pytest.mark.parametrize("lengths", [(3, 0, 600, 5), (0, 0), (256, 300)], ids=str)
@pytest.mark.parametrize("spare", [0, 300])
def test_the_decode_reads_and_writes_its_own(flex, device, guarded, lengths, spare):
    P = sum(lengths) + spare
    indices = torch.arange(P, device=device) % 9
    indices[sum(lengths) :] = torch.iinfo(indices.dtype).min
    weight, bias = torch.ones(9, 33, device=device), torch.ones(33, device=device)
    vals = torch.full((P,), float("nan"), device=device)
    vals[: sum(lengths)] = 1
    leaves = [tensor.requires_grad_() for tensor in (weight, vals, bias)]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    guarded.clear()
    recon = flex.triton_sae_decode(indices, weight, vals, bias, offsets=offsets)
    gradients = torch.autograd.grad(recon, leaves, torch.full_like(recon, 1.0))
    if P:
        assert_nothing_else_was_written(guarded)
    assert torch.equal(recon[:, 0], torch.tensor(lengths, device=device) + 1.0)
    assert gradients[0].sum() == 33 * sum(lengths)
    assert gradients[1].tolist() == [33] * sum(lengths) + [0] * spare


@pytest.mark.parametrize("ends", [[0, 3, 17], [5], [[1, 2], [9, 1], [0, 99]], [[0, 0], [17, 17], [3, 5]]], ids=str)
def test_nested_losses_read_and_write_their_own(flex, device, guarded, ends):
    problem = make_problem(3, 17, 9, 33, device=device)
    ends = torch.tensor(ends, device=device)
    guarded.clear()
    result = run(lambda *inputs: flex.triton_nested_sae_loss(*inputs, ends).sum(), problem)
    assert_nothing_else_was_written(guarded)
    right = ends.diff(dim=-1).ge(0).all() and ends.max() <= 17
    assert all(value.isfinite().all() for value in result) == right


@needs_cuda
@pytest.mark.parametrize("pattern", ["uniform", "one_hot_feature"])
def test_recycled_memory_full_of_nan_does_not_show(flex, kind, pattern):
    problem = make_problem(512, 32, 4096, 512, device="cuda", pattern=pattern)
    torch.cuda.empty_cache()
    # Blocks of three sizes, all freed at once: the caching allocator hands them, uncleared, to the launches below.
    sizes = [2**8] * 500 + [2**16] * 100 + [2**26] * 4
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in sizes]
    del blocks
    assert_right(kind, problem, run(triton_loss(flex, kind), problem))


# Neighbours of the weight, far off in both directions, and beyond what 32 bits hold.
OUT_OF_RANGE = [-1, 9, -(2**31), 2**31 - 1, 2**31, 2**32 + 3, 2**40, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("pick", [triton_loss, reference_loss])
@pytest.mark.parametrize("index", OUT_OF_RANGE)
# Tiles end beyond K and D, and with them.
@pytest.mark.parametrize("K, D", [(5, 33), pytest.param(8, 64, marks=pytest.mark.kernels_ci)])
def test_an_index_out_of_range_makes_the_loss_and_its_sample_nan(flex, device, kind, pick, index, K, D):
    for index_dtype in (torch.int32, torch.int64):
        if not torch.iinfo(index_dtype).min <= index <= torch.iinfo(index_dtype).max:
            continue
        right = make_problem(4, K, 9, D, device=device, index_dtype=index_dtype)
        wrong = right._replace(indices=right.indices.clone())
        wrong.indices[1, 3] = index
        assert_only_sample_1_is_spoilt(kind, right, run(pick(flex, kind), wrong))


@modes
@pytest.mark.parametrize("K, D", [(17, 33), (16, 64)])
def test_a_batch_of_nothing_but_bad_indices_touches_nothing(flex, device, kind, deterministic, K, D):
    problem = make_problem(20, K, 9, D, device=device)
    bad = torch.tensor(OUT_OF_RANGE, device=device).repeat(38)[: 20 * K].view(20, K)
    with deterministic_algorithms(deterministic):
        result = run(triton_loss(flex, kind), problem._replace(indices=bad))
    assert result.loss.isnan()
    assert result.vals.isnan().all()
    if device == "cuda":
        torch.cuda.synchronize()  # an illegal access would surface here


@pytest.mark.parametrize("name", Problem._fields[1:])
def test_nan_inputs_are_not_swallowed(flex, device, kind, name):
    problem = make_problem(3, 5, 9, 33, device=device, pattern="all_same")
    getattr(problem, name).view(-1)[-1] = float("nan")
    assert triton_loss(flex, kind)(*problem).isnan()
