"""examples/trainers/pairs.py: dense codes as the ragged pairs of `triton_sae_decode`."""

import pytest
import torch
from pairs import nested_pairs, ragged_pairs

# Rows of no, one, all and some nonzeros, the last row empty again; small integers, whose sums are exact.
CODES = [[0, 0, 0, 0], [0, 3, 0, 0], [1, -2, 3, 4], [0, 0, 5, 1], [0, 0, 0, 0]]
NONZEROS = 7


@pytest.fixture
def codes(device):
    return torch.tensor(CODES, dtype=torch.float32, device=device, requires_grad=True)


@pytest.mark.parametrize("room", [0, 1, 9])
def test_pairs_are_the_nonzeros_row_by_row(codes, room):
    indices, vals, offsets = ragged_pairs(codes, NONZEROS + room)
    assert len(indices) == len(vals) == NONZEROS + room
    assert offsets.tolist() == [0, 0, 1, 5, 7, 7]
    assert indices[:NONZEROS].tolist() == [1, 0, 1, 2, 3, 2, 3]
    assert vals[:NONZEROS].tolist() == [3, 1, -2, 3, 4, 5, 1]


# Spare room points somewhere: at an element that is zero, and, in the last rows alone, at one that is not.
@pytest.mark.parametrize("rows", [slice(None), slice(2, None)], ids=["first_is_zero", "first_is_not"])
@pytest.mark.parametrize("room", [0, 9])
def test_the_decode_and_its_gradients_are_those_of_the_dense_product(flex, codes, room, rows):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (4, 3), generator=generator).to(codes).requires_grad_()
    grad = torch.randint(-3, 4, (len(CODES), 3), generator=generator).to(codes)[rows]
    P = int((codes[rows] != 0).sum()) + room
    indices, vals, offsets = ragged_pairs(codes[rows], P)
    recon = flex.triton_sae_decode(indices, weight, vals, offsets=offsets)
    dense = codes[rows] @ weight
    assert torch.equal(recon, dense)
    codes_grad, weight_grad = torch.autograd.grad(recon, (codes, weight), grad)
    dense_codes_grad, dense_weight_grad = torch.autograd.grad(dense, (codes, weight), grad)
    assert torch.equal(codes_grad, dense_codes_grad.where(codes != 0, 0))
    assert torch.equal(weight_grad, dense_weight_grad)


def test_too_many_nonzeros_do_not_go_unnoticed(codes):
    assert ragged_pairs(codes, NONZEROS - 1)[1].isnan().all()


def test_nothing_waits_for_the_gpu(codes):
    if not codes.is_cuda:
        pytest.skip("needs a CUDA device")
    ragged_pairs(codes, 9)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, vals, _ = ragged_pairs(codes, 9)
        vals.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nested_pairs_have_all_nonzeros_in_order_of_features_and_count_those_of_each_level(codes, device):
    indices, vals, ends = nested_pairs(codes, 4, torch.tensor([1, 2, 4], device=device))
    assert indices.tolist() == [[0, 1, 2, 3]] * len(CODES)
    assert vals.tolist() == CODES
    assert ends.tolist() == [[1, 2, 4]] * len(CODES)
    rows = [0, 1, 3, 4]  # two nonzeros at most
    indices, vals, ends = nested_pairs(codes[rows], 2, torch.tensor([1, 2, 4], device=device))
    assert (indices[:, 0] < indices[:, 1]).all()
    assert torch.equal(torch.zeros_like(codes[rows]).scatter(1, indices, vals), codes[rows])
    for level, width in enumerate([1, 2, 4]):
        assert torch.equal(ends[:, level], (indices < width).sum(1))


def test_more_nonzeros_than_nested_pairs_has_room_for_are_nan_in_their_row_alone(codes, device):
    _, vals, _ = nested_pairs(codes, 3, torch.tensor([4], device=device))
    assert vals.isnan().all(1).tolist() == [False, False, True, False, False]
    assert not vals[[0, 1, 3, 4]].isnan().any()
