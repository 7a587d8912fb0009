# /// script
# requires-python = ">=3.11"
# dependencies = ["kernels>=0.17,<0.18", "torch>=2.11", "numpy>=2", "tqdm>=4.66"]
# ///
"""Check and time both flex_sae losses against plain torch.

    uv run example.py [-B 2048] [-K 256] [-F 131072] [-D 1024] [--dtype float32] [--iters 20]

In a checkout this builds and loads the local package; alone, the published one. Without a GPU it runs a small problem
through Triton's interpreter. Exit code: 0 all right, 1 a loss or a gradient is off, 2 bad options, too little memory or
nowhere to build.
"""

import argparse
import os
import resource
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

CUDA = torch.cuda.is_available()
if not CUDA:
    # Read when Triton is imported, which loading the package does.
    os.environ["TRITON_INTERPRET"] = "1"

REPO_ID = "t-tech/flex-sae"
NAMES = ("weight", "vals", "bias", "target")
LOSSES = {"TopK": "topk_sae_loss", "HierarchicalTopK": "hierarchical_sae_loss"}

# The interpreter needs seconds where a GPU needs microseconds.
SIZES = {"B": 2048, "K": 256, "F": 131072, "D": 1024} if CUDA else {"B": 8, "K": 6, "F": 64, "D": 40}

# The torch references materialise [B, K, D] several times. The float64 truth runs over parts of the batch with this
# many elements, 256 MB a tensor, so that checking a size takes little more memory than the size itself.
PART_ELEMENTS = 2**25

# The first calls compile and fill the allocator's cache.
WARMUP = 3


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time both flex_sae losses against plain torch.")
    parser.add_argument("-B", "--batch", type=int, default=SIZES["B"], help="samples (default: %(default)s)")
    parser.add_argument("-K", type=int, default=SIZES["K"], help="active features a sample (default: %(default)s)")
    parser.add_argument("-F", type=int, default=SIZES["F"], help="dictionary features (default: %(default)s)")
    parser.add_argument("-D", type=int, default=SIZES["D"], help="model width (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
    parser.add_argument("--iters", type=int, default=20, help="timed steps (default: %(default)s)")
    args = parser.parse_args()
    for name in ("batch", "K", "F", "D", "iters"):
        if getattr(args, name) < 1:
            parser.error(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.K > args.F:
        parser.error(f"K active features need a dictionary of at least as many: got K={args.K}, F={args.F}")
    if 8 * max(args.F * args.D, args.batch * args.D, args.batch * args.K) >= 2**63:  # torch counts bytes in int64
        parser.error(f"B={args.batch} K={args.K} F={args.F} D={args.D} does not fit any memory: choose smaller sizes")
    if args.dtype == "bfloat16" and not CUDA:
        parser.error("bfloat16 needs a GPU: Triton's interpreter truncates where a GPU rounds")
    return args


def load_package():
    """The local build in a checkout, the published kernel elsewhere."""
    from kernels import get_kernel

    checkout = Path(__file__).resolve().parent
    if (checkout / "torch-ext").is_dir():
        sys.path.insert(0, str(checkout / "scripts"))
        from build_local import build

        build(checkout / "build")
        os.environ["LOCAL_KERNELS"] = f"{REPO_ID}={checkout}"
    return get_kernel(REPO_ID, version=1, trust_remote_code=[REPO_ID])


def make_inputs(args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """indices, weight, vals, bias, target of a random SAE: unit decoder rows, features in order of importance."""
    torch.manual_seed(0)
    options = {"device": "cuda" if CUDA else "cpu", "dtype": getattr(torch, args.dtype)}
    indices = torch.randint(args.F, (args.batch, args.K), device=options["device"])
    # As torch.topk returns them: positive and descending.
    vals = torch.randn(args.batch, args.K, **options).abs_().sort(dim=1, descending=True).values
    weight = torch.randn(args.F, args.D, **options).mul_(args.D**-0.5)
    bias = torch.randn(args.D, **options)
    target = torch.randn(args.batch, args.D, **options)
    return indices, *(tensor.requires_grad_() for tensor in (weight, vals, bias, target))


def step(loss_function, indices, *tensors, scale):
    """Loss and gradients. `scale` plays the gradient scaler: B * D, because float16 underflows in a mean's gradient."""
    loss = loss_function(indices, *tensors)
    return loss.detach(), *torch.autograd.grad(loss, tensors, torch.full_like(loss, scale))


def truth(reference, indices, weight, vals, bias, target, scale, parts, bar):
    """The same in float64: both losses are means over the samples, so the parts of the batch add up."""
    weight, vals, bias, target = (t.detach().double() for t in (weight, vals, bias, target))
    loss, d_weight, d_bias = torch.zeros_like(bias[0]), torch.zeros_like(weight), torch.zeros_like(bias)
    d_vals, d_target = torch.empty_like(vals), torch.empty_like(target)
    for part in parts:
        tensors = [t.requires_grad_() for t in (weight, vals[part].clone(), bias, target[part].clone())]
        share = len(indices[part]) / len(indices)
        outputs = step(reference, indices[part], *tensors, scale=scale * share)
        loss += outputs[0] * share
        d_weight += outputs[1]
        d_vals[part] = outputs[2]
        d_bias += outputs[3]
        d_target[part] = outputs[4]
        bar.update()
    return loss, d_weight, d_vals, d_bias, d_target


def relative_error(got: torch.Tensor, true: torch.Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())


def check(outputs, truths, args: argparse.Namespace) -> bool:
    """Print the relative Frobenius error of the loss and of each gradient, and whether all are within bounds."""
    dtype = getattr(torch, args.dtype)
    # Sums run over K, then D or B, in float32 at least; the rounding errors of n additions grow like sqrt(n).
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (args.K + args.D + args.batch) ** 0.5
    tqdm.write("  relative error against float64 (Frobenius)")
    passed = True
    for name, got, true in zip(("loss", *(f"d {name}" for name in NAMES)), outputs, truths, strict=True):
        # The result is rounded once: what that does to the true value, and a tenth for near ties that fall otherwise.
        bound = accumulated + 1.1 * relative_error(true.to(got.dtype), true)
        error = relative_error(got, true)
        good = error <= bound  # NaN is not
        passed &= good
        tqdm.write(f"    {name:<14}{error:>11.1e}   at most {bound:.1e}   {'ok' if good else 'MISMATCH'}")
    return passed


def measure(loss_function, inputs, scale, iters: int, bar) -> tuple[list[float], float] | None:
    """Milliseconds of each forward + backward, sorted, and the peak memory in GB; None if it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(iters)]
    try:
        for _ in range(WARMUP):
            step(loss_function, *inputs, scale=scale)
        for i, (start, end) in enumerate(events):
            start.record()
            step(loss_function, *inputs, scale=scale)
            end.record()
            # Wait for the step before: the bar stays honest, and a step that is longer than its launches never waits.
            events[max(i - 1, 0)][1].synchronize()
            bar.update()
    except torch.OutOfMemoryError:
        return None
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events), torch.cuda.max_memory_allocated() / 1e9


def report_speed(kernel, compiled) -> None:
    tqdm.write(f"  {'forward + backward':<18}{'median':>12}{'10 % .. 90 %':>24}{'peak memory':>16}")
    for name, measured in (("kernel", kernel), ("torch.compile", compiled)):
        if measured is None:
            tqdm.write(f"    {name:<16}{'out of memory':>52}")
            continue
        times, peak = measured
        low, high = (times[round(share * (len(times) - 1))] for share in (0.1, 0.9))
        spread = f"{low:.2f} .. {high:.2f} ms"
        tqdm.write(f"    {name:<16}{statistics.median(times):>9.2f} ms{spread:>24}{peak:>13.2f} GB")
    if kernel and compiled:
        faster = statistics.median(compiled[0]) / statistics.median(kernel[0])
        tqdm.write(f"    {'speed-up':<16}{faster:>9.1f} x{compiled[1] / kernel[1]:>38.1f} x")


def run(args: argparse.Namespace) -> bool:
    flex = load_package()
    # Both exist only once the package has loaded Triton.
    import triton

    place = torch.cuda.get_device_name() if CUDA else "no GPU: a small problem in Triton's interpreter, no timings"
    print(f"flex_sae   {place}   torch {torch.__version__}, triton {triton.__version__}")
    print(f"B={args.batch} K={args.K} F={args.F} D={args.D} {args.dtype}")

    inputs = make_inputs(args)
    scale = args.batch * args.D
    passed = True
    rows = max(1, PART_ELEMENTS // (args.K * args.D))
    parts = [slice(first, first + rows) for first in range(0, args.batch, rows)]
    steps = len(LOSSES) * (len(parts) + 1 + (2 * args.iters if CUDA else 0))
    with tqdm(total=steps, leave=False, disable=None, bar_format="{l_bar}{bar}|") as bar:
        for title, name in LOSSES.items():
            kernel, reference = getattr(flex, f"triton_{name}"), getattr(flex, name)
            tqdm.write(f"\n{title}")
            bar.set_description(f"{title}: float64 reference")
            truths = truth(reference, *inputs, scale, parts, bar)
            bar.set_description(f"{title}: kernel")
            passed &= check(step(kernel, *inputs, scale=scale), truths, args)
            bar.update()
            del truths
            if CUDA:
                bar.set_description(f"{title}: timing the kernel")
                ours = measure(kernel, inputs, scale, args.iters, bar)
                bar.set_description(f"{title}: timing torch.compile")
                report_speed(ours, measure(torch.compile(reference), inputs, scale, args.iters, bar))
    print("\nall within bounds" if passed else "\nMISMATCH: a loss or a gradient is outside its bound")
    return passed


def main() -> int:
    args = parse_options()
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if not CUDA and resource.getrlimit(resource.RLIMIT_DATA) == unlimited:
        # Linux lends memory that it does not have and kills whoever uses it; under this limit the allocation fails.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.RLIM_INFINITY))
    try:
        return 0 if run(args) else 1
    except (ValueError, OSError) as error:  # a size that the package refuses; a folder that cannot be written to
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        # The CPU allocator raises a plain RuntimeError.
        no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not no_memory:
            raise
        size = f"B={args.batch} K={args.K} F={args.F} D={args.D} {args.dtype}"
        print(f"{size} does not fit this machine's memory: choose smaller sizes", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
