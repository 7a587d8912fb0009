"""What a build holds, which sources it refuses, and how builds load."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build_local
import jinja2
import kernels
import pytest
import torch
from kernels._rust import Digest, DigestAlgorithm, Metadata
from support import make_problem

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
INIT = "torch-ext/flex_sae/__init__.py"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of everything that a build reads, from which `build_local` builds; tests edit it."""
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


def run_script(checkout: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, checkout / "scripts/build_local.py"], capture_output=True, text=True)


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


def test_same_content_gives_the_same_bytes(checkout, tmp_path):
    build_local.build(tmp_path / "one")
    # A generated file left in the sources and an older build do not count as content.
    (checkout / "torch-ext/flex_sae/_ops.py").write_text("stale")
    (tmp_path / "two/torch-cpu").mkdir(parents=True)
    (tmp_path / "two/torch-cpu/removed.py").write_text("stale")
    build_local.build(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_only_variants_that_differ_are_replaced(checkout, tmp_path):
    variants = cpu, cuda, *_ = build_local.build(tmp_path / "build")
    before = [variant.stat().st_ino for variant in variants]
    (cpu / "__pycache__").mkdir()
    (cpu / "__pycache__/checks.cpython-311.pyc").touch()
    (cuda / "__init__.py").write_text("edited")
    (tmp_path / "build/.staging/torch-cpu").mkdir(parents=True)  # as a build that was killed leaves it
    (tmp_path / "build/notes.txt").touch()
    assert build_local.build(tmp_path / "build") == variants
    replaced = [variant for variant, inode in zip(variants, before, strict=True) if variant.stat().st_ino != inode]
    assert replaced == [cuda]
    assert {path.name for path in (tmp_path / "build").iterdir()} == {"notes.txt", *(path.name for path in variants)}


def test_parallel_builds_do_not_disturb_each_other(checkout):
    command = [sys.executable, checkout / "scripts/build_local.py"]
    for change in range(3):
        append(checkout / INIT, f"# change {change}\n")
        builds = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(4)]
        assert [build.communicate()[1] for build in builds] == [b""] * 4
    alone = build_local.build(checkout / "alone")
    assert [contents(checkout / "build" / variant.name) for variant in alone] == [*map(contents, alone)]


@pytest.mark.parametrize("file", [INIT, "torch-ext/flex_sae/NOTICE.txt", "build.toml"])
def test_a_change_of_any_file_changes_every_id(checkout, tmp_path, file):
    before = build_local.build(tmp_path / "before")
    append(checkout / file, "\n# changed\n")
    variants = before + build_local.build(tmp_path / "after")
    ids = {Metadata.read_from_file(variant / "metadata.json").id for variant in variants}
    assert len(ids) == len(variants) == 2 * len(BACKENDS)


@pytest.mark.parametrize("name", ["link.txt", ".hidden.py", ".ipynb_checkpoints/copy.py", "flex_sae/__init__.py"])
def test_links_hidden_files_and_nested_packages_are_refused(checkout, tmp_path, name):
    stray = checkout / "torch-ext/flex_sae" / name
    stray.parent.mkdir(exist_ok=True)
    stray.symlink_to("/etc/hostname") if name == "link.txt" else stray.touch()
    with pytest.raises(build_local.BuildError, match=f"flex_sae/{name.partition('/')[0]}: links, hidden files and"):
        build_local.build(tmp_path / "build")


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("[torch-noarch]", "universal = true", r"Cannot parse TOML.*build\.toml: Unknown field universal"),
        ("[general]", 'python-depends = ["triton"]', r"python-depends must be empty, .* got \['triton'\]"),
    ],
)
def test_an_invalid_build_toml_is_refused(checkout, tmp_path, section, line, message):
    toml = checkout / "build.toml"
    toml.write_text(toml.read_text().replace(section, f"{section}\n{line}"))
    with pytest.raises(build_local.BuildError, match=message):
        build_local.build(tmp_path / "build")
    assert not (tmp_path / "build").exists()


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


def test_a_source_within_the_rules_is_accepted(checkout, tmp_path):
    append(checkout / INIT, "import torch.nn.functional, collections.abc\nfrom . import checks\n")
    append(
        checkout / INIT,
        "torch.library.define(add_op_namespace_prefix('f'), '() -> ()')\n@f.register_fake\ndef g(): ...",
    )
    assert build_local.build(tmp_path / "build")


def test_the_script_prints_the_paths_or_fails_with_one_line(checkout):
    ran = run_script(checkout)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split() == [str(checkout / f"build/torch-{backend}") for backend in BACKENDS]
    shutil.rmtree(checkout / "build")
    (checkout / "build").touch()
    unwritable = run_script(checkout)
    append(checkout / INIT, "import numpy\n")
    forbidden = run_script(checkout)
    assert (unwritable.returncode, unwritable.stdout) == (forbidden.returncode, forbidden.stdout) == (1, "")
    assert re.fullmatch(r"error: .*build'\n", unwritable.stderr)
    assert re.fullmatch(rf"error: {INIT}:\d+: forbidden import of `numpy`: .*\n", forbidden.stderr)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_variant_loads_and_runs(checkout, backend, device):
    build_local.build(checkout / "build")
    # The path of a variant loads it whatever backend torch was built for.
    flex = kernels.get_local_kernel(checkout / "build" / f"torch-{backend}")
    assert flex.__name__.startswith(f"_flex_sae_{backend}_")
    inputs = make_problem(3, 2, 7, 5, device=device)
    torch.testing.assert_close(flex.triton_topk_sae_loss(*inputs), flex.topk_sae_loss(*inputs))


def test_two_builds_load_side_by_side(flex, checkout, device):
    append(checkout / INIT, "\n# another version\n")
    build_local.build(checkout / "build")
    other = kernels.get_local_kernel(checkout)
    assert other.__name__ != flex.__name__
    inputs = make_problem(3, 2, 7, 5, device=device)
    for name in ("triton_topk_sae_loss", "triton_hierarchical_sae_loss"):
        assert getattr(other, name) is not getattr(flex, name)
        assert getattr(other, name).__module__.startswith(other.__name__)
        assert torch.equal(getattr(other, name)(*inputs), getattr(flex, name)(*inputs))


def test_importing_needs_no_gpu_and_no_driver(checkout):
    build_local.build(checkout / "build")
    code = (
        "import sys, pathlib, kernels, torch; kernels.get_local_kernel(pathlib.Path(sys.argv[1]));"
        "assert not torch.cuda.is_initialized()"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code, checkout], env=env, check=True)


@pytest.mark.parametrize("name, said", [("NOTICE", "2505.24473"), ("LICENSE", "Version 2.0, January 2004")])
def test_notice_and_licence_ship_with_the_package(name, said):
    text = (ROOT / name).read_text()
    assert text == (ROOT / f"torch-ext/flex_sae/{name}.txt").read_text()
    assert said in text


@pytest.mark.parametrize("filled", [True, False])
def test_the_card_renders(filled):
    # All that kernel-builder fills in; StrictUndefined raises for any other variable.
    variables = {"repo_id": "t-tech/flex-sae", "version": 1, "license": "Apache-2.0", "has_benchmark": filled}
    variables |= {"functions": ["triton_topk_sae_loss"] * filled, "layers": ["Layer"] * filled}
    card = jinja2.Template((ROOT / "CARD.md").read_text(), undefined=jinja2.StrictUndefined).render(variables)
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert 'get_kernel("t-tech/flex-sae", version=1, trust_remote_code=["t-tech/flex-sae"])' in card
    assert all((text in card) == filled for text in ("- `triton_topk_sae_loss`", "- `Layer`", "kernels benchmark"))
