"""Results files, JSON lines: the environment first, then one record a line."""

import json
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it does not run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """The commit, with -dirty where the tree has changes that matter: results and the documents they go to do not."""
    if "FLEX_SAE_COMMIT" in os.environ:  # for a copy of the checkout without its .git
        return os.environ["FLEX_SAE_COMMIT"]
    dirty = output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs")
    return (output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if dirty else "")


def environment(command: str) -> dict[str, str]:
    """What the figures depend on."""
    import torch
    import triton

    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "command": command,
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.partition("\n")[0] or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def append(path: Path, lines: list[dict]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def load(path: Path) -> tuple[dict, list[dict]]:
    """The environment and the records."""
    about, *records = map(json.loads, path.read_text().splitlines())
    return about, records
