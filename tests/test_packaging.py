"""The package as the Hub sees it: what a build holds, what a build refuses, and how builds load."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import build_local
import jinja2
import kernels
import pytest
import torch
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
INIT = "torch-ext/flex_sae/__init__.py"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what a build reads, free to be edited; `build_local` builds from it."""
    folder = tmp_path / "checkout"
    for name in ("scripts", "torch-ext"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "build.toml", folder)
    monkeypatch.setattr(build_local, "ROOT", folder)
    return folder


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids(variants: list[Path]) -> list[str]:
    return [Metadata.read_from_file(variant / "metadata.json").id for variant in variants]


# An environment in which torch sees no GPU and nobody asks for the interpreter
PLAIN_CPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}


def run_python(code: str, **env: str) -> str:
    """Run `code` in a Python of its own and return what it printed."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def example_inputs(device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(7, (3, 2), generator=generator)
    tensors = [torch.randn(shape, generator=generator) for shape in ((7, 5), (3, 2), (5,), (3, 5))]
    return tuple(tensor.to(device) for tensor in (indices, *tensors))


@pytest.mark.kernels_ci
def test_build_toml_validates():
    assert [str(backend) for backend in Build.open(ROOT).general.backends] == list(BACKENDS)


@pytest.mark.kernels_ci
def test_a_build_holds_every_variant_with_valid_metadata(checkout, tmp_path):
    variants = build_local.build(tmp_path / "build")
    assert [variant.name for variant in variants] == [f"torch-{backend}" for backend in BACKENDS]
    sources = {path.name for path in (checkout / "torch-ext/flex_sae").iterdir()}
    for variant, backend in zip(variants, BACKENDS, strict=True):
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert (str(metadata.name), metadata.version, metadata.license) == ("flex-sae", 1, "Apache-2.0")
        assert str(metadata.backend.backend_type) == backend
        assert set(contents(variant)) == sources | {"_ops.py", "metadata.json"}
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def test_kernels_info_understands_a_build(checkout):
    build_local.build(checkout / "build")
    said = run_python(f"from kernels.cli import main; import sys; sys.argv[1:] = ['info', {str(checkout)!r}]; main()")
    assert "Name: flex-sae\nVersion: 1\n" in said
    assert "Backends: cpu, cuda, rocm, xpu\n" in said


def test_same_content_gives_the_same_bytes(checkout, tmp_path):
    build_local.build(tmp_path / "one")
    # Neither leftovers of a builder in the sources nor an older build in the way count as content.
    (checkout / "torch-ext/flex_sae/_ops.py").write_text("stale")
    (tmp_path / "two/torch-cpu").mkdir(parents=True)
    (tmp_path / "two/torch-cpu/removed.py").write_text("stale")
    build_local.build(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_is_already_there_is_left_alone(checkout, tmp_path):
    variants = build_local.build(tmp_path / "build")
    before = [variant.stat().st_ino for variant in variants]
    (variants[0] / "__pycache__").mkdir()
    (variants[0] / "__pycache__/checks.cpython-311.pyc").touch()
    (variants[1] / "checks.py").write_text("edited")
    (tmp_path / "build/.staging-killed/torch-cpu").mkdir(parents=True)
    assert build_local.build(tmp_path / "build") == variants
    assert [variant.stat().st_ino == inode for variant, inode in zip(variants, before, strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert sorted((tmp_path / "build").iterdir()) == sorted(variants)


def test_builds_wait_for_each_other(checkout):
    command = [sys.executable, checkout / "scripts/build_local.py"]
    for change in range(3):
        append(checkout / INIT, f"# change {change}\n")
        builds = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(4)]
        assert [build.communicate()[1] for build in builds] == [b""] * 4
    alone = build_local.build(checkout / "alone")
    assert [contents(checkout / "build" / variant.name) for variant in alone] == [*map(contents, alone)]


@pytest.mark.parametrize("file", [INIT, "torch-ext/flex_sae/NOTICE.txt", "build.toml"])
def test_changed_content_changes_every_id(checkout, tmp_path, file):
    before = ids(build_local.build(tmp_path / "build"))
    append(checkout / file, "\n# changed\n")
    after = ids(build_local.build(tmp_path / "build"))
    assert len(set(before + after)) == 2 * len(BACKENDS)


@pytest.mark.parametrize("name", ["link.txt", ".hidden.py", ".ipynb_checkpoints/copy.py", "flex_sae/__init__.py"])
def test_what_is_no_part_of_the_package_is_refused(checkout, tmp_path, name):
    stray = checkout / "torch-ext/flex_sae" / name
    stray.parent.mkdir(exist_ok=True)
    stray.symlink_to("/etc/hostname") if name == "link.txt" else stray.touch()
    with pytest.raises(build_local.BuildError, match=f"torch-ext/flex_sae/{name.partition('/')[0]}: a link, a hidden"):
        build_local.build(tmp_path / "build")


def test_a_bad_build_toml_is_refused(checkout, tmp_path):
    append(checkout / "build.toml", '\n[torch]\nsrc = ["extension.cpp"]\nuniversal = true\n')
    with pytest.raises(build_local.BuildError, match=r"Cannot parse TOML.*build\.toml: Unknown field universal"):
        build_local.build(tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_python_depends_is_refused(checkout, tmp_path):
    toml = (checkout / "build.toml").read_text()
    (checkout / "build.toml").write_text(toml.replace("edition", 'python-depends = ["triton"]\nedition'))
    with pytest.raises(build_local.BuildError, match=r"python-depends must be empty, .* got \['triton'\]"):
        build_local.build(tmp_path / "build")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import numpy", "forbidden import of `numpy`"),
        ("import tomllib", "forbidden import of `tomllib`"),
        ("from kernels import get_kernel", "forbidden import of `kernels`"),
        ("def f():\n    import os, torch_scatter", "forbidden import of `torch_scatter`"),
        ("from flex_sae import checks", "forbidden import of `flex_sae`"),
        ("from .. import checks", "forbidden import: it reaches outside the package"),
        ("match 1:\n    case _:\n        pass", r"not Python 3\.9"),
        ("def f(:", r"not Python 3\.9: invalid syntax"),
        ('@torch.library.custom_op("flex_sae::f", mutates_args=())\ndef f(): ...', "got 'flex_sae::f'"),
        ("torch.library.define(NAME, '() -> ()')", "`torch.library.define` must be add_op_namespace_prefix.* got NAME"),
        ('@f.register_kernel("cuda")\ndef g(): ...', "`f.register_kernel` must be add_op_namespace_prefix"),
    ],
)
def test_a_source_that_breaks_a_rule_of_the_hub_is_refused(checkout, tmp_path, code, message):
    lines = (checkout / INIT).read_text().count("\n")
    append(checkout / INIT, f"{code}\n")
    with pytest.raises(build_local.BuildError, match=message) as error:
        build_local.build(tmp_path / "build")
    file, line = str(error.value).split(":")[:2]
    assert file == INIT
    assert lines < int(line) <= lines + 1 + code.count("\n")
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import torch.nn.functional, collections.abc",
        "from . import checks",
        "@f.register_fake\ndef g(): ...",
        "torch.library.define(add_op_namespace_prefix('f'), '() -> ()')",
    ],
)
def test_a_source_within_the_rules_is_accepted(checkout, tmp_path, code):
    append(checkout / INIT, f"{code}\n")
    assert build_local.build(tmp_path / "build")


def test_the_script_prints_the_paths(checkout):
    ran = subprocess.run([sys.executable, checkout / "scripts/build_local.py"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(checkout / f"build/torch-{backend}") for backend in BACKENDS]


def test_the_script_fails_with_one_line(checkout):
    append(checkout / INIT, "import numpy\n")
    ran = subprocess.run([sys.executable, checkout / "scripts/build_local.py"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert re.fullmatch(rf"error: {INIT}:\d+: forbidden import of `numpy`: .*\n", ran.stderr)
    assert not ran.stdout
    assert not (checkout / "build").exists()


def test_a_folder_that_cannot_be_written_to_is_named(checkout):
    (checkout / "build").touch()
    ran = subprocess.run([sys.executable, checkout / "scripts/build_local.py"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert re.fullmatch(r"error: .*build'\n", ran.stderr)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_variant_loads_and_runs(checkout, backend, device):
    build_local.build(checkout / "build")
    # Naming the folder of a variant loads it whatever torch was compiled for; the code is the same in all of them.
    flex = kernels.get_local_kernel(checkout / "build" / f"torch-{backend}")
    assert flex.__name__.startswith(f"_flex_sae_{backend}_")
    inputs = example_inputs(device)
    torch.testing.assert_close(flex.triton_topk_sae_loss(*inputs), flex.topk_sae_loss(*inputs))


def test_two_builds_load_side_by_side(flex, checkout, device):
    append(checkout / INIT, "\n# another version\n")
    build_local.build(checkout / "build")
    other = kernels.get_local_kernel(checkout)
    assert other.__name__ != flex.__name__
    inputs = example_inputs(device)
    for name in ("triton_topk_sae_loss", "triton_hierarchical_sae_loss"):
        assert getattr(other, name) is not getattr(flex, name)
        assert getattr(other, name).__module__.startswith(other.__name__)
        assert torch.equal(getattr(other, name)(*inputs), getattr(flex, name)(*inputs))


def test_importing_needs_no_gpu_and_no_driver(checkout):
    build_local.build(checkout / "build")
    run_python(
        f"""
        from pathlib import Path
        import torch
        from kernels import get_local_kernel
        assert get_local_kernel(Path({str(checkout)!r})).triton_topk_sae_loss
        assert not torch.cuda.is_initialized()
        """,
        **PLAIN_CPU,
    )


def test_the_public_interface_is_a_literal_list(flex):
    public = [
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / INIT).read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    ]
    assert public == [flex.__all__]
    assert all(callable(getattr(flex, name)) for name in flex.__all__)


@pytest.mark.parametrize("name, said", [("NOTICE", "2505.24473"), ("LICENSE", "Version 2.0, January 2004")])
def test_notice_and_licence_ship_with_the_package(name, said):
    text = (ROOT / name).read_text()
    assert text == (ROOT / f"torch-ext/flex_sae/{name}.txt").read_text()
    assert said in text


@pytest.mark.parametrize("filled", [True, False])
def test_the_card_renders(filled):
    # The variables that kernel-builder fills in; StrictUndefined refuses any other.
    variables = {
        "repo_id": "t-tech/flex-sae",
        "version": 1,
        "license": "Apache-2.0",
        "functions": ["triton_topk_sae_loss"] if filled else [],
        "layers": ["Layer"] if filled else [],
        "has_benchmark": filled,
    }
    card = jinja2.Template((ROOT / "CARD.md").read_text(), undefined=jinja2.StrictUndefined).render(variables)
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert 'get_kernel("t-tech/flex-sae", version=1, trust_remote_code=True)' in card
    assert ("- `triton_topk_sae_loss`" in card) == ("- `Layer`" in card) == ("kernels benchmark" in card) == filled


def python_blocks(markdown: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("where", [{}, PLAIN_CPU], ids=["here", "plain CPU"])
@pytest.mark.parametrize("block", python_blocks((ROOT / "README.md").read_text()))
def test_the_readme_runs_as_written(flex, block, where):
    run_python(block, **where)  # with the LOCAL_KERNELS that `flex` has set


def test_the_readme_shows_python():
    assert python_blocks((ROOT / "README.md").read_text())


def test_the_tables_of_readme_are_those_of_the_results(tmp_path):
    readme = shutil.copy(ROOT / "README.md", tmp_path)
    subprocess.run([sys.executable, ROOT / "benchmarks/table.py", "--readme", readme], check=True)
    assert Path(readme).read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["TopKBenchmark", "HierarchicalBenchmark"])
def test_the_benchmark_of_the_hub_verifies(flex, device, name):
    # As `kernels benchmark` does, with its tolerance
    benchmark = runpy.run_path(ROOT / "benchmarks/benchmark.py")[name]()
    benchmark.kernel, benchmark.device = flex, device
    benchmark.setup()
    for workload in ("loss", "step"):
        getattr(benchmark, f"benchmark_{workload}")()
        assert torch.allclose(benchmark.out, getattr(benchmark, f"verify_{workload}")(), atol=1e-2)
