"""Loss and every gradient against float64, over sizes, dtypes, layouts and index patterns."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import (
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    LOSSES,
    PATTERNS,
    assert_right,
    errors_over_budget,
    laid_out,
    make_problem,
    needs_cuda,
    reference_loss,
    relative_error,
    run,
    submodule,
    triton_loss,
)
from truth import Problem, Result, truth

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# of weight, vals, bias, target
MIXES = [
    (f16, f32, f32, f32),
    (f32, f16, f64, f16),
    (f16, f16, f16, f32),
    (f64, f16, f32, f16),
    (f32, f32, f16, f64),
]
if not INTERPRETED:
    MIXES += [(bf16, f32, f32, bf16), (f32, bf16, f16, bf16), (bf16, bf16, bf16, f32), (bf16, f64, f32, f16)]

# One, primes, powers of two and their neighbours: below, at and above the column tiles (32 to 512) and step tiles (4
# to 32).
if INTERPRETED:
    BATCHES, STEPS, FEATURES, WIDTHS = (1, 2, 3, 5), (1, 2, 5, 17, 33, 64), (1, 2, 7, 40), (1, 2, 3, 31, 33, 64, 130)
else:
    BATCHES = (1, 2, 3, 13, 64, 257)
    STEPS = (1, 2, 3, 4, 5, 16, 31, 32, 33, 67, 128)
    FEATURES = (1, 2, 31, 256, 1009, 5000)
    WIDTHS = (1, 2, 3, 31, 32, 33, 64, 127, 200, 512, 513, 1031)


def check(flex, kind, problem, grad_out=1.0):
    grad = torch.tensor(grad_out, dtype=f64 if f64 in [t.dtype for t in problem] else f32, device=problem.weight.device)
    assert_right(kind, problem, run(triton_loss(flex, kind), problem, grad), grad_out)


# No shrinking: a failing example is readable as it was drawn, and every smaller one costs a run or a compilation.
@pytest.mark.parametrize("kind", LOSSES)
@hypothesis.settings(phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate])
@hypothesis.given(
    B=st.sampled_from(BATCHES),
    K=st.sampled_from(STEPS),
    F=st.sampled_from(FEATURES),
    D=st.sampled_from(WIDTHS),
    pattern=st.sampled_from(PATTERNS),
    dtypes=st.sampled_from([*DTYPES, *MIXES]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
    grad_out=st.sampled_from([1.0, 0.25, -3.0]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients_are_right_for_any_input(
    flex, device, kind, B, K, F, D, pattern, dtypes, index_dtype, layouts, grad_out, seed
):
    problem = make_problem(
        B, K, F, D, device=device, pattern=pattern, dtypes=dtypes, index_dtype=index_dtype, seed=seed
    )
    check(flex, kind, Problem(*map(laid_out, problem, layouts)), grad_out)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (3, 5, 7, 11), (2, 17, 3, 33), (1, 16, 40, 512), (2, 1, 2, 1031), (5, 3, 9, 257), (1, 33, 64, 63)],
    ids=str,
)
def test_sizes_need_not_be_round(flex, device, kind, sizes):
    check(flex, kind, make_problem(*sizes, device=device))


# Each mix is a compilation of every kernel: the pure dtypes are enough for the quick subset.
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtypes", [*(pytest.param(d, marks=pytest.mark.kernels_ci) for d in DTYPES), *MIXES], ids=str)
def test_every_dtype_and_mix_accumulates_wide_and_rounds_once(flex, device, kind, dtypes):
    check(flex, kind, make_problem(4, 9, 12, 35, device=device, dtypes=dtypes))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_duplicate_indices_add_up_in_every_pattern(flex, device, kind, pattern, index_dtype):
    check(flex, kind, make_problem(6, 7, 10, 33, device=device, pattern=pattern, index_dtype=index_dtype))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", Problem._fields)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_input_may_be_strided(flex, device, kind, name, layout):
    problem = make_problem(3, 5, 9, 37, device=device)
    check(flex, kind, problem._replace(**{name: laid_out(getattr(problem, name), layout)}))


@pytest.mark.parametrize("kind", LOSSES)
def test_weight_may_be_that_of_a_linear_decoder(flex, device, kind):
    problem = make_problem(3, 5, 9, 36, device=device)
    decoder = torch.nn.Linear(9, 36, bias=False, device=device)  # its weight is [D, F]
    check(flex, kind, problem._replace(weight=decoder.weight.detach().t()))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", Problem._fields)
def test_an_input_may_be_expanded(flex, device, kind, name):
    problem = make_problem(4, 5, 9, 33, device=device)
    tensor = getattr(problem, name)
    check(flex, kind, problem._replace(**{name: tensor[:1].expand(tensor.shape)}))


# The feature-major gradient cuts features of more than 128 pairs at multiples of 128 in the order.
PAIRS = {
    "one feature holds every pair": [320],
    "one heavy feature and many light ones": [300] + [1] * 45 + [2] * 10,
    "heavy features of several sizes": [257, 1, 700, 3, 256, 0, 255, 258],
    "a heavy feature in the middle of empty ones": [0] * 20 + [513] + [0] * 20,
    "heavy features at both ends": [300, 5, 300],
    "features of just a window, and pairs before, after and between": [128, 129, 127, 256],
    "heavy features that end where windows do": [256, 127, 1, 128, 128],
    "heavy features that start and end beside windows": [129, 127, 128, 0, 256],
}


def pairs_of(counts, K, device):
    """[B, K] indices in random order in which feature f occurs counts[f] times; the last feature fills the last row."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = torch.cat([ids, ids.new_full((-len(ids) % K,), len(counts) - 1)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].view(-1, K).to(device)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("counts", PAIRS.values(), ids=PAIRS.keys())
def test_heavy_and_light_features_are_right_together(flex, device, kind, counts):
    K = 20  # more pairs a sample keep the number of samples small
    indices = pairs_of(counts, K, device)
    problem = make_problem(len(indices), K, len(counts), 5, device=device)
    check(flex, kind, problem._replace(indices=indices))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_heavy_features_are_right_in_every_dtype(flex, device, kind, dtypes):
    check(flex, kind, make_problem(40, 17, 30, 3, device=device, dtypes=dtypes, pattern="one_hot_feature"))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_and_tiny_vals_are_right(flex, device, kind, dtype):
    # The squares of float32 vals stay below its maximum; float16 gradients overflow where the truth does.
    exponent = {f16: 10, f64: 400}.get(dtype, 40)
    for scale in (2.0**exponent, 2.0**-exponent):
        check(flex, kind, make_problem(3, 4, 9, 33, device=device, dtypes=dtype, scale=scale))


@pytest.mark.parametrize("kind", LOSSES)
def test_all_zero_vals_are_right(flex, device, kind):
    check(flex, kind, make_problem(3, 4, 9, 33, device=device, scale=0.0))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_beyond_float32_is_infinite(flex, device, kind):
    problem = make_problem(3, 4, 9, 33, device=device, scale=1e25)
    assert triton_loss(flex, kind)(*problem).item() == float("inf")


# D that fills its tiles and D that does not: infinity times the zeros past the last column is NaN.
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("D", [64, 130])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
def test_an_infinite_val_gives_what_the_reference_gives(flex, device, kind, D):
    problem = make_problem(3, 4, 9, D, device=device)
    problem.vals[1, 2] = float("inf")
    result, expected = (run(loss(flex, kind), problem) for loss in (triton_loss, reference_loss))
    assert expected.loss.item() == float("inf")
    # d weight and d vals of the hierarchical loss are differences of infinite sums.
    for name in Result._fields if kind == "topk" else ("loss", "bias", "target"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), equal_nan=True)


@pytest.mark.parametrize("kind", LOSSES)
def test_an_empty_batch_has_a_nan_loss_and_zero_gradients(flex, device, kind):
    result = run(triton_loss(flex, kind), make_problem(0, 4, 9, 33, device=device))
    assert result.loss.isnan()
    assert all(not gradient.any() for gradient in result[1:])


def test_topk_without_features_is_the_loss_of_the_bias(flex, device):
    check(flex, "topk", make_problem(3, 0, 9, 33, device=device))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtypes", [f32, f64, f16, bf16, *MIXES], ids=str)
def test_the_torch_references_are_right(flex, device, kind, dtypes):
    problem = make_problem(20, 17, 12, 35, device=device, dtypes=dtypes, pattern="one_hot_feature")
    assert_right(kind, problem, run(reference_loss(flex, kind), problem))


# What the tests above rest on: the truth, and a budget that is tight.


@pytest.mark.parametrize("kind", LOSSES)
def test_the_truth_is_autograd_of_the_definition(kind):
    problem = make_problem(5, 6, 7, 8, device="cpu", dtypes=f64, pattern="duplicates")

    def definition(indices, weight, vals, bias, target):
        terms = vals[..., None] * weight[indices]
        prefixes = terms.sum(1, keepdim=True) if kind == "topk" else terms.cumsum(1)
        return (bias + prefixes - target[:, None]).square().mean()

    assert_right(kind, problem, run(definition, problem))


def flawed(flaw, kind, problem):
    """The truth, with a mistake that a kernel could make."""
    indices, weight, vals, bias, target = problem
    if flaw == "a pair dropped":
        vals = vals.clone()
        vals[1, -1] = 0
    elif flaw == "a duplicate lost":
        vals = vals.clone()
        vals[1, 1] = 0
    elif flaw == "weight in 16 bits":
        weight = weight.half().to(weight.dtype)
    result = truth(kind, Problem(indices, weight, vals, bias, target))
    if flaw == "gradients through 16 bits":
        result = result._replace(**{name: getattr(result, name).half().double() for name in Problem._fields[1:]})
    if flaw == "float64 through float32":
        result = type(result)(*(value.float().double() for value in result))
    return type(result)(
        result.loss.to(weight.dtype), *(g.to(t.dtype) for g, t in zip(result[1:], problem[1:], strict=True))
    )


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "flaw",
    ["a pair dropped", "a duplicate lost", "weight in 16 bits", "gradients through 16 bits", "float64 through float32"],
)
def test_the_budget_has_no_room_for(kind, flaw):
    dtype = f64 if flaw == "float64 through float32" else f32
    problem = make_problem(64, 32, 100, 64, device="cpu", dtypes=dtype, pattern="duplicates")
    flawless = errors_over_budget(kind, problem, flawed(None, kind, problem))
    assert max(flawless) <= 1
    broken = errors_over_budget(kind, problem, flawed(flaw, kind, problem))
    assert min(broken[1:]) > 1, f"{flaw} passes unseen: {broken}"


# Where the columns of a tile, of all features, leave the L2 cache, tiles have fewer.
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("sizes", [(9, 17, 12, 33), (40, 3, 7, 130), (8, 33, 2, 64)], ids=str)
def test_narrower_tiles_of_atomic_additions_are_right(flex, device, monkeypatch, sizes, dtype):
    kernels = submodule(flex, "hierarchical_kernels")
    sizes_of_tile = *sizes[:3], dtype.itemsize
    assert kernels._atomic_columns(*sizes_of_tile) == 64
    monkeypatch.setattr(kernels, "_L2_BYTES", 0)
    assert kernels._atomic_columns(*sizes_of_tile) == 32
    check(flex, "hierarchical", make_problem(*sizes, device=device, dtypes=dtype, pattern="duplicates"))


# Real sizes


@needs_cuda
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("sizes", [(4096, 32, 65536, 2304), (2048, 256, 131072, 1024), (1000, 77, 16384, 769)], ids=str)
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_relative_error_at_real_sizes(flex, kind, sizes, dtype):
    problem = make_problem(*sizes, device="cuda", dtypes=dtype)
    result, expected = run(triton_loss(flex, kind), problem), truth(kind, problem)
    errors = {name: relative_error(*pair) for name, *pair in zip(result._fields, result, expected, strict=True)}
    for name, error in errors.items():
        # The suffix sums of 256 residuals err twice as much as a single one.
        long = kind == "hierarchical" and sizes[1] == 256 and name in ("vals", "weight")
        limit = 1e-12 if dtype == f64 else 1e-5 if long else 5e-6
        assert error <= limit, f"{name}: {error:.3g}, in all {errors}"


# The last sizes hold more pairs than 2048 pieces of 128: the pieces of a heavy feature grow.
@needs_cuda
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("sizes", [(4096, 32, 65536, 768), (1999, 101, 5003, 331), (32768, 64, 16384, 128)], ids=str)
@pytest.mark.parametrize("pattern", ["all_same", "one_hot_feature"])
def test_a_feature_that_fires_everywhere_is_right_at_real_sizes(flex, kind, sizes, pattern):
    check(flex, kind, make_problem(*sizes, device="cuda", pattern=pattern))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2], ids=str)
def test_16_bit_gradients_err_by_one_rounding(flex, device, kind, dtype):
    sizes = (24, 16, 20, 40) if INTERPRETED else (4096, 64, 65536, 1024)
    problem = make_problem(*sizes, device=device, dtypes=dtype)
    grad_out = float(sizes[0] * sizes[3])  # keeps float16 gradients in its normal range, as loss scaling does
    result = run(triton_loss(flex, kind), problem, torch.tensor(grad_out, device=device))
    expected = truth(kind, problem, grad_out)
    for name in Problem._fields[1:]:
        value, true = getattr(result, name), getattr(expected, name)
        assert relative_error(value, true) <= 1.1 * relative_error(true.to(dtype), true), name
