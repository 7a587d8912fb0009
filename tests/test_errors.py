"""Every mistake in the arguments is named before anything is launched."""

import contextlib
import re
import warnings

import pytest
import torch
from support import make_problem, submodule

pytestmark = pytest.mark.kernels_ci


@pytest.fixture(params=["triton_topk", "triton_hierarchical", "topk", "hierarchical"])
def loss(request, flex):
    """The fused losses and the references: one signature, one set of errors."""
    return getattr(flex, f"{request.param}_sae_loss")


def zeros(*shape, dtype=torch.float32):
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


SHAPES = {"indices": (4, 3), "weight": (9, 33), "vals": (4, 3), "bias": (33,), "target": (4, 33)}
NAMES = tuple(SHAPES)
FLATTEN = "flatten leading dimensions"
WRONG_SHAPES = [
    ("indices", (4,), "[B, K], got (4,)"),
    ("indices", (4, 3, 1), f"[B, K], got (4, 3, 1): {FLATTEN}"),
    ("weight", (9,), "[F, D], got (9,)"),
    ("weight", (1, 9, 33), "[F, D], got (1, 9, 33)"),
    ("weight", (0, 33), "[F, D] with F >= 1 and D >= 1, got (0, 33)"),
    ("weight", (9, 0), "[F, D] with F >= 1 and D >= 1, got (9, 0)"),
    ("weight", (33, 9), "[F, D], got (33, 9), which is [D, F] for these bias and target: pass weight.t()"),
    ("vals", (4, 6), "[B, K] = (4, 3), got (4, 6)"),
    ("vals", (1, 4, 3), f"[B, K] = (4, 3), got (1, 4, 3): {FLATTEN}"),
    ("bias", (34,), "[D] = (33,), got (34,)"),
    ("bias", (1, 33), "[D] = (33,), got (1, 33)"),
    ("target", (5, 33), "[B, D] = (4, 33), got (5, 33)"),
    ("target", (33,), "[B, D] = (4, 33), got (33,)"),
    ("target", (2, 2, 33), f"[B, D] = (4, 33), got (2, 2, 33): {FLATTEN}"),
]
DENSE = "must be dense (torch.strided), got"
MISTAKES = [
    *((name, zeros(*shape, dtype=torch.int64 if name == "indices" else torch.float32), ValueError,
       f"{name} must have shape {message}") for name, shape, message in WRONG_SHAPES),
    *(("indices", zeros(4, 3, dtype=dtype), TypeError, f"indices must be int32 or int64, got {dtype}")
      for dtype in (torch.float32, torch.int16, torch.bool)),
    *((name, zeros(*SHAPES[name], dtype=dtype), TypeError,
       f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")
      for name in NAMES[1:] for dtype in (torch.int64, torch.complex64)),
    *((name, lambda device: [[0.0]], TypeError, f"{name} must be a torch.Tensor, got list") for name in NAMES),
    ("bias", lambda device: None, TypeError, "bias must be a torch.Tensor, got NoneType"),
    ("weight", lambda device: torch.nn.Linear(9, 33, device=device), TypeError,
     "weight must be a torch.Tensor, got Linear; pass its .weight.t()"),
    ("weight", lambda device: torch.zeros(9, 33, device=device).to_sparse(), TypeError,
     f"weight {DENSE} torch.sparse_coo"),
    ("vals", lambda device: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], device=device), TypeError,
     f"vals {DENSE} a nested tensor"),
]  # fmt: skip


@pytest.mark.parametrize("name, wrong, error, message", MISTAKES, ids=[mistake[-1] for mistake in MISTAKES])
def test_a_mistake_is_named(loss, device, name, wrong, error, message):
    problem = make_problem(4, 3, 9, 33, device=device)._replace(**{name: wrong(device)})
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        loss(*problem)


# Triton silently launches nothing where a grid has more programs than 32 bits hold.
@pytest.mark.parametrize(
    "B, K, F, D",
    [
        (2**22, 1024, 9, 33),  # B * K
        (2**31 - 2**21 + 1, 1, 9, 32),
        (2**30, 1, 9, 33),  # B * ceil(D / 32)
        (4, 1, 2**30, 33),  # F * ceil(D / 32)
        (4, 1, 2**31 - 2**21 + 1, 32),
        (4, 1, 9, 2**20 + 1),
    ],
)
def test_sizes_that_are_too_large_are_named(loss, device, B, K, F, D):
    number = torch.zeros((), device=device)
    shapes = {"weight": (F, D), "vals": (B, K), "bias": (D,), "target": (B, D)}
    message = (
        "sizes must satisfy B * K, B * ceil(D / 32), F * ceil(D / 32) <= 2**31 - 2**21 and D <= 2**20, "
        f"got B={B}, K={K}, F={F}, D={D}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loss(indices=number.long().expand(B, K), **{name: number.expand(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("B, K, F, D", [(1, 2**31 - 2**21, 9, 1), (2**31 - 2**21, 1, 9, 32), (4, 1, 9, 2**20)])
def test_the_largest_sizes_pass_the_check(flex, B, K, F, D):
    number = torch.zeros((), device="meta")
    shapes = ((F, D), (B, K), (D,), (B, D))
    submodule(flex, "checks").check_inputs(number.long().expand(B, K), *map(number.expand, shapes))


@pytest.mark.parametrize("name", ["indices", "vals", "bias", "target"])
def test_tensors_of_two_devices_are_named(loss, device, name):
    problem = make_problem(4, 3, 9, 33, device=device)
    problem = problem._replace(**{name: getattr(problem, name).to("meta")})
    message = f"{name} must be on the device of weight, {problem.weight.device}, got meta"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loss(*problem)


def sorted_problem(device, index_dtype=torch.int64):
    problem = make_problem(4, 3, 9, 33, device=device, index_dtype=index_dtype)
    return problem._replace(vals=problem.vals.sort(dim=1, descending=True).values)


@pytest.mark.parametrize("index", [-1, 9, 2**31 - 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_the_first_index_out_of_range_is_named_on_request(loss, device, monkeypatch, index, index_dtype):
    monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "1")
    problem = sorted_problem(device, index_dtype)
    loss(*problem)
    problem.indices[3, 0] = -7
    problem.indices[2, 1] = index
    message = f"indices must lie in [0, F) = [0, 9), got {index} at [2, 1]"
    with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
        loss(*problem)


@pytest.mark.parametrize("value", ["1", "true", "True", "YES", "0", "", "false", "no", None])
def test_the_check_is_on_where_the_environment_says_so(loss, device, monkeypatch, value):
    monkeypatch.delenv("FLEX_SAE_CHECK_INDICES", raising=False)
    if value is not None:
        monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", value)
    problem = sorted_problem(device)
    problem.indices[2, 1] = 9
    with pytest.raises(IndexError) if value in ("1", "true", "True", "YES") else contextlib.nullcontext():
        assert loss(*problem).isnan()


# The order of a sample's features means something to the hierarchical losses alone.
def test_vals_that_do_not_descend_are_warned_of_on_request(loss, device, monkeypatch):
    monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "0")
    problem = sorted_problem(device)
    ascending = problem._replace(vals=problem.vals.flip(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # the interpreter's own
        warnings.filterwarnings("always", "vals do not descend")
        loss(*ascending)
        monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "1")
        loss(*problem)
        assert not caught
        loss(*ascending)
    if "hierarchical" in loss.__name__:
        (warning,) = caught
        assert warning.filename == __file__  # the line that called the loss
    else:
        assert not caught
