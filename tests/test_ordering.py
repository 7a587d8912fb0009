"""The pairs ordered by feature."""

import pytest
import torch
from support import make_indices, submodule

# The sort takes int16 keys up to 2**16 features, int32 keys beyond.
DICTIONARIES = [1, 9, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1, 2**16, 2**16 + 1]
B, K = 30, 30  # four programs, the last one not full


@pytest.mark.parametrize("F", DICTIONARIES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("vals_dtype, dtype", [(torch.float16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_pairs_are_ordered_by_feature_then_place(flex, device, F, index_dtype, vals_dtype, dtype):
    generator = torch.Generator(device).manual_seed(0)
    indices = make_indices("one_hot_feature", B, K, F, generator).to(index_dtype)
    indices[0, :2] = torch.tensor([0, F - 1])
    vals = torch.randn(B, K, generator=generator, device=device, dtype=vals_dtype)
    order_pairs = submodule(flex, "ordering").order_pairs
    pairs, with_slots = order_pairs(indices, vals, F, dtype), order_pairs(indices, vals, F, dtype, with_slots=True)
    features, order = indices.long().view(-1).sort(stable=True)
    counts = features.bincount(minlength=F)
    segments = torch.stack([counts.cumsum(0) - counts, counts.cumsum(0)], dim=1)
    assert torch.equal(pairs.order, order)
    assert torch.equal(pairs.features.long(), features)
    assert torch.equal(pairs.samples.long(), order // K)
    assert torch.equal(with_slots.slots.long().view(-1), order.argsort())
    assert pairs.slots is None and with_slots.samples is None
    assert torch.equal(pairs.segments.long(), torch.where(counts[:, None] > 0, segments, 0))
    assert pairs.coefs.dtype == dtype
    assert torch.equal(pairs.coefs, vals.view(-1)[order].to(dtype))


@pytest.mark.parametrize("F", DICTIONARIES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_an_index_out_of_range_is_ordered_with_a_feature_in_range(flex, device, F, index_dtype):
    generator = torch.Generator(device).manual_seed(0)
    indices = make_indices("uniform", B, K, F, generator).to(index_dtype)
    bounds = torch.iinfo(index_dtype)
    bad = torch.tensor([-1, F, F + 5, 2**15, 2**16, 2**17 + 3, bounds.min, bounds.min + 2**15, bounds.max, -(2**16)])
    bad = bad[(bad < 0) | (bad >= F)].to(device, index_dtype)
    indices.view(-1)[: 3 * len(bad)] = bad.repeat(3)
    pairs = submodule(flex, "ordering").order_pairs(indices, torch.zeros(B, K, device=device), F, torch.float32)
    # Every pair is in exactly one segment, and one in range is in that of its feature.
    assert torch.equal(pairs.order.sort().values, torch.arange(B * K, device=device))
    starts, ends = pairs.segments.long().unbind(1)
    counts = ends - starts
    features = torch.arange(F, device=device).repeat_interleave(counts)
    assert torch.equal(features, pairs.features.long())
    assert torch.equal(starts[counts > 0], (counts.cumsum(0) - counts)[counts > 0])
    chosen = indices.view(-1)[pairs.order].long()
    in_range = (chosen >= 0) & (chosen < F)
    assert torch.equal(chosen[in_range], features[in_range])
