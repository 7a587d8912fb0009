"""What example.py says and the exit code it ends with."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import build_local
import pytest
from support import INTERPRETED

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, ROOT / "example.py", "-B", "5", "-K", "3", "-F", "11", "-D", "7", "--iters", "2")
# What a GPU could run
IN_THE_INTERPRETER = [
    ("-B 2048 -K 256 -F 999 -D 99", "minutes in Triton's interpreter, more than 5: use a GPU"),
    ("--dtype bfloat16", "bfloat16 needs a GPU: Triton's interpreter"),
]
GRADIENTS = ("d weight", "d vals", "d bias", "d target")  # of a loss
ENCODER = ("selection", "d x", "d weight", "d bias")
# The higher of two equal features first
OTHER_TIES = """
lower_first = triton_topk_encode
def triton_topk_encode(x, weight, bias, k):
    vals, indices = lower_first(x, weight.flip(0), None if bias is None else bias.flip(0), k)
    return vals, len(weight) - 1 - indices
"""
# 1% off in the loss is 1% off in its gradients
LOSS_OFF = """
def triton_topk_sae_loss(*inputs):
    return 1.01 * topk_sae_loss(*inputs)
"""


def run_example(*options: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *options], env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_selection_and_every_loss_and_gradient_is_within_its_bound(dtype):
    if dtype == "bfloat16" and INTERPRETED:
        pytest.skip("the interpreter truncates to bfloat16")
    ran = run_example("--dtype", dtype)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(" ok\n") == len(ENCODER) + 2 * (1 + len(GRADIENTS))
    for name in {*ENCODER, *GRADIENTS}:
        assert ran.stdout.count(f" {name} ") == (name in ENCODER) + 2 * (name in GRADIENTS)
    assert ran.stdout.endswith("all within bounds\n")
    assert ("interpreter" in ran.stdout) == INTERPRETED
    assert ran.stdout.count("torch.compile") == (0 if INTERPRETED else 2)
    assert ("training step" in ran.stdout) != INTERPRETED


@pytest.mark.parametrize(("code", "wrong"), [(LOSS_OFF, 1 + len(GRADIENTS)), (OTHER_TIES, 1)])
def test_the_build_in_local_kernels_is_loaded_and_what_is_off_in_it_is_a_mismatch(tmp_path, code, wrong):
    for variant in build_local.build(tmp_path):
        with (variant / "__init__.py").open("a") as init:
            init.write(f"\n{code}")
    ran = run_example("-B", "40", LOCAL_KERNELS=f"t-tech/flex-sae={tmp_path}")  # enough samples for ties
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ran.stdout.count(" MISMATCH\n") == wrong
    assert ran.stdout.endswith("MISMATCH: a result is outside its bound\n")


def test_ctrl_c_ends_it_with_one_line():
    long = ["-B", "64", "-K", "32", "-F", "4096", "-D", "256", "--iters", "100000"]
    with subprocess.Popen([*COMMAND, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as example:
        while "Encoder" not in example.stdout.readline():
            assert example.poll() is None, example.stderr.read()
        example.send_signal(signal.SIGINT)
        assert example.communicate(timeout=60)[1] == "interrupted\n"
    assert example.returncode == 130


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-K 12 -F 11", "K must be at most F, got K=12 F=11"),
        ("-B 0", "B must be at least 1, got 0"),
        ("--iters 0", "iters must be at least 1, got 0"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("-B 1 -K 1 -F 2 -D 1048577", "D <= 2**20, got B=1, k=1, F=2, D=1048577"),
        ("-F 10000000000000", "GiB of memory, more than the "),
        *(IN_THE_INTERPRETER if INTERPRETED else []),
    ],
)
def test_what_it_cannot_run_is_refused_with_a_sentence(options, message):
    ran = run_example(*options.split())
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert message in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
