"""Every mistake in the arguments is named before anything is launched."""

import contextlib
import re
import warnings
from functools import partial

import pytest
import torch
from support import make_encoder_problem, make_problem, submodule

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


WEIGHT_MISTAKES = [
    (zeros(4, 1), ValueError, "sample_weight must have shape [B] = (4,), got (4, 1)"),
    (zeros(33), ValueError, "sample_weight must have shape [B] = (4,), got (33,)"),
    (zeros(4, dtype=torch.bool), TypeError,
     "sample_weight must be float16, bfloat16, float32 or float64, got torch.bool"),
    (lambda device: 1.0, TypeError, "sample_weight must be a torch.Tensor, got float"),
    (lambda device: torch.zeros(4, device=device, requires_grad=True), ValueError,
     "sample_weight must not require a gradient, for it gets none: detach it"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, error, message", WEIGHT_MISTAKES, ids=[m[-1] for m in WEIGHT_MISTAKES])
def test_a_mistake_in_sample_weight_is_named(loss, device, wrong, error, message):
    problem = make_problem(4, 3, 9, 33, device=device)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        loss(*problem, sample_weight=wrong(device))


# The encoders


@pytest.fixture(params=["triton_topk", "topk", "triton_sparse", "sparse", "triton_ragged", "ragged"])
def encode(request, flex):
    """The encoders and their references as functions of the same named arguments, of which each takes its own."""
    if "topk" in request.param:
        names = ("x", "weight", "bias", "k")
    else:
        names = ("x", "weight", "bias", "indices", *(("offsets",) if "ragged" in request.param else ()))
    function = getattr(flex, f"{request.param.replace('ragged', 'sparse')}_encode")

    def call(**arguments):
        return function(**{name: arguments[name] for name in names})

    call.names = names
    return call


def encoder_arguments(encode, device):
    """B, K, F, D = 4, 3, 9, 33; of ragged pairs 12."""
    x, weight, bias, indices, _ = make_encoder_problem(4, 3, 9, 33, device=device)
    offsets = torch.arange(0, 13, 3, device=device)
    indices = indices.flatten() if "offsets" in encode.names else indices
    return {"x": x, "weight": weight, "bias": bias, "k": 3, "indices": indices, "offsets": offsets}


ENCODER_SHAPES = {"x": (4, 33), "weight": (9, 33), "bias": (9,)}
ENCODER_MISTAKES = [
    *((name, zeros(*shape), ValueError, f"{name} must have shape {message}") for name, shape, message in [
        ("weight", (9,), "[F, D] with F >= 1 and D >= 1, got (9,)"),
        ("weight", (0, 33), "[F, D] with F >= 1 and D >= 1, got (0, 33)"),
        ("weight", (9, 0), "[F, D] with F >= 1 and D >= 1, got (9, 0)"),
        ("x", (33,), "[B, D] = (B, 33), got (33,)"),
        ("x", (4, 32), "[B, D] = (B, 33), got (4, 32)"),
        ("x", (2, 2, 33), f"[B, D] = (B, 33), got (2, 2, 33): {FLATTEN}"),
        ("bias", (33,), "[F] = (9,), got (33,)"),
        ("bias", (1, 9), "[F] = (9,), got (1, 9)"),
    ]),
    # The weight of a decoder
    ("weight", zeros(33, 9), ValueError,
     "x must have shape [B, D] = (B, 9), got (4, 33), and weight (33, 9): pass weight.t()"),
    *((name, zeros(*shape, dtype=dtype), TypeError,
       f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")
      for name, shape in ENCODER_SHAPES.items() for dtype in (torch.int64, torch.complex64)),
    *((name, lambda device: [[0.0]], TypeError, f"{name} must be a torch.Tensor, got list")
      for name in (*ENCODER_SHAPES, "indices", "offsets") ),
    ("x", lambda device: None, TypeError, "x must be a torch.Tensor, got NoneType"),
    ("indices", lambda device: None, TypeError, "indices must be a torch.Tensor, got NoneType"),
    ("weight", lambda device: torch.nn.Linear(33, 9, device=device), TypeError,
     "weight must be a torch.Tensor, got Linear; pass its .weight"),
    ("x", lambda device: torch.zeros(4, 33, device=device).to_sparse(), TypeError, f"x {DENSE} torch.sparse_coo"),
    *(("k", lambda device, k=k: k, TypeError, f"k must be an int, got {type(k).__name__}")
      for k in (3.0, "3", None, True, torch.tensor(3))),
    *(("k", lambda device, k=k: k, ValueError, f"k must be in [1, F] = [1, 9], got {k}") for k in (0, -1, 10)),
    *((name, lambda device, dtype=dtype: torch.zeros(4, 3, device=device, dtype=dtype), TypeError,
       f"{name} must be int32 or int64, got {dtype}")
      for name in ("indices", "offsets") for dtype in (torch.float32, torch.int16, torch.bool)),
    *(("offsets", zeros(*shape, dtype=torch.int32), ValueError,
       f"offsets must have shape [B + 1] = (5,), got {shape}") for shape in ((4,), (6,), (5, 1))),
]  # fmt: skip


@pytest.mark.parametrize("name, wrong, error, message", ENCODER_MISTAKES, ids=[m[-1] for m in ENCODER_MISTAKES])
def test_a_mistake_to_an_encoder_is_named(encode, device, name, wrong, error, message):
    arguments = {**encoder_arguments(encode, device), name: wrong(device)}
    if name not in encode.names:
        encode(**arguments)  # and does not see it
        return
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        encode(**arguments)


@pytest.mark.parametrize(
    "shape, ragged, message",
    [
        ((12,), False, "[B, K] = (4, K), got (12,)"),
        ((5, 3), False, "[B, K] = (4, K), got (5, 3)"),
        ((4, 3, 1), False, f"[B, K] = (4, K), got (4, 3, 1): {FLATTEN}"),
        ((4, 3), True, "[P] where there are offsets, got (4, 3)"),
    ],
)
def test_indices_are_flat_where_there_are_offsets_and_only_there(flex, device, shape, ragged, message):
    x, weight, bias, *_ = make_encoder_problem(4, 3, 9, 33, device=device)
    indices = torch.zeros(shape, dtype=torch.int64, device=device)
    offsets = torch.arange(5, device=device) if ragged else None
    for function in (flex.triton_sparse_encode, flex.sparse_encode):
        with pytest.raises(ValueError, match=f"^{re.escape(f'indices must have shape {message}')}$"):
            function(x, weight, bias, indices, offsets=offsets)


@pytest.mark.parametrize("name", ["x", "bias", "indices", "offsets"])
def test_tensors_of_an_encoder_on_two_devices_are_named(encode, device, name):
    arguments = encoder_arguments(encode, device)
    arguments[name] = arguments[name].to("meta")
    if name not in encode.names:
        encode(**arguments)  # and does not see it
        return
    message = f"{name} must be on the device of weight, {arguments['weight'].device}, got meta"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        encode(**arguments)


@pytest.mark.parametrize(
    "B, K, F, D",
    [
        (2**22, 1024, 2000, 33),  # B * K
        (2**30, 1, 9, 33),  # B * ceil(D / 32)
        (4, 1, 2**30, 33),  # F * ceil(D / 32)
        (4, 1, 9, 2**20 + 1),
    ],
)
def test_sizes_that_are_too_large_for_an_encoder_are_named(flex, device, B, K, F, D):
    number = torch.zeros((), device=device)
    x, weight, bias = number.expand(B, D), number.expand(F, D), number.expand(F)
    rest = "B * ceil(D / 32), F * ceil(D / 32) <= 2**31 - 2**21 and D <= 2**20, got "
    indices, offsets = number.long(), number.long().expand(B + 1)
    for prefix in ("triton_", ""):
        topk, sparse = (getattr(flex, f"{prefix}{name}_encode") for name in ("topk", "sparse"))
        for call, pairs, got in (
            (lambda topk=topk: topk(x, weight, bias, K), "B * k", f"B={B}, k={K}"),
            (lambda sparse=sparse: sparse(x, weight, bias, indices.expand(B, K)), "B * K", f"B={B}, K={K}"),
            (
                lambda sparse=sparse: sparse(x, weight, bias, indices.expand(B * K), offsets=offsets),
                "P",
                f"B={B}, P={B * K}",
            ),
        ):
            message = f"sizes must satisfy {pairs}, {rest}{got}, F={F}, D={D}"
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                call()


@pytest.mark.parametrize("index", [-1, 9, 2**31 - 1])
@pytest.mark.parametrize("encode", ["triton_sparse", "sparse", "triton_ragged", "ragged"], indirect=True)
def test_an_index_out_of_range_of_an_encoder_is_named_on_request(encode, device, monkeypatch, index):
    arguments = encoder_arguments(encode, device)
    place = [7] if "offsets" in encode.names else [2, 1]
    arguments["indices"][tuple(place)] = index
    assert encode(**arguments)[tuple(place)].isnan()
    monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "1")
    message = f"indices must lie in [0, F) = [0, 9), got {index} at {place}"
    with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
        encode(**arguments)


@pytest.mark.parametrize("name", ["triton_sparse_encode", "sparse_encode"])
@pytest.mark.parametrize("offsets", [[0, 4, 3, 6, 12], [1, 3, 6, 9, 12], [-1, 3, 6, 9, 12], [0, 3, 6, 9, 13]], ids=str)
def test_offsets_that_do_not_ascend_are_named_on_request(flex, device, monkeypatch, name, offsets):
    monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "1")
    x, weight, bias, indices, _ = make_encoder_problem(4, 3, 9, 33, device=device)
    encode = partial(getattr(flex, name), x, weight, bias, indices.flatten())
    spare = indices.flatten().clone()
    spare[10:] = -1  # which nobody follows
    getattr(flex, name)(x, weight, bias, spare, offsets=torch.tensor([0, 0, 3, 9, 10], device=device))
    message = f"offsets must ascend from 0 to at most P = 12, got {offsets}"
    with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
        encode(offsets=torch.tensor(offsets, device=device))


# The decode


@pytest.fixture(params=["triton_sae_decode", "sae_decode"])
def decode(request, flex):
    return getattr(flex, request.param)


def decode_arguments(device, ragged):
    """B, K, F, D = 4, 3, 9, 33; of ragged pairs 12."""
    indices, weight, vals, bias, _ = make_problem(4, 3, 9, 33, device=device)
    arguments = {"indices": indices, "weight": weight, "vals": vals, "bias": bias}
    if not ragged:
        return arguments
    offsets = torch.arange(0, 13, 3, device=device)
    return {**arguments, "indices": indices.flatten(), "vals": vals.flatten(), "offsets": offsets}


FIXED, RAGGED = False, True
DECODE_MISTAKES = [
    *((ragged, name, zeros(*shape, dtype=torch.int64 if name in ("indices", "offsets") else torch.float32), ValueError,
       f"{name} must have {message}") for ragged, name, shape, message in [
        (FIXED, "weight", (9,), "shape [F, D] with F >= 1 and D >= 1, got (9,)"),
        (FIXED, "weight", (0, 33), "shape [F, D] with F >= 1 and D >= 1, got (0, 33)"),
        (FIXED, "indices", (12,), "shape [B, K], got (12,)"),
        (FIXED, "indices", (2, 2, 3), f"shape [B, K], got (2, 2, 3): {FLATTEN}"),
        (RAGGED, "indices", (4, 3), "shape [P] where there are offsets, got (4, 3)"),
        (RAGGED, "offsets", (5, 1), "shape [B + 1], got (5, 1)"),
        (RAGGED, "offsets", (0,), "shape [B + 1], got (0,)"),
        (FIXED, "vals", (4, 2), "the shape of indices, (4, 3), got (4, 2)"),
        (RAGGED, "vals", (4, 3), "the shape of indices, (12,), got (4, 3)"),
        (FIXED, "bias", (34,), "shape [D] = (33,), got (34,)"),
        # The weight of a linear decoder
        (FIXED, "bias", (9,), "shape [D] = (33,), got (9,), and weight (9, 33): pass weight.t()"),
    ]),
    *((RAGGED, name, zeros(*shape, dtype=torch.float16), TypeError,
       f"{name} must be int32 or int64, got torch.float16") for name, shape in (("indices", (12,)), ("offsets", (5,)))),
    *((FIXED, name, zeros(*SHAPES[name], dtype=torch.int64), TypeError,
       f"{name} must be float16, bfloat16, float32 or float64, got torch.int64") for name in NAMES[1:4]),
    *((RAGGED, name, lambda device: [[0.0]], TypeError, f"{name} must be a torch.Tensor, got list")
      for name in (*NAMES[:4], "offsets")),
    *((RAGGED, name, lambda device: torch.zeros(12, device="meta", dtype=torch.int64), ValueError,
       f"{name} must be on the device of weight, DEVICE, got meta") for name in ("indices", "offsets")),
    (FIXED, "weight", lambda device: torch.nn.Linear(9, 33, device=device), TypeError,
     "weight must be a torch.Tensor, got Linear; pass its .weight.t()"),
]  # fmt: skip


@pytest.mark.parametrize("ragged, name, wrong, error, message", DECODE_MISTAKES, ids=[m[-1] for m in DECODE_MISTAKES])
def test_a_mistake_to_the_decode_is_named(decode, device, ragged, name, wrong, error, message):
    arguments = decode_arguments(device, ragged)
    message = message.replace("DEVICE", str(arguments["weight"].device))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        decode(**{**arguments, name: wrong(device)})


@pytest.mark.parametrize("B, K, F, D", [(2**22, 1024, 9, 33), (2**30, 1, 9, 33), (4, 1, 2**30, 33), (4, 1, 9, 2**21)])
def test_sizes_that_are_too_large_for_the_decode_are_named(decode, device, B, K, F, D):
    number = torch.zeros((), device=device)
    rest = "B * ceil(D / 32), F * ceil(D / 32) <= 2**31 - 2**21 and D <= 2**20, got "
    offsets = number.long().expand(B + 1)
    for shape, options, pairs, got in (
        ((B, K), {}, "B * K", f"B={B}, K={K}"),
        ((B * K,), {"offsets": offsets}, "P", f"B={B}, P={B * K}"),
    ):
        message = f"sizes must satisfy {pairs}, {rest}{got}, F={F}, D={D}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            decode(number.long().expand(shape), number.expand(F, D), number.expand(shape), **options)


@pytest.mark.parametrize("ragged", [FIXED, RAGGED])
def test_an_index_out_of_range_of_the_decode_is_named_on_request(decode, device, monkeypatch, ragged):
    monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "1")
    arguments = decode_arguments(device, ragged)
    decode(**arguments)
    place = [7] if ragged else [2, 1]
    arguments["indices"][tuple(place)] = 9
    with pytest.raises(IndexError, match=re.escape(f"indices must lie in [0, F) = [0, 9), got 9 at {place}")):
        decode(**arguments)


def test_offsets_of_the_decode_that_do_not_ascend_are_named_on_request(decode, device, monkeypatch):
    monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "1")
    offsets = torch.tensor([0, 4, 3, 6, 12], device=device)
    with pytest.raises(IndexError, match=r"^offsets must ascend from 0 to at most P = 12, got \[0, 4, 3, 6, 12\]$"):
        decode(**{**decode_arguments(device, True), "offsets": offsets})


# The nested losses

ENDS = {"dtype": torch.int64}
NESTED_MISTAKES = [
    *(("ends", zeros(*shape, **ENDS), ValueError,
       f"ends must have shape [L] or [B, L] = (4, L) with L >= 1, got {shape}")
      for shape in ((), (0,), (4, 0), (3, 2), (4, 2, 1))),
    ("ends", zeros(2, dtype=torch.float32), TypeError, "ends must be int32 or int64, got torch.float32"),
    ("ends", lambda device: [3], TypeError, "ends must be a torch.Tensor, got list"),
    ("ends", lambda device: torch.zeros(2, device="meta", dtype=torch.int64), ValueError,
     "ends must be on the device of weight, DEVICE, got meta"),
    ("weight", zeros(33, 9), ValueError,
     "weight must have shape [F, D], got (33, 9), which is [D, F] for these bias and target: pass weight.t()"),
    ("vals", zeros(4, 6), ValueError, "vals must have shape [B, K] = (4, 3), got (4, 6)"),
]  # fmt: skip


@pytest.fixture(params=["triton_nested_sae_loss", "nested_sae_loss"])
def nested(request, flex):
    return getattr(flex, request.param)


@pytest.mark.parametrize("name, wrong, error, message", NESTED_MISTAKES, ids=[m[-1] for m in NESTED_MISTAKES])
def test_a_mistake_to_the_nested_losses_is_named(nested, device, name, wrong, error, message):
    problem = make_problem(4, 3, 9, 33, device=device)
    arguments = {**problem._asdict(), "ends": torch.tensor([1, 3], device=device), name: wrong(device)}
    message = message.replace("DEVICE", str(problem.weight.device))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        nested(**arguments)


@pytest.mark.parametrize(
    ("ends", "value", "place"),
    [([-1, 2], -1, [0]), ([2, 1], 1, [1]), ([0, 4], 4, [1]), ([[1, 2], [1, 2], [3, 2], [9, 9]], 2, [2, 1])],
    ids=str,
)
def test_a_wrong_end_is_named_on_request(nested, device, monkeypatch, ends, value, place):
    monkeypatch.setenv("FLEX_SAE_CHECK_INDICES", "1")
    problem = make_problem(4, 3, 9, 33, device=device)
    nested(*problem, torch.tensor([0, 3, 3], device=device))
    message = f"ends must not descend and must lie in [0, K] = [0, 3], got {value} at {place}"
    with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
        nested(*problem, torch.tensor(ends, device=device))


def test_too_many_levels_are_named(nested, device):
    number = torch.zeros((), device=device)
    tensors = (number.long().expand(2**20, 1), number.expand(9, 33), number.expand(2**20, 1), number.expand(33))
    message = (
        "sizes must satisfy B * L, B * ceil(D / 32), F * ceil(D / 32) <= 2**31 - 2**21 and D <= 2**20, "
        f"got B={2**20}, L=2048, F=9, D=33"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        nested(*tensors, number.expand(2**20, 33), number.long().expand(2048))
