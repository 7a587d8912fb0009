# /// script
# requires-python = ">=3.11"
# dependencies = ["kernels>=0.17,<0.18"]
# ///
"""Assemble build/torch-{cpu,cuda,rocm,xpu} from torch-ext without Nix, as kernel-builder does for a noarch kernel.

    uv run scripts/build_local.py [--out build]

Prints the path of each variant. Exits with 1 and one line on stderr if build.toml is invalid, a source file breaks a
rule of the Hub (nothing is written then), or the folder is not writable.
"""

import argparse
import ast
import fcntl
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

# Private, but the parser that kernel-builder itself uses; hence the narrow pin on kernels.
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

ROOT = Path(__file__).resolve().parent.parent

# Generated for each build; copies left in the sources do not ship.
GENERATED = {"_ops.py", "metadata.json"}

# The oldest Python that loads kernels from the Hub.
PYTHON = (3, 9)

# What is importable wherever torch is (it brings triton), without the standard modules newer than PYTHON.
ALLOWED_IMPORTS = sys.stdlib_module_names - {"tomllib", "annotationlib", "compression"} | {"torch", "triton"}

# These register an op whose name is their first argument. kernel-builder checks the decorators; define and impl write
# to the same global table.
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
    """Prefix an op name with the namespace of this build."""
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


class BuildError(Exception):
    """What is wrong with the sources, in one line."""


def build(out: Path) -> list[Path]:
    """Write one folder per backend into `out` and return their paths, in the order of build.toml.

    A variant that differs from what is there replaces it; everything else in `out` is left alone. The same sources give
    the same bytes, other sources another `id`.

    Raises:
        BuildError: build.toml is invalid or a source file breaks a rule of the Hub; nothing is written.
    """
    config = _read_config()
    general = config["general"]
    package = general["name"].replace("-", "_")
    sources = _read_sources(package, config["torch-noarch"].get("pyext", ["py", "pyi"]))

    content = hashlib.sha256((ROOT / "build.toml").read_bytes())
    for path, source in sources.items():
        content.update(f"\0{path}\0{len(source)}\0".encode() + source)
    # 48 bits do for the few builds that meet in one process and keep tracebacks readable.
    unique = content.hexdigest()[:12]

    out.mkdir(parents=True, exist_ok=True)
    variants = [out / f"torch-{backend}" for backend in general["backends"]]
    with (ROOT / "build.toml").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run in parallel build into the same folder
        staging = out / ".staging"
        shutil.rmtree(staging, ignore_errors=True)  # left by a build that was killed
        for backend, variant in zip(general["backends"], variants, strict=True):
            staged = staging / variant.name
            _write_variant(staged, general, backend, f"_{package}_{backend}_{unique}", sources)
            if _contents(staged) != _contents(variant):
                shutil.rmtree(variant, ignore_errors=True)
                staged.rename(variant)  # complete from the moment it appears
        shutil.rmtree(staging)
    return variants


def _contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder by path, without Python's caches."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _read_config() -> dict:
    try:
        Build.open(ROOT)
    except ValueError as error:
        raise BuildError(" ".join(str(error).split())) from None
    config = tomllib.loads((ROOT / "build.toml").read_text())
    if "torch-noarch" not in config:
        raise BuildError("build.toml: expected a [torch-noarch] section: Triton kernels need no compiler")
    if depends := config["general"].get("python-depends"):
        raise BuildError(f"build.toml: python-depends must be empty, as torch brings triton, got {depends}")
    return config


def _read_sources(package: str, extensions: list[str]) -> dict[str, bytes]:
    """The files that ship, sorted by their path in the package."""
    folder = ROOT / "torch-ext" / package
    if not (folder / "__init__.py").is_file():
        raise BuildError(f"torch-ext/{package}/__init__.py is missing")
    sources = {}
    for path in sorted(folder.rglob("*")):
        name, shown = path.relative_to(folder).as_posix(), path.relative_to(ROOT).as_posix()
        if path.is_symlink() or path.name.startswith(".") or name == package:
            raise BuildError(f"{shown}: links, hidden files and a nested {package} are not allowed in the package")
        if path.is_file() and path.suffix[1:] in extensions and name not in GENERATED:
            sources[name] = path.read_bytes()
            if path.suffix == ".py":
                _check_source(shown, name.count("/") + 1, sources[name])
    return sources


def _check_source(path: str, depth: int, source: bytes) -> None:
    """Refuse what would fail later, in kernel-builder or on a user's machine; `depth` is 1 at the package's top."""
    try:
        tree = ast.parse(source, path, feature_version=PYTHON)
    except SyntaxError as error:
        raise BuildError(f"{path}:{error.lineno}: not Python {PYTHON[0]}.{PYTHON[1]}: {error.msg}") from None
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            raise BuildError(f"{path}:{node.lineno}: forbidden import: it reaches outside the package")
        elif isinstance(node, ast.Call):
            _check_op_name(path, node)
        for module in modules:
            if module.partition(".")[0] not in ALLOWED_IMPORTS:
                allowed = "the standard library, torch, triton and relative imports"
                raise BuildError(f"{path}:{node.lineno}: forbidden import of `{module}`: use only {allowed}")


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
    """Write the sources, `_ops.py` and `metadata.json`."""
    for name, source in {**sources, "_ops.py": OPS_TEMPLATE.format(ops_name=ops_name).encode()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source)
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, folder)
    metadata = {
        "name": general["name"],
        "id": ops_name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": dict(sorted(digest.files.items()))},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    Metadata.read_from_file(folder / "metadata.json")  # raises if the Hub's client would


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
