"""The documents: their code runs as written, their links lead somewhere, and README stays short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("semantics", "performance", "trainers", "training")
DOCUMENTS = ("README.md", "CARD.md", "CHANGELOG.md", *(f"docs/{page}.md" for page in PAGES))

# A plain CPU in any case: the interpreter is too slow for a training run. One thread: more would wait for each other.
PLACES = {"cpu": {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}}
if torch.cuda.is_available():
    PLACES["cuda"] = {}


@pytest.mark.parametrize("place", PLACES)
def test_the_code_of_readme_runs_and_explains_more_variance(flex, place):
    """One block after the other, as a reader would paste them."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    environment = {**os.environ, **PLACES[place]}  # with the LOCAL_KERNELS that `flex` has set
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    explained = [float(value) for value in re.findall(r"8: ([\d.-]+)}", ran.stdout)]
    assert len(explained) > 2
    assert explained[0] < 0.5 < 0.8 < explained[-1]


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere_and_nothing_shows_blanket_trust(document):
    path = ROOT / document
    assert "trust_remote_code=True" not in path.read_text()
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)]*)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_readme_stays_short():
    assert len(README.split()) <= 1400
    assert README.count("![") == 1
    assert len(re.findall(r"^\| ?-", README, re.MULTILINE)) <= 3


def test_tables_are_those_of_the_results():
    command = [sys.executable, ROOT / "benchmarks" / "report.py", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
