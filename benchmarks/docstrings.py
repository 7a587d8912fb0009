"""`python benchmarks/docstrings.py FILE` writes the docstrings of Python and the installed packages to a file: English
text for `examples/train_sae.py --text`.
"""

import argparse
import ast
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def docstrings(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    folders = [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    with ProcessPoolExecutor() as processes:
        texts = [text for found in processes.map(docstrings, files, chunksize=64) for text in found]
    long = dict.fromkeys(text for text in texts if len(text) > 120)  # each once
    args.out.write_text("\n\n".join(long), encoding="utf-8", errors="replace")
    print(f"{len(long)} docstrings, {args.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
