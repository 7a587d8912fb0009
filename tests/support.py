"""What the tests compare with: problems, a float64 truth, and the error that a right kernel may make.

The truth is in scripts/truth.py.

The budget is that of the standard model of floating point. A sum of products whose terms pass through at most `n`
roundings of unit `u` each errs by at most `n * u * magnitude` to first order, `magnitude` being the same formula with
every term replaced by its absolute value. Evaluating the truth at absolute inputs, with every minus turned into a plus,
gives exactly that magnitude, element by element; for the hierarchical gradients of weight and vals it is taken along
the backward walk from the last step to the first. For long sums `n` becomes `4 * sqrt(n)`: the errors of n roundings,
uniform in +-u, add up to a standard deviation of `u * sqrt(n / 3)`, so this is seven of them, and no less than a sum in
sqrt(n) blocks can lose at worst. On top comes one rounding to the dtype of the result.
"""

import contextlib
import math
import os
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from truth import EncoderProblem, EncoderResult, Problem, Result, encoder_truth, magnitude, truth

LOSSES = ("topk", "hierarchical")
PATTERNS = ("uniform", "all_same", "duplicates", "one_hot_feature", "two_heavy_features", "sorted")
LAYOUTS = ("contiguous", "padded", "every_other_row", "every_other_column", "transposed")
# conftest.py, imported first, has settled this
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter truncates to bfloat16 where a GPU rounds.
DTYPES = (torch.float32, torch.float64, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))

# Each width compiles every kernel on a GPU, so that the suite shares a dozen: one, primes, powers of two and their
# neighbours, below, at and above the column tiles (32 to 512); for the interpreter those of one or two tiles.
WIDTHS = (1, 2, 3, 31, 33, 64, 127) if INTERPRETED else (1, 2, 3, 31, 32, 33, 64, 127, 200, 512, 513, 1031)

# Inductor needs a C++ compiler on a CPU. The ops are the same to both: only what is around them gets compiled.
BACKEND = "aot_eager" if INTERPRETED else "inductor"

needs_cuda = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


def make_indices(pattern, B, K, F, generator):
    device = generator.device
    uniform = torch.randint(F, (B, K), generator=generator, device=device)
    if pattern == "all_same":
        return torch.full_like(uniform, F - 1)
    if pattern == "duplicates":  # the second half of a row repeats the first
        return uniform[:, torch.arange(K, device=device) // 2]
    if pattern == "one_hot_feature":  # one feature holds half of all pairs, the others stay light
        uniform[:, ::2] = F // 2
    if pattern == "two_heavy_features":  # in three steps of four, so that one ends and one starts within a chunk
        uniform[:, ::2], uniform[:, 1::4] = F // 2, min(F // 2 + 1, F - 1)
    if pattern == "sorted":
        return uniform.sort(dim=1).values
    return uniform


def pairs_of(counts, K, device, seed=0):
    """[B, K] indices in random order in which feature f occurs counts[f] times; the last feature fills the last row."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = torch.cat([ids, ids.new_full((-len(ids) % K,), len(counts) - 1)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))].view(-1, K).to(device)


def make_problem(
    B, K, F, D, *, device, pattern="uniform", dtypes=torch.float32, index_dtype=torch.int64, scale=1.0, seed=0
):
    """Unit-variance target and rows of `weight` of about unit length; `vals` of both signs, every fifth one zero.

    `dtypes` is one dtype, or one for each of weight, vals, bias, target.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weight_dtype, vals_dtype, bias_dtype, target_dtype = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 4

    def normal(dtype, *shape):
        # 16-bit normals straight from the generator, float64 ones with all their digits
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    vals = normal(vals_dtype, B, K) * scale
    vals.view(-1)[4::5] = 0
    return Problem(
        indices=make_indices(pattern, B, K, F, generator).to(index_dtype),
        weight=normal(weight_dtype, F, D).mul_(D**-0.5),
        vals=vals,
        bias=normal(bias_dtype, D),
        target=normal(target_dtype, B, D),
    )


def laid_out(tensor, layout):
    """The same values behind other strides; what lies between them is poison (NaN, or an index out of range)."""
    if tensor.dim() == 1:
        return laid_out(tensor[None], layout)[0]
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.t().contiguous().t()
    rows, columns = tensor.shape
    poison = float("nan") if tensor.is_floating_point() else -1
    if layout == "padded":  # unit stride, but no row starts at an aligned address
        view = tensor.new_full((rows, columns + 3), poison)[:, 1 : columns + 1]
    elif layout == "every_other_row":
        view = tensor.new_full((2 * rows, columns), poison)[::2]
    else:
        view = tensor.new_full((rows, 2 * columns), poison)[:, ::2]
    return view.copy_(tensor)


def run(loss_function, problem, grad_out=None):
    """The loss and its four gradients; leaves keep the strides of the problem."""
    leaves = [tensor.detach().requires_grad_() for tensor in problem[1:]]
    loss = loss_function(problem.indices, *leaves)
    return Result(loss.detach(), *torch.autograd.grad(loss, leaves, grad_out))


@contextlib.contextmanager
def deterministic_algorithms(enabled=True):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def modes(test):
    """Parametrize a test over torch's default and deterministic mode."""
    return pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])(test)


def check(flex, kind, problem, grad_out=1.0, deterministic=False, sample_weight=None):
    """Run the fused loss on a problem and compare everything with the truth."""
    grad = torch.tensor(grad_out, dtype=accumulation_dtype(problem), device=problem.weight.device)
    loss = partial(triton_loss(flex, kind), sample_weight=sample_weight)
    with deterministic_algorithms(deterministic):
        assert_right(kind, problem, run(loss, problem, grad), grad_out, sample_weight)


def submodule(flex, name):
    return sys.modules[f"{flex.__name__}.{name}"]


def record_compilations(monkeypatch):
    """A list that gets the name of every kernel that is compiled from now on."""
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    return compiled


class RecordedOps(TorchDispatchMode):
    """Records the calls of the package's ops and the tensors that they return."""

    def __init__(self, flex):
        super().__init__()
        self.namespace = flex._ops._OPS_NAME
        self.calls, self.outputs = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == self.namespace:
            self.calls.append((func, args))
            self.outputs += tree_leaves(outputs)
        return outputs


def triton_loss(flex, kind):
    return getattr(flex, f"triton_{kind}_sae_loss")


def reference_loss(flex, kind):
    return getattr(flex, f"{kind}_sae_loss")


def accumulation_dtype(problem):
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in problem[1:]) else torch.float32


def result_dtypes(problem):
    return Result(accumulation_dtype(problem), *(tensor.dtype for tensor in problem[1:]))


def magnitudes(kind, problem, grad_out, sample_weight):
    """The size of what each element of the loss and the gradients is summed up from, roundings included."""
    sizes = magnitude(kind, problem, grad_out, sample_weight)
    if kind == "topk":
        return sizes
    # The backward pass takes steps away from the last residual again, r_{i-1} = r_i - v_i w_i, and sums what is left.
    # Within a tile it subtracts a sum that has step i in it and adds step i back.
    indices, (weight, vals, bias, target) = problem.indices.long(), (t.double().abs() for t in problem[1:])
    K, weights = indices.shape[1], torch.ones_like(target[:, :1])
    if sample_weight is not None:
        weights = sample_weight.double().abs()[:, None]
    factor = 2 * abs(grad_out) / max(K * target.numel(), 1) * weights
    residual, suffix = bias + target, torch.zeros_like(target)
    for step in range(K):
        residual = torch.addcmul(residual, vals[:, step, None], weight[indices[:, step]])
    d_weight, d_vals = torch.zeros_like(weight), torch.zeros_like(vals)
    for step in reversed(range(K)):
        row, val = weight[indices[:, step]], vals[:, step, None]
        residual = torch.addcmul(residual, val, row, value=2)
        suffix = suffix + residual
        d_weight.index_add_(0, indices[:, step], factor * val * suffix)
        d_vals[:, step] = factor[:, 0] * (row * suffix).sum(1)
    return sizes._replace(weight=d_weight, vals=d_vals)


def allowed_error(n, accumulation, size, value, dtype):
    """How far a sum of magnitude `size` may lie from `value` after n roundings to `accumulation` and one to `dtype`."""
    # The truth rounds too, in float64.
    unit = torch.finfo(accumulation).eps / 2 + torch.finfo(torch.float64).eps / 2
    error = min(n, 4 * math.sqrt(n)) * unit * size + torch.finfo(accumulation).tiny
    narrow = torch.finfo(dtype)
    # A float64 sum may pass through float32 on its way to 16 bits; below the normal range a rounding is absolute.
    store = narrow.eps / 2 + (torch.finfo(torch.float32).eps if dtype.itemsize == 2 else 0)
    return error + store * (value.abs() + error) + narrow.tiny * narrow.eps / 2


def budget(kind, problem, expected, grad_out=1.0, sample_weight=None):
    """How far each element of a right result may lie from `expected`, the truth."""
    (B, K), D = problem.indices.shape, problem.weight.shape[1]
    most_pairs = int(torch.bincount(problem.indices.flatten().long(), minlength=1).max())  # of one feature
    residual = K + 2  # a product, K additions, the target
    # In the hierarchical loss a residual then passes K subtractions of later steps, two more within its tile, and K
    # additions into S_i.
    suffix = residual + (2 * K + 2 if kind == "hierarchical" else 0)
    squares = B * D * (K if kind == "hierarchical" else 1)
    scalars = 7  # the products with v_i, grad_out and the sample's weight, and 2 / (B D) with its own roundings
    roundings = Result(2 * residual + squares, suffix + most_pairs, suffix + D, suffix + B, suffix)

    accumulation = accumulation_dtype(problem)

    def allowed(n, *operands):
        return allowed_error(n + scalars, accumulation, *operands)

    sizes = magnitudes(kind, problem, grad_out, sample_weight)
    result = Result(*map(allowed, roundings, sizes, expected, result_dtypes(problem)))
    if kind == "hierarchical" and problem.weight.dtype == torch.bfloat16 and accumulation == torch.float32:
        # The S_i pass through float16 scratch.
        result = result._replace(weight=result.weight + torch.finfo(torch.float16).eps / 2 * sizes.weight)
    return result


def errors_over_budget(kind, problem, result, grad_out=1.0, sample_weight=None):
    """The worst error of the loss and of each gradient, in units of its budget: a right result stays at or below 1."""
    expected = truth(kind, problem, grad_out, sample_weight)

    def worst(value, true, tolerance):
        ratio = (value.double() - true).abs() / tolerance
        # Where the truth overflows the dtype of the result, an infinity of its sign is the right answer.
        ratio = torch.where(value == true.to(value.dtype), 0.0, ratio)
        return ratio.nan_to_num(nan=math.inf).max().item() if ratio.numel() else 0.0

    return Result(*map(worst, result, expected, budget(kind, problem, expected, grad_out, sample_weight)))


def assert_right(kind, problem, result, grad_out=1.0, sample_weight=None):
    """Shapes, dtypes, and every element of the loss and the gradients within the budget."""
    assert result.loss.shape == ()
    for name, value, given in zip(Result._fields[1:], result[1:], problem[1:], strict=True):
        assert value.shape == given.shape, f"d {name} of the {kind} loss has shape {tuple(value.shape)}"
    assert tuple(value.dtype for value in result) == tuple(result_dtypes(problem))
    for name, error in errors_over_budget(kind, problem, result, grad_out, sample_weight)._asdict().items():
        assert error <= 1, f"{kind} {name}: {error:.3g} times the error budget"


def assert_agree(kind, problem, result, other):
    """Two computations of the same problem, each of which may err by one budget."""
    allowed = budget(kind, problem, truth(kind, problem))
    for name, left, right, tolerance in zip(Result._fields, result, other, allowed, strict=True):
        error = ((left.double() - right.double()).abs() / tolerance).max().item()
        assert error <= 2, f"{kind} {name}: the two differ by {error:.3g} times the error budget"


def assert_only_sample_1_is_spoilt(kind, right, result, features=()):
    """The loss and d vals and d target of sample 1 are NaN; those of other samples and d weight of `features` are
    right."""
    expected = truth(kind, right)
    allowed = budget(kind, right, expected)
    assert result.loss.isnan()
    assert result.vals[1].isnan().all() and result.target[1].isnan().all()
    others = [b for b in range(len(right.vals)) if b != 1]
    for name, kept in (("vals", others), ("target", others), ("weight", list(features))):
        value, true, tolerance = (getattr(r, name)[kept] for r in (result, expected, allowed))
        assert ((value.double() - true).abs() <= tolerance).all(), name


def relative_error(value, expected):
    """Frobenius norm of the error relative to that of the truth."""
    return (torch.linalg.vector_norm(value.double() - expected) / torch.linalg.vector_norm(expected)).item()


def make_encoder_problem(
    B, K, F, D, *, device, pattern="uniform", dtypes=torch.float32, index_dtype=torch.int64, integers=False, seed=0
):
    """Unit-variance x and bias and rows of `weight` of about unit length; or small integers, so that every result is
    exact in any dtype and has ties. `dtypes` is one dtype, or one for each of x, weight, bias.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x_dtype, weight_dtype, bias_dtype = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 3
    vals_dtype = torch.promote_types(torch.promote_types(x_dtype, weight_dtype), bias_dtype)

    def draw(dtype, *shape):
        if integers:
            return torch.randint(-2, 3, shape, generator=generator, device=device).to(dtype)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    vals_grad = draw(vals_dtype, B, K)
    vals_grad.view(-1)[4::5] = 0
    return EncoderProblem(
        x=draw(x_dtype, B, D),
        weight=draw(weight_dtype, F, D).mul_(1 if integers else D**-0.5),
        bias=draw(bias_dtype, F),
        indices=make_indices(pattern, B, K, F, generator).to(index_dtype),
        vals_grad=vals_grad,
    )


def encoder_budget(problem, expected):
    """How far each element of a right result of the sparse encoder may lie from `expected`, the truth."""
    *leaves, indices, vals_grad = problem
    accumulation = torch.float64 if any(leaf.dtype == torch.float64 for leaf in leaves) else torch.float32
    most_pairs = int(torch.bincount(indices.flatten().long(), minlength=1).max())  # of one feature
    # A product and the additions of each sum; bias comes last.
    roundings = EncoderResult(problem.x.shape[1] + 2, indices.shape[1] + 1, most_pairs + 1, most_pairs + 1)
    dtypes = vals_grad.dtype, *(leaf.dtype for leaf in leaves)
    sizes = encoder_truth(problem, absolute=True)
    return EncoderResult(
        *(allowed_error(n, accumulation, *of) for n, *of in zip(roundings, sizes, expected, dtypes, strict=True))
    )
