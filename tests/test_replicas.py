"""Replicas of the rows that heavy features add to, in the atomic gradient of the hierarchical loss."""

import math

import pytest
import torch
from support import PATTERNS, assert_only_sample_1_is_spoilt, assert_right, make_problem, run, submodule

MAX_REPLICAS = 2048


@pytest.fixture
def replicas(flex, monkeypatch):
    """The module, with a replica for every two pairs of a feature."""
    module = submodule(flex, "replicas")
    monkeypatch.setattr(module, "_PAIRS", 2)
    return module


@pytest.mark.parametrize(
    "counts", [[7, 0, 4, 3, 130, 1, 16, 5], [0, 1, 3, 4, 1, 0], [64, 0, 1] * 500, [4 * MAX_REPLICAS]], ids=len
)
def test_heavy_features_get_replicas_of_their_own(replicas, device, counts):
    F, B = len(counts), sum(counts)
    made = replicas.Replicas(torch.tensor(counts, dtype=torch.int32, device=device), B, 1, 3, torch.float32)
    entries, (total, *owners) = made.table[:F].tolist(), made.table[F:].tolist()
    pairs_of_a_replica = max(2, math.ceil(B / MAX_REPLICAS))
    assert 2 <= total <= min(MAX_REPLICAS, len(made.rows) - F)  # some feature is heavy
    taken = []
    for feature, (count, entry) in enumerate(zip(counts, entries, strict=True)):
        shares = count // pairs_of_a_replica
        if shares < 2:
            assert entry == 0
            continue
        first, number = entry >> 11, (entry & 2047) + 1
        assert number == 2 ** int(math.log2(shares))
        assert owners[first] == feature + 1
        taken += range(first, first + number)
        owners[first] = 0
    assert sorted(taken) == list(range(total))  # none is shared, none is left out
    assert not any(owners)

    # Small integers add up exactly: each heavy feature's row becomes the sum of its replicas.
    made.rows[F : F + total] = torch.arange(total, dtype=torch.float32, device=device)[:, None] % 7
    sums = made.sum()
    assert sums.shape == (F, 3)
    for feature, entry in enumerate(entries):
        first, number = entry >> 11, (entry & 2047) + 1 if entry else 0
        assert sums[feature].tolist() == [sum(r % 7 for r in range(first, first + number))] * 3


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(9, 17, 12, 3), (40, 3, 7, 127), (8, 1, 2, 64)], ids=str)
def test_gradients_are_right_where_most_features_are_heavy(flex, device, replicas, sizes, dtype, pattern):
    problem = make_problem(*sizes, device=device, dtypes=dtype, pattern=pattern)
    assert_right("hierarchical", problem, run(flex.triton_hierarchical_sae_loss, problem))


BAD = [-1, 9, -(2**31), 2**31, 2**40, -(2**63), 2**63 - 1]


def test_bad_indices_are_not_counted(flex, device):
    problem = make_problem(20, 14, 9, 33, device=device)
    bad = torch.tensor(BAD, device=device).repeat(40).view(20, 14)
    *_, counts, _ = flex._ops.ops.hierarchical_forward(*problem._replace(indices=bad), None, True, True, False)
    assert counts.tolist() == [0] * 9
    *_, counts, _ = flex._ops.ops.hierarchical_forward(*problem, None, True, True, False)
    assert torch.equal(counts.long(), problem.indices.flatten().bincount(minlength=9))


@pytest.mark.parametrize("index", BAD)
def test_a_bad_index_among_heavy_features_spoils_its_sample_alone(flex, device, replicas, index):
    right = make_problem(20, 17, 9, 33, device=device)
    wrong = right._replace(indices=right.indices.clone())
    wrong.indices[1, 3] = index
    untouched = [f for f in range(9) if f not in right.indices[1]]
    assert untouched
    result = run(flex.triton_hierarchical_sae_loss, wrong)
    assert_only_sample_1_is_spoilt("hierarchical", right, result, untouched)


def test_small_batches_need_no_replicas(flex, device):
    for B, K in ((127, 1), (1, 127), (255, 1)):
        counts = torch.tensor([B * K, 0, 0], dtype=torch.int32, device=device)
        assert not submodule(flex, "replicas").Replicas(counts, B, K, 5, torch.float32).table.any()
