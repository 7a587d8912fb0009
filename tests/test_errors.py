"""Every mistake in the arguments is named before anything is launched."""

import re

import pytest
import torch
from support import make_problem

pytestmark = pytest.mark.kernels_ci


@pytest.fixture(params=["triton_topk", "triton_hierarchical", "topk", "hierarchical"])
def loss(request, flex):
    """The fused losses and the references: one signature, one set of errors."""
    return getattr(flex, f"{request.param}_sae_loss")


def zeros(*shape, dtype=torch.float32):
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


FLOATS = "float16, bfloat16, float32 or float64"
SIZES = "B < 2**31, K <= 2**31 - 2**16 and B * (K + 1) <= 2**32 - 2**22"
MISTAKES = [
    ("indices", zeros(4, dtype=torch.int64), ValueError, "indices must have shape [B, K], got (4,)"),
    ("indices", zeros(4, 3, 1, dtype=torch.int64), ValueError, "indices must have shape [B, K], got (4, 3, 1)"),
    ("weight", zeros(9), ValueError, "weight must have shape [F, D], got (9,)"),
    ("weight", zeros(1, 9, 33), ValueError, "weight must have shape [F, D], got (1, 9, 33)"),
    ("weight", zeros(0, 33), ValueError, "weight must have shape [F, D] with F >= 1 and D >= 1, got (0, 33)"),
    ("weight", zeros(9, 0), ValueError, "weight must have shape [F, D] with F >= 1 and D >= 1, got (9, 0)"),
    ("weight", lambda device: torch.zeros(1, 1, device=device).expand(2**31, 33), ValueError,
     "weight must have shape [F, D] with F <= 2**31 - 2**16 and D <= 2**20, got (2147483648, 33)"),
    ("weight", lambda device: torch.zeros(1, 1, device=device).expand(2**31 - 2**16 + 1, 33), ValueError,
     "weight must have shape [F, D] with F <= 2**31 - 2**16 and D <= 2**20, got (2147418113, 33)"),
    ("weight", lambda device: torch.zeros(1, 1, device=device).expand(9, 2**20 + 1), ValueError,
     "weight must have shape [F, D] with F <= 2**31 - 2**16 and D <= 2**20, got (9, 1048577)"),
    ("indices", lambda device: torch.zeros(1, 1, dtype=torch.int64, device=device).expand(2**31, 1), ValueError,
     f"indices must have shape [B, K] with {SIZES}, got (2147483648, 1)"),
    ("indices", lambda device: torch.zeros(1, 1, dtype=torch.int64, device=device).expand(2**22, 1024), ValueError,
     f"indices must have shape [B, K] with {SIZES}, got (4194304, 1024)"),
    ("indices", lambda device: torch.zeros(1, 1, dtype=torch.int64, device=device).expand(1, 2**31 - 2**16 + 1),
     ValueError, f"indices must have shape [B, K] with {SIZES}, got (1, 2147418113)"),
    ("weight", zeros(33, 9), ValueError,
     "weight must have shape [F, D], got (33, 9), which is [D, F] for these bias and target"),
    ("vals", zeros(4, 6), ValueError, "vals must have shape [B, K] = (4, 3), got (4, 6)"),
    ("vals", zeros(3, 4), ValueError, "vals must have shape [B, K] = (4, 3), got (3, 4)"),
    ("vals", zeros(4), ValueError, "vals must have shape [B, K] = (4, 3), got (4,)"),
    ("bias", zeros(34), ValueError, "bias must have shape [D] = (33,), got (34,)"),
    ("bias", zeros(1, 33), ValueError, "bias must have shape [D] = (33,), got (1, 33)"),
    ("target", zeros(5, 33), ValueError, "target must have shape [B, D] = (4, 33), got (5, 33)"),
    ("target", zeros(33), ValueError, "target must have shape [B, D] = (4, 33), got (33,)"),
    ("indices", zeros(4, 3), TypeError, "indices must be int32 or int64, got torch.float32"),
    ("indices", zeros(4, 3, dtype=torch.int16), TypeError, "indices must be int32 or int64, got torch.int16"),
    ("indices", zeros(4, 3, dtype=torch.bool), TypeError, "indices must be int32 or int64, got torch.bool"),
    *[
        (name, zeros(*shape, dtype=dtype), TypeError, f"{name} must be {FLOATS}, got {dtype}")
        for name, shape in (("weight", (9, 33)), ("vals", (4, 3)), ("bias", (33,)), ("target", (4, 33)))
        for dtype in (torch.int64, torch.complex64)
    ],
    *[
        (name, lambda device: [[0.0]], TypeError, f"{name} must be a torch.Tensor, got list")
        for name in ("indices", "weight", "vals", "bias", "target")
    ],
    ("weight", lambda device: torch.zeros(9, 33, device=device).to_sparse(), TypeError,
     "weight must be dense (torch.strided), got torch.sparse_coo"),
    ("target", lambda device: torch.zeros(4, 33, device=device).to_sparse_csr(), TypeError,
     "target must be dense (torch.strided), got torch.sparse_csr"),
    ("vals", lambda device: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], device=device), TypeError,
     "vals must be dense (torch.strided), got a nested tensor"),
    ("bias", lambda device: None, TypeError, "bias must be a torch.Tensor, got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize("name, wrong, error, message", MISTAKES, ids=[mistake[-1] for mistake in MISTAKES])
def test_a_mistake_is_named(loss, device, name, wrong, error, message):
    problem = make_problem(4, 3, 9, 33, device=device)._replace(**{name: wrong(device)})
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        loss(*problem)


# As many programs as 32 bits do not hold: Triton launches none, without an error.
@pytest.mark.parametrize(
    "B, F, D, message",
    [
        (2**30, 9, 33, "target must have shape [B, D] with B * (D + 31) < 2**36, got (1073741824, 33)"),
        (2**17, 9, 2**19, "target must have shape [B, D] with B * (D + 31) < 2**36, got (131072, 524288)"),
        (4, 2**30, 257, "weight must have shape [F, D] with (F + 2**16) * (D + 255) <= 2**39, got (1073741824, 257)"),
    ],
)
def test_a_size_that_is_too_large_with_another_is_named(loss, device, B, F, D, message):
    number = torch.zeros((), device=device)
    shapes = {"weight": (F, D), "vals": (B, 1), "bias": (D,), "target": (B, D)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loss(indices=number.long().expand(B, 1), **{name: number.expand(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("name", ["indices", "vals", "bias", "target"])
def test_tensors_of_two_devices_are_named(loss, device, name):
    problem = make_problem(4, 3, 9, 33, device=device)
    problem = problem._replace(**{name: getattr(problem, name).to("meta")})
    message = f"{name} must be on the device of weight, {problem.weight.device}, got meta"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loss(*problem)


def test_the_number_of_arguments_is_fixed(loss, device):
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'target'"):
        loss(*make_problem(4, 3, 9, 33, device=device)[:-1])


@pytest.mark.parametrize("index", [-1, 9, 2**31 - 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_the_first_index_out_of_range_is_named_on_request(loss, device, monkeypatch, index, index_dtype):
    monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "1")
    problem = make_problem(4, 3, 9, 33, device=device, index_dtype=index_dtype)
    loss(*problem)
    problem.indices[3, 0] = -7
    problem.indices[2, 1] = index
    message = f"indices must lie in [0, F) = [0, 9), got {index} at [2, 1]"
    with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
        loss(*problem)


def test_indices_are_not_looked_at_unless_requested(loss, device, monkeypatch):
    monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "0")
    problem = make_problem(4, 3, 9, 33, device=device)
    problem.indices[2, 1] = 9
    assert loss(*problem).isnan()
