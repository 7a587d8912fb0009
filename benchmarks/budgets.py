"""One HierarchicalTopK SAE beside TopK SAEs of several budgets: `examples/train_sae.py --compare`, for the report.

`python benchmarks/budgets.py --activations shards/` runs it on synthetic activations and on these.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import records

SCRIPT = records.ROOT / "examples" / "train_sae.py"
OPTIONS = {"synthetic": "", "activations": "-F 12288 -K 128 --steps 8000"}
HIERARCHICAL, EACH, CUT = "HierarchicalTopK", "TopK, an SAE for each k", "TopK, the SAE of the largest k"


def curves(out: Path) -> list[dict]:
    """A record for each SAE and budget of a finished comparison."""
    runs = {
        folder.name: json.loads((folder / "results.json").read_text()) for folder in out.iterdir() if folder.is_dir()
    }
    budgets = sorted(int(name.removeprefix("topk-")) for name in runs if name.startswith("topk-"))
    of_rows = {
        HIERARCHICAL: lambda k: runs["hierarchical"],
        EACH: lambda k: runs[f"topk-{k}"],
        CUT: lambda k: runs[f"topk-{budgets[-1]}"],
    }
    return [
        {
            "row": row,
            "k": k,
            "explained_variance": run_of(k)["explained_variance"][str(k)],
            "recovered": run_of(k).get("recovered"),
        }
        for row, run_of in of_rows.items()
        for k in budgets
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=Path, required=True, help="shards for examples/train_sae.py")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "budgets.jsonl", help="results file")
    args = parser.parse_args()
    lines = [records.environment("python benchmarks/budgets.py --activations PATH")]
    for data, options in OPTIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            options = [*options.split(), *(["--activations", args.activations] if data == "activations" else [])]
            subprocess.run([sys.executable, SCRIPT, "--compare", "--out", folder, *options], check=True)
            lines += [{"data": data, **record} for record in curves(Path(folder))]
    args.out.unlink(missing_ok=True)
    records.append(args.out, lines)


if __name__ == "__main__":
    main()
