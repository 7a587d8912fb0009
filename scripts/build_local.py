# /// script
# requires-python = ">=3.11"
# dependencies = ["kernels>=0.17,<0.18"]
# ///
"""Assemble build/torch-{cpu,cuda,rocm,xpu} from torch-ext without Nix, as kernel-builder does for a noarch kernel.

    uv run scripts/build_local.py [--out build]

Prints one path per variant. Exits with 1 and one line on stderr when build.toml does not validate or a source file
breaks a rule of the Hub, then nothing is written, or when the folder cannot be written to.
"""

import argparse
import ast
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

# `_rust` is private but is the parser of kernel-builder itself, hence the narrow pin on kernels.
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

ROOT = Path(__file__).resolve().parent.parent

# The builder generates these; leftovers in the source folder are not content.
GENERATED = {"_ops.py", "metadata.json"}

# The oldest Python that loads a kernel from the Hub.
PYTHON = (3, 9)

# A kernel loads wherever torch does; triton comes with torch. Three modules are newer than PYTHON.
ALLOWED_IMPORTS = sys.stdlib_module_names - {"tomllib", "annotationlib", "compression"} | {"torch", "triton"}

# Whatever registers an op takes the op's name first. kernel-builder insists on the literal call for the decorators;
# define and impl put an op into the same global table.
OP_DECORATORS = {
    "custom_op",
    "triton_op",
    "register_kernel",
    "register_fake",
    "register_vmap",
    "register_torch_dispatch",
}
OP_FUNCTIONS = {"torch.library.define", "torch.library.impl"}

OPS_TEMPLATE = '''\
import torch

_OPS_NAME = "{ops_name}"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """Prefix an op name with the namespace that belongs to this build alone."""
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


class BuildError(Exception):
    """What is wrong with the sources, in one line."""


def build(out: Path) -> list[Path]:
    """Write one folder per backend of build.toml into `out` and return their paths, in the order of build.toml.

    A folder of the same name that is already there is replaced, unless it holds the same; the rest of `out` is left
    alone. The same sources give the same bytes, and any other source gives another `id`. Builds into one folder wait
    for each other.

    Raises:
        BuildError: build.toml does not validate, or a source file breaks a rule of the Hub. Nothing is written.
    """
    config = _read_config()
    general = config["general"]
    package = general["name"].replace("-", "_")
    sources = _read_sources(package, config["torch-noarch"].get("pyext", ["py", "pyi"]))

    content = hashlib.sha256((ROOT / "build.toml").read_bytes())
    for path, source in sources.items():
        content.update(f"\0{path}\0{len(source)}\0".encode() + source)
    # 48 bits: builds that meet in one process are a handful, and the id stays readable in a traceback.
    unique = content.hexdigest()[:12]

    out.mkdir(parents=True, exist_ok=True)
    variants = [out / f"torch-{backend}" for backend in general["backends"]]
    with _locked(out):
        for left_behind in out.glob(".staging-*"):  # by a build that was killed
            shutil.rmtree(left_behind)
        # Staged beside the target, so that each folder appears complete, by one rename.
        with tempfile.TemporaryDirectory(dir=out, prefix=".staging-") as staging:
            for backend, variant in zip(general["backends"], variants, strict=True):
                staged = Path(staging) / variant.name
                _write_variant(staged, general, backend, f"_{package}_{backend}_{unique}", sources)
                if _contents(staged) != _contents(variant):
                    shutil.rmtree(variant, ignore_errors=True)
                    staged.rename(variant)
    return variants


@contextlib.contextmanager
def _locked(folder: Path):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder by path, but for what Python caches there."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _read_config() -> dict:
    try:
        Build.open(ROOT)
    except ValueError as error:
        raise BuildError(" ".join(str(error).split())) from None
    config = tomllib.loads((ROOT / "build.toml").read_text())
    if "torch-noarch" not in config:
        raise BuildError("build.toml: expected a [torch-noarch] section, the kernels are Triton and need no compiler")
    if depends := config["general"].get("python-depends"):
        raise BuildError(f"build.toml: python-depends must be empty, torch brings triton, got {depends}")
    return config


def _read_sources(package: str, extensions: list[str]) -> dict[str, bytes]:
    """The files that ship, by path inside the package, sorted."""
    folder = ROOT / "torch-ext" / package
    if not (folder / "__init__.py").is_file():
        raise BuildError(f"torch-ext/{package}/__init__.py is missing")
    sources = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or path.name.startswith(".") or name == package:
            raise BuildError(f"{path.relative_to(ROOT)}: a link, a hidden file or a second {package} is no part of it")
        if path.is_file() and path.suffix[1:] in extensions and name not in GENERATED:
            sources[name] = path.read_bytes()
            if path.suffix == ".py":
                _check_source(path.relative_to(ROOT).as_posix(), name.count("/") + 1, sources[name])
    return sources


def _check_source(path: str, depth: int, source: bytes) -> None:
    """Refuse what fails only later, in kernel-builder or on a user's machine. `depth` is 1 at the package's top."""
    try:
        tree = ast.parse(source, path, feature_version=PYTHON)
    except SyntaxError as error:
        raise BuildError(f"{path}:{error.lineno}: not Python {PYTHON[0]}.{PYTHON[1]}: {error.msg}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            _check_imports(path, node.lineno, [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            _check_imports(path, node.lineno, [node.module])
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            raise BuildError(f"{path}:{node.lineno}: forbidden import: it reaches outside the package")
        elif isinstance(node, ast.Call):
            _check_op_name(path, node)


def _check_imports(path: str, line: int, modules: list[str]) -> None:
    for module in modules:
        if module.partition(".")[0] not in ALLOWED_IMPORTS:
            raise BuildError(
                f"{path}:{line}: forbidden import of `{module}`: "
                "only the standard library, torch, triton and relative imports load everywhere"
            )


def _check_op_name(path: str, call: ast.Call) -> None:
    function = ast.unparse(call.func)
    if function.rpartition(".")[2] not in OP_DECORATORS and function not in OP_FUNCTIONS:
        return
    name = ast.unparse(call.args[0]) if call.args else "nothing"
    if not name.startswith("add_op_namespace_prefix("):
        raise BuildError(
            f"{path}:{call.lineno}: the first argument of `{function}` must be add_op_namespace_prefix(...), "
            f"so that two builds load side by side, got {name}"
        )


def _write_variant(folder: Path, general: dict, backend: str, ops_name: str, sources: dict[str, bytes]) -> None:
    """Write one variant: the sources flat in `folder`, the generated `_ops.py` and `metadata.json`."""
    for name, source in {**sources, "_ops.py": OPS_TEMPLATE.format(ops_name=ops_name).encode()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source)
    metadata = {
        "name": general["name"],
        "id": ops_name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": dict(sorted(Digest.hash_variant(DigestAlgorithm.SHA256, folder).files.items())),
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    Metadata.read_from_file(folder / "metadata.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Assemble the kernel's build folders from torch-ext without Nix.")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="where the variants go (default: %(default)s)")
    try:
        for variant in build(parser.parse_args().out):
            print(variant)
    except (BuildError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
