"""The package under test is a real build, loaded the way users load it: through `kernels.get_kernel`."""

import os
from pathlib import Path

import torch

# Triton decides at import whether its functions are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest
from build_local import build
from kernels import get_kernel

REPO_ID = "t-tech/flex-sae"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter runs a kernel thousands of times slower than a GPU: few examples, and always the same ones, so that
# CI is repeatable. On a GPU every run looks at new ones. No deadline: the first example of a dtype pays for compiling.
hypothesis.settings.register_profile(
    "interpreter", max_examples=40, derandomize=True, database=None, deadline=None, print_blob=True
)
hypothesis.settings.register_profile("cuda", max_examples=30, deadline=None, print_blob=True)
hypothesis.settings.load_profile("interpreter" if INTERPRETED else "cuda")

# Tensors are tiny: threads would only wait for each other, longer than the work takes on a busy machine.
if INTERPRETED:
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """For `-n auto --dist loadfile`: a core for each file in the interpreter, and one process in all on a GPU."""
    return min(os.cpu_count(), len(list(Path(__file__).parent.glob("test_*.py")))) if INTERPRETED else 0


@pytest.fixture(scope="session")
def flex(tmp_path_factory):
    """The package, from a fresh local build, or from the build that LOCAL_KERNELS already names for it."""
    if f"{REPO_ID}=" not in os.environ.get("LOCAL_KERNELS", ""):
        out = tmp_path_factory.mktemp("flex-sae") / "build"
        build(out)
        os.environ["LOCAL_KERNELS"] = f"{REPO_ID}={out}"
    return get_kernel(REPO_ID, version=1, trust_remote_code=[REPO_ID])


@pytest.fixture(autouse=not INTERPRETED)
def launches_what_triton_would(flex, monkeypatch):
    """In all tests on a GPU, every compiled kernel that is launched without Triton is the one that Triton chooses."""
    launcher = flex.launch._CachedLauncher
    launch = launcher._launch

    def compared(self, grid, *args, **constants):
        key, _ = self._key_and_addresses(args, constants)
        compiled = self._compiled.get(key)
        if compiled is not None:
            warmup = self._kernel.warmup
            assert warmup(*args, grid=grid, **constants, **flex.launch._OPTIONS) is compiled
        launch(self, grid, *args, **constants)

    monkeypatch.setattr(launcher, "_launch", compared)


@pytest.fixture(scope="session")
def device():
    """Where tensors live: "cuda", or "cpu" under the interpreter."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="module", params=["topk", "hierarchical"])
def kind(request):
    """Tests that take it run for both losses."""
    return request.param


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
