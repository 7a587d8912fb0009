# /// script
# requires-python = ">=3.11"
# dependencies = ["kernels>=0.17,<0.18", "torch>=2.11", "numpy>=2"]
# ///
"""Check both flex_sae losses and their gradients against float64, and time them against torch.compile.

    uv run example.py                                       on a GPU: B=2048 K=256 F=131072 D=1024
    uv run example.py -B 4096 -K 64 -F 65536 -D 2304 --dtype bfloat16

Without a GPU the kernels run in Triton's interpreter, which shows that they are right but not how fast they are:

    uv run example.py                                       five seconds: B=8 K=6 F=64 D=40
    uv run example.py -B 64 -K 8 -F 512 -D 128              ten seconds
    uv run example.py -B 64 -K 32 -F 4096 -D 256            half a minute

Run it from a checkout: it builds the package and loads that build, or the one that LOCAL_KERNELS names. Exit codes:
0 within bounds, 1 a loss or gradient is off, 2 bad options, too large or not buildable, 130 interrupted.
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
from pathlib import Path

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
LOSSES = {"topk": "TopK", "hierarchical": "HierarchicalTopK"}
SIZES = {"B": "samples", "K": "active features per sample", "F": "dictionary features", "D": "model width"}
DEFAULTS = {"B": 2048, "K": 256, "F": 131072, "D": 1024} if CUDA else {"B": 8, "K": 6, "F": 64, "D": 40}

# The interpreter's time for both losses with gradients: 4 ms per program, about four for each sample and one for each
# feature in use, and 35 us for each of the B * K * D products. Fitted to 12 sizes of up to 524,288 products, on one
# core: 11 took 0.8 to 1.3 times as long as this says, K=64 at D=32 2.5 times.
PROGRAM_SECONDS, PRODUCT_SECONDS = 4e-3, 35e-6
MAX_SECONDS = 300


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
    # Comparing a gradient with its truth holds six float64 tensors of its size at the peak.
    needed = 6 * 8 * (args.F * args.D + args.B * args.D + args.B * args.K)
    if needed > memory:
        sizes = f"{needed / 2**30:,.0f} GiB of memory, more than the {memory / 2**30:,.0f} there are"
        raise ValueError(f"this needs about {sizes}: choose smaller sizes")
    programs = 4 * args.B + min(args.F, args.B * args.K)
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


def make_problem(args: argparse.Namespace) -> Problem:
    """Random features with positive vals, largest first as torch.topk returns them, and decoder rows of length 1."""
    torch.manual_seed(0)
    options = {"device": "cuda" if CUDA else "cpu", "dtype": getattr(torch, args.dtype)}
    indices = torch.randint(args.F, (args.B, args.K), device=options["device"])
    weight = torch.randn(args.F, args.D, **options).mul_(args.D**-0.5)
    vals = torch.randn(args.B, args.K, **options).abs_().sort(dim=1, descending=True).values
    bias, target = torch.randn(args.D, **options), torch.randn(args.B, args.D, **options)
    return Problem(indices, *(tensor.requires_grad_() for tensor in (weight, vals, bias, target)))


def decoder_step(loss_function, problem: Problem) -> Result:
    """The loss and its gradients, scaled by B * D as a gradient scaler would: else they vanish in float16."""
    loss = loss_function(*problem)
    scale = torch.full_like(loss, problem.target.numel())
    return Result(loss.detach(), *torch.autograd.grad(loss, problem[1:], scale))


def relative_error(got: torch.Tensor, true: torch.Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())


def check(got: Result, true: Result, args: argparse.Namespace) -> bool:
    """Print the relative error of the loss and each gradient; True if all are within their bounds."""
    # Sums over K, D or B are accumulated in float32 or better; n rounding errors add up like sqrt(n).
    dtype = torch.promote_types(getattr(torch, args.dtype), torch.float32)
    accumulated = torch.finfo(dtype).eps * (args.K + args.D + args.B) ** 0.5
    print("  relative error against float64 (Frobenius norm)")
    passed = True
    for name, got_one, true_one in zip(("loss", "d weight", "d vals", "d bias", "d target"), got, true, strict=True):
        # The final rounding errs as much as rounding the truth does, and 10% more where a near tie goes the other way.
        bound = accumulated + 1.1 * relative_error(true_one.to(got_one.dtype), true_one)
        error = relative_error(got_one, true_one)
        good = error <= bound  # False for NaN
        passed &= good
        print(f"    {name:<14}{error:>11.1e}   at most {bound:.1e}   {'ok' if good else 'MISMATCH'}")
    return passed


def time_steps(label: str, loss_function, problem: Problem, iters: int) -> None:
    """Print the time and the peak memory of a decoder step."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iters)]
    try:
        for _ in range(3):  # the first calls compile and fill the allocator's cache
            decoder_step(loss_function, problem)
        for start, end in events:
            start.record()
            decoder_step(loss_function, problem)
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
    problem = make_problem(args)
    passed = True
    for kind, title in LOSSES.items():
        print(f"\n{title}")
        kernel, reference = (getattr(flex, f"{prefix}{kind}_sae_loss") for prefix in ("triton_", ""))
        passed &= check(decoder_step(kernel, problem), truth(kind, problem, problem.target.numel()), args)
        if CUDA:
            print(f"  {'decoder step':<18}{'median':>12}{'10% .. 90%':>24}{'peak memory':>16}")
            time_steps("kernel", kernel, problem, args.iters)
            time_steps("torch.compile", torch.compile(reference), problem, args.iters)
    print("\nall within bounds" if passed else "\nMISMATCH: a loss or a gradient is outside its bound")
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
