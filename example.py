# /// script
# requires-python = ">=3.11"
# dependencies = ["kernels>=0.17,<0.18", "torch>=2.11", "numpy>=2"]
# ///
"""Check flex_sae's encoder, losses and gradients against float64, and time a training step against torch.compile.

    uv run example.py                                       on a GPU: B=2048 K=256 F=131072 D=1024
    uv run example.py -B 4096 -K 64 -F 65536 -D 2304 --dtype bfloat16

Without a GPU the kernels run in Triton's interpreter, which shows that they are right but not how fast they are:

    uv run example.py                                       six seconds: B=8 K=6 F=64 D=40
    uv run example.py -B 64 -K 8 -F 512 -D 128              twenty seconds
    uv run example.py -B 64 -K 32 -F 4096 -D 256            a minute

Run it from a checkout: it builds the package and loads that build, or the one that LOCAL_KERNELS names. Exit codes:
0 within bounds, 1 a result is off, 2 bad options, too large or not buildable, 130 interrupted.
"""
# ruff: noqa: E402

import os
import signal
import sys


def interrupt(*_) -> None:
    # Not by an exception, which a callback from C++ may swallow.
    os.write(2, b"interrupted\n")
    os._exit(130)


signal.signal(signal.SIGINT, interrupt)  # before torch, which takes seconds to import

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import triton
from kernels import get_kernel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
from build_local import BuildError, build
from truth import Problem, Result, truth

REPO_ID = "t-tech/flex-sae"
GRADIENTS = ("d weight", "d vals", "d bias", "d target")
LOSSES = {"topk": "TopK", "hierarchical": "HierarchicalTopK"}
SIZES = {"B": "samples", "K": "active features per sample", "F": "dictionary features", "D": "model width"}
DEFAULTS = {"B": 2048, "K": 256, "F": 131072, "D": 1024} if CUDA else {"B": 8, "K": 6, "F": 64, "D": 40}

# The interpreter's time for encoder and losses with gradients: 4 ms per program, about 25 for each sample, one for each
# feature and one more for each in use, and 35 us for each of the B * K * D products. Fitted on one core, for the losses
# to 12 sizes of up to 524,288 products: 11 took 0.8 to 1.3 times as long as this says, K=64 at D=32 2.5 times; for the
# encoder to 5, which took 1.0 to 1.2 times as long.
PROGRAM_SECONDS, PRODUCT_SECONDS = 4e-3, 35e-6
MAX_SECONDS = 300
ROWS = 256  # of pre-activations that are sorted at a time


class Encoder(NamedTuple):
    """The arguments of the encoder."""

    x: torch.Tensor  # [B, D]
    weight: torch.Tensor  # [F, D]
    bias: torch.Tensor  # [F]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in SIZES.items():
        parser.add_argument(f"-{name}", type=int, default=DEFAULTS[name], help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
    parser.add_argument("--iters", type=int, default=20, help="timed steps, on a GPU (default: %(default)s)")
    args = parser.parse_args()
    for name in (*SIZES, "iters"):
        if getattr(args, name) < 1:
            parser.error(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.K > args.F:
        parser.error(f"K must be at most F, got K={args.K} F={args.F}")
    if args.dtype == "bfloat16" and not CUDA:
        parser.error("bfloat16 needs a GPU: Triton's interpreter truncates where a GPU rounds")
    return args


def refuse_too_large(args: argparse.Namespace) -> None:
    """Raise ValueError for sizes that do not fit the memory or keep the interpreter busy for too long."""
    memory = torch.cuda.mem_get_info()[1] if CUDA else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Comparing a gradient with its truth holds six float64 tensors of its size at the peak, a selection as many rows.
    needed = 6 * 8 * (args.F * args.D + args.B * args.D + args.B * args.K + ROWS * args.F)
    if needed > memory:
        sizes = f"{needed / 2**30:,.0f} GiB of memory, more than the {memory / 2**30:,.0f} there are"
        raise ValueError(f"this needs about {sizes}: choose smaller sizes")
    programs = 25 * args.B + args.F + min(args.F, args.B * args.K)
    seconds = PROGRAM_SECONDS * programs + PRODUCT_SECONDS * args.B * args.K * args.D
    if not CUDA and seconds > MAX_SECONDS:
        minutes = f"{seconds / 60:,.0f} minutes in Triton's interpreter, more than {MAX_SECONDS // 60}"
        raise ValueError(f"this takes about {minutes}: use a GPU or smaller sizes, see --help")


def load_package():
    """The build that LOCAL_KERNELS names, else a fresh one of this checkout."""
    named = os.environ.get("LOCAL_KERNELS", "")
    if f"{REPO_ID}=" not in named:
        build(ROOT / "build")
        os.environ["LOCAL_KERNELS"] = f"{named}:{REPO_ID}={ROOT}".lstrip(":")
    return get_kernel(REPO_ID, version=1, trust_remote_code=[REPO_ID])


def make_inputs(args: argparse.Namespace) -> tuple[Encoder, Problem]:
    """For the encoder -1, 0 and 1: their sums are exact in any order and precision, and many are equal. For the losses
    random features with positive vals, largest first as the encoder returns them, and decoder rows of length 1."""
    torch.manual_seed(0)
    options = {"device": "cuda" if CUDA else "cpu", "dtype": getattr(torch, args.dtype)}
    shapes = ((args.B, args.D), (args.F, args.D), (args.F,))
    encoder = Encoder(*(torch.randint(-1, 2, shape, **options).requires_grad_() for shape in shapes))
    indices = torch.randint(args.F, (args.B, args.K), device=options["device"])
    weight = torch.randn(args.F, args.D, **options).mul_(args.D**-0.5)
    vals = torch.randn(args.B, args.K, **options).abs_().sort(dim=1, descending=True).values
    bias, target = torch.randn(args.D, **options), torch.randn(args.B, args.D, **options)
    return encoder, Problem(indices, *(tensor.requires_grad_() for tensor in (weight, vals, bias, target)))


def check_encoder(encode, encoder: Encoder, args: argparse.Namespace) -> bool:
    """Print how many of the pairs are not those of a stable sort, and the relative error of each gradient."""
    vals, indices = encode(*encoder, args.K)
    x, weight, bias = (tensor.detach().double() for tensor in encoder)
    wrong = 0
    for rows, got_vals, got_indices in zip(*(tensor.split(ROWS) for tensor in (x, vals, indices)), strict=True):
        pre = torch.nn.functional.linear(rows, weight, bias).to(vals.dtype)
        want_vals, want = (one[:, : args.K] for one in pre.sort(dim=1, descending=True, stable=True))
        wrong += int(((got_vals != want_vals.relu()) | (got_indices != want)).sum())
    passed = report("selection", wrong / vals.numel(), 0.0)
    vals_grad = torch.randn_like(vals)
    got = torch.autograd.grad(vals, encoder, vals_grad)
    pre_grad = torch.where(vals > 0, vals_grad, 0).double()
    true = x_grad, weight_grad, bias_grad = tuple(map(torch.zeros_like, (x, weight, bias)))
    for features, grad in zip(indices.unbind(1), pre_grad.unbind(1), strict=True):
        x_grad += grad[:, None] * weight[features]
        weight_grad.index_add_(0, features, grad[:, None] * x)
        bias_grad.index_add_(0, features, grad)
    return passed & check(("d x", "d weight", "d bias"), got, true, args)


def training_step(problem: Problem, encoder: torch.Tensor, encode, loss_function) -> tuple[torch.Tensor, ...]:
    """The gradients of an SAE's parameters: an encoder [F, D] without a bias of its own, decoder, bias."""
    indices, weight, _, bias, target = problem
    x = target.detach()
    vals, indices = encode(x - bias, encoder, None, indices.shape[1])
    loss = loss_function(indices, weight, vals, bias, x)
    return torch.autograd.grad(loss, (encoder, weight, bias))


def torch_encode(x, weight, bias, k):
    return torch.topk(torch.nn.functional.linear(x, weight, bias).relu(), k, dim=1)


def decoder_step(loss_function, problem: Problem) -> Result:
    """The loss and its gradients, scaled by B * D as a gradient scaler would: else they vanish in float16."""
    loss = loss_function(*problem)
    scale = torch.full_like(loss, problem.target.numel())
    return Result(loss.detach(), *torch.autograd.grad(loss, problem[1:], scale))


def relative_error(got: torch.Tensor, true: torch.Tensor) -> float:
    return float((got.double() - true).norm() / true.norm().clamp_min(torch.finfo(torch.float64).tiny))


def report(name: str, error: float, bound: float) -> bool:
    good = error <= bound  # False for NaN
    print(f"    {name:<14}{error:>11.1e}   at most {bound:.1e}   {'ok' if good else 'MISMATCH'}")
    return good


def check(names: tuple[str, ...], got: tuple, true: tuple, args: argparse.Namespace) -> bool:
    """Print the relative error of each result; True if all are within their bounds."""
    # Sums over K, D or B are accumulated in float32 or better; n rounding errors add up like sqrt(n).
    dtype = torch.promote_types(getattr(torch, args.dtype), torch.float32)
    accumulated = torch.finfo(dtype).eps * (args.K + args.D + args.B) ** 0.5
    passed = True
    for name, got_one, true_one in zip(names, got, true, strict=True):
        # The final rounding errs as much as rounding the truth does, and 10% more where a near tie goes the other way.
        bound = accumulated + 1.1 * relative_error(true_one.to(got_one.dtype), true_one)
        passed &= report(name, relative_error(got_one, true_one), bound)
    return passed


def time_steps(label: str, step: Callable, iters: int) -> None:
    """Print the time and the peak memory of a step."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iters)]
    try:
        for _ in range(3):  # the first calls compile and fill the allocator's cache
            step()
        for start, end in events:
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        print(f"    {label:<16}{'out of memory':>52}")
        return
    times = sorted(start.elapsed_time(end) for start, end in events)
    low, high = (times[round(share * (iters - 1))] for share in (0.1, 0.9))
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"    {label:<16}{statistics.median(times):>9.2f} ms{f'{low:.2f} .. {high:.2f} ms':>24}{peak:>12.2f} GiB")


def run(args: argparse.Namespace) -> bool:
    place = torch.cuda.get_device_name() if CUDA else "no GPU: Triton's interpreter, no timings"
    print(f"flex_sae   {place}   torch {torch.__version__}, triton {triton.__version__}")
    print(f"B={args.B} K={args.K} F={args.F} D={args.D} {args.dtype}")
    refuse_too_large(args)
    flex = load_package()
    torch.set_float32_matmul_precision("high")  # TF32, as in training
    encoder, problem = make_inputs(args)
    print("\nEncoder\n  share of wrong pairs, relative error against float64 (Frobenius norm)")
    passed = check_encoder(flex.triton_topk_encode, encoder, args)
    for kind, title in LOSSES.items():
        print(f"\n{title}\n  relative error against float64 (Frobenius norm)")
        kernel, reference = (getattr(flex, f"{prefix}{kind}_sae_loss") for prefix in ("triton_", ""))
        true = truth(kind, problem, problem.target.numel())
        passed &= check(("loss", *GRADIENTS), decoder_step(kernel, problem), true, args)
        if CUDA:
            print(f"  {'training step':<18}{'median':>12}{'10% .. 90%':>24}{'peak memory':>16}")
            step = partial(training_step, problem, problem.weight.detach().clone().requires_grad_())
            time_steps("kernel", partial(step, flex.triton_topk_encode, kernel), args.iters)
            time_steps(
                "torch.compile", partial(step, torch.compile(torch_encode), torch.compile(reference)), args.iters
            )
    print("\nall within bounds" if passed else "\nMISMATCH: a result is outside its bound")
    return passed


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)
    args = parse_options()
    try:
        return 0 if run(args) else 1
    except (torch.OutOfMemoryError, MemoryError):
        error = "out of memory: choose smaller sizes"
    except (BuildError, ValueError, OSError) as raised:
        error = raised
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
