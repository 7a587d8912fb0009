"""The implementations that are timed: the package as users load it, baselines, and plain torch."""

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
from cases import LOSSES, PEERS, Case

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "t-tech/flex-sae"


def load_package() -> ModuleType:
    """Build this checkout and load it through `get_kernel`."""
    sys.path.append(str(ROOT / "scripts"))
    from build_local import build
    from kernels import get_kernel

    build(ROOT / "build")
    os.environ["LOCAL_KERNELS"] = f"{REPO_ID}={ROOT}"
    return get_kernel(REPO_ID, version=1, trust_remote_code=[REPO_ID])


def load_baselines(arguments: list[str]) -> dict[str, ModuleType]:
    """Load every NAME=PATH. Exits with one sentence where that cannot be a row of its own."""
    baselines = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not name or not path:
            sys.exit(f"--baseline {argument}: expected NAME=PATH.")
        if name in baselines or name in ("flex_sae", *PEERS["topk"]):
            sys.exit(f"--baseline {argument}: another row is called {name}, choose a name of its own.")
        baselines[name] = load_baseline(Path(path).resolve())
    return baselines


def load_baseline(path: Path) -> ModuleType:
    """Load a Python file, or a folder with an __init__.py, that defines one of the losses or both."""
    source = path / "__init__.py" if path.is_dir() else path
    if source.suffix != ".py" or not source.is_file():
        sys.exit(f"{path} is neither a Python file nor a folder with an __init__.py.")
    name = f"baseline_{len(sys.modules)}"  # a name of its own
    folders = [str(path)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=folders)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not any(hasattr(module, f"triton_{loss}_sae_loss") for loss in LOSSES):
        sys.exit(f"{path} has neither triton_topk_sae_loss nor triton_hierarchical_sae_loss.")
    return module


def embedding_bag_loss(indices, weight, vals, bias, target):
    """TopK with torch's own kernel for weighted sums of rows."""
    recon = torch.nn.functional.embedding_bag(indices, weight, per_sample_weights=vals, mode="sum") + bias
    return torch.nn.functional.mse_loss(recon, target)


def dense_loss(indices, weight, vals, bias, target):
    """TopK with the activations scattered into [B, F] and a matmul."""
    acts = vals.new_zeros(len(vals), len(weight)).scatter(1, indices, vals)
    return torch.nn.functional.mse_loss(torch.addmm(bias, acts, weight), target)


@functools.cache
def compiled(function):
    """The modes of a shape share what torch.compile made for it."""
    return torch.compile(function, dynamic=False)


def implementations(case: Case, package: ModuleType, baselines: dict[str, ModuleType]) -> dict:
    """The functions of a case by the name of their row."""
    name = f"triton_{case.loss}_sae_loss"
    reference = getattr(package, f"{case.loss}_sae_loss")
    peers = {
        "torch eager": reference,
        "torch.compile": compiled(reference),
        "embedding_bag": embedding_bag_loss,
        "dense": dense_loss,
    }
    # A baseline need not know deterministic mode.
    others = {} if case.mode == "deterministic" else baselines
    return {
        "flex_sae": getattr(package, name),
        **{label: getattr(module, name) for label, module in others.items() if hasattr(module, name)},
        **{peer: peers[peer] for peer in case.peers},
    }
