"""Copies of the rows that heavy features add to, in the atomic gradient of the hierarchical loss."""

import math

import pytest
import torch
from support import (
    PATTERNS,
    assert_right,
    budget,
    make_problem,
    needs_cuda,
    relative_error,
    run,
    submodule,
)
from truth import truth

COPIES = 2048  # at most


@pytest.fixture
def copies(flex, monkeypatch):
    """The module, with a copy for every two pairs of a feature."""
    module = submodule(flex, "copies")
    monkeypatch.setattr(module, "_COPY_PAIRS", 2)
    return module


def counted(counts, device):
    """A plan as the forward pass leaves it to `plan_copies`."""
    zeros = torch.zeros(1 + COPIES, dtype=torch.int32)
    return torch.cat([torch.tensor(counts, dtype=torch.int32), zeros]).to(device)


@pytest.mark.parametrize(
    "counts", [[7, 0, 4, 3, 130, 1, 16, 5], [0, 1, 3, 4, 1, 0], [64, 0, 1] * 500, [4 * COPIES]], ids=len
)
def test_a_plan_gives_heavy_features_copies_of_their_own(copies, device, counts):
    F, B = len(counts), sum(counts)
    plan = counted(counts, device)
    copies.plan_copies(plan, B, 1)
    pairs_of_a_copy = max(2, math.ceil(B / COPIES))
    planned, (total, *owners) = plan[:F].tolist(), plan[F:].tolist()
    assert 2 <= total <= COPIES  # some feature is heavy
    taken = []
    for feature, (count, plan_of_feature) in enumerate(zip(counts, planned, strict=True)):
        shares = count // pairs_of_a_copy
        if shares < 2:
            assert plan_of_feature == 0
            continue
        first, number = plan_of_feature >> 11, (plan_of_feature & 2047) + 1
        assert number == 2 ** int(math.log2(shares))
        assert owners[first] == feature + 1
        taken += range(first, first + number)
        owners[first] = 0
    assert sorted(taken) == list(range(total))  # none is shared, none is left out
    assert not any(owners)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(9, 17, 12, 5), (40, 3, 7, 130), (8, 1, 2, 64)], ids=str)
def test_gradients_are_right_where_most_features_are_heavy(flex, device, copies, monkeypatch, sizes, dtype, pattern):
    problem = make_problem(*sizes, device=device, dtypes=dtype, pattern=pattern)
    sums = []

    F = sizes[2]

    def spy(rows, plan, sum_copies=copies.sum_copies):
        sums.append((rows.clone(), plan[:F] > 0, plan[F].item()))
        return sum_copies(rows, plan)

    monkeypatch.setattr(submodule(flex, "hierarchical_kernels"), "sum_copies", spy)
    result = run(flex.triton_hierarchical_sae_loss, problem)
    assert_right("hierarchical", problem, result)
    ((rows, is_heavy, total),) = sums
    # What heavy features add went to copies that were planned, and to nothing else.
    assert rows[F : F + total].any()
    assert not rows[F + total :].any()
    assert not rows[:F][is_heavy].any()


BAD = [-1, 9, -(2**31), 2**31, 2**40, -(2**63), 2**63 - 1]


def test_bad_indices_have_no_copies(flex, device, copies):
    problem = make_problem(20, 14, 9, 33, device=device)
    bad = torch.tensor(BAD, device=device).repeat(40).view(20, 14)
    *_, plan, _ = flex._ops.ops.hierarchical_forward(*problem._replace(indices=bad), True, True, False)
    assert not plan.any()


@pytest.mark.parametrize("index", BAD)
def test_a_bad_index_beside_heavy_features_spoils_its_sample_alone(flex, device, copies, index):
    right = make_problem(20, 17, 9, 33, device=device)
    wrong = right._replace(indices=right.indices.clone())
    wrong.indices[1, 3] = index
    result, expected = run(flex.triton_hierarchical_sae_loss, wrong), truth("hierarchical", right)
    allowed = budget("hierarchical", right, expected)
    assert result.loss.isnan()
    assert result.vals[1].isnan().all()
    untouched = [f for f in range(9) if f not in right.indices[1]]
    others = [b for b in range(20) if b != 1]
    assert untouched
    for name, kept in (("vals", others), ("weight", untouched)):
        value, true, tolerance = (getattr(r, name)[kept] for r in (result, expected, allowed))
        assert ((value.double() - true).abs() <= tolerance).all(), name


def test_small_batches_need_no_copies(flex, device):
    module = submodule(flex, "copies")
    weight = torch.zeros(3, 5, device=device)
    for B, K in ((511, 1), (511, 64), (2048, 2048)):
        assert module.new_rows(weight, B, K).shape == weight.shape
        plan = counted([B, 0, 0], device)
        module.plan_copies(plan, B, K)
        assert not plan[3:].any()


@needs_cuda
@pytest.mark.parametrize("pattern", ["one_hot_feature", "all_same"])
def test_heavy_features_of_a_real_batch(flex, pattern):
    problem = make_problem(4096, 32, 65536, 768, device="cuda", pattern=pattern)
    result, expected = run(flex.triton_hierarchical_sae_loss, problem), truth("hierarchical", problem)
    for name in ("loss", "weight", "vals"):
        assert relative_error(getattr(result, name), getattr(expected, name)) <= 5e-6
