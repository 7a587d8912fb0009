"""example.py: what it says and the exit code it ends with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_local
import pytest
from support import INTERPRETED

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("-B", "5", "-K", "3", "-F", "11", "-D", "7", "--iters", "2")
GRADIENTS = ("d weight", "d vals", "d bias", "d target")


def run_example(*options: str, script: Path = ROOT / "example.py", **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *options], env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_loss_and_gradient_is_within_its_bound(dtype):
    if dtype == "bfloat16" and INTERPRETED:
        pytest.skip("the interpreter truncates to bfloat16")
    ran = run_example(*SMALL, "--dtype", dtype)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(" ok\n") == 2 * (1 + len(GRADIENTS))
    assert all(ran.stdout.count(f"{name} ") == 2 for name in GRADIENTS)
    assert ran.stdout.endswith("all within bounds\n")
    assert ("interpreter" in ran.stdout) == INTERPRETED
    assert ("speed-up" in ran.stdout) != INTERPRETED


def test_without_a_checkout_it_loads_through_the_hub_and_finds_a_mismatch(tmp_path):
    # LOCAL_KERNELS stands in for the Hub. A loss that is 1 % off makes its gradients 1 % off as well.
    for variant in build_local.build(tmp_path / "build"):
        with (variant / "__init__.py").open("a") as init:
            init.write("\n\ndef triton_topk_sae_loss(*inputs):\n    return 1.01 * topk_sae_loss(*inputs)\n")
    script = shutil.copy(ROOT / "example.py", tmp_path)
    ran = run_example(*SMALL, script=script, LOCAL_KERNELS=f"t-tech/flex-sae={tmp_path}")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ran.stdout.count("MISMATCH\n") == 1 + len(GRADIENTS)
    assert "MISMATCH: a loss or a gradient is outside its bound" in ran.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-K", "12", "-F", "11"], "K active features need a dictionary of at least as many: got K=12, F=11"),
        (["-B", "0"], "batch must be at least 1, got 0"),
        (["-D", "-3"], "D must be at least 1, got -3"),
        (["--iters", "0"], "iters must be at least 1, got 0"),
        (["-B", "1", "-K", "1", "-F", "2", "-D", str(2**20 + 1)], "D <= 2**20, got (2, 1048577)"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_options_get_a_sentence(options, message):
    ran = run_example(*options)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_bfloat16_is_refused_where_it_would_be_truncated():
    if not INTERPRETED:
        pytest.skip("a GPU rounds")
    ran = run_example("--dtype", "bfloat16")
    assert ran.returncode == 2
    assert "bfloat16 needs a GPU: Triton's interpreter truncates where a GPU rounds" in ran.stderr


def test_a_size_beyond_the_memory_gets_a_sentence():
    ran = run_example(*SMALL, "-F", str(10**13))
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert ran.stderr.endswith(
        "F=10000000000000 D=7 float32 does not fit this machine's memory: choose smaller sizes\n"
    )
