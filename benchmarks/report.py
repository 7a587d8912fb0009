# /// script
# requires-python = ">=3.11"
# dependencies = ["tabulate", "matplotlib"]
# ///
"""Write the tables of README.md and docs/*.md, and the plot, from the results that benchmarks/run.py left.

    python benchmarks/report.py [--check] [DOCUMENT ...]

A table stands between <!-- table:NAME --> and <!-- /table -->, where NAME is a function of TABLES.
"""

import argparse
import re
import sys
from pathlib import Path

import records
from tabulate import tabulate

LOSSES = {"topk": "TopK", "hierarchical": "HierarchicalTopK"}
MODES = {"step": "eager", "one thread": "eager, one thread", "graph": "CUDA graph"}
TIMES = {"device": "ms", "wall": "wall_ms"}
MARKED = re.compile(r"<!-- table:(\S+) -->(?:(?!<!-- table:).)*?<!-- /table -->", re.DOTALL)


class ReportError(Exception):
    """What keeps a report from being written, in one sentence."""


def milliseconds(ms: float) -> str:
    return f"{ms:.{3 if ms < 1 else 2 if ms < 10 else 1}f} ms"


def cell(record: dict, write) -> str:
    """What `write` makes of a record, or why it was not timed."""
    return write(record) if record["status"] == "ok" else record["status"]


def loss_of(record: dict) -> str:
    mode = ", deterministic" if record["mode"] == "deterministic" else ""
    return LOSSES[record["loss"]] + mode


def both_times(record: dict) -> dict[str, str]:
    """Two cells: time on the device and on the wall."""
    name = LOSSES[record["loss"]]
    return {f"{name}, {what}": cell(record, lambda r, key=key: milliseconds(r[key])) for what, key in TIMES.items()}


def pivot(chosen: list[dict], line_of, cells_of) -> str:
    """A table with one line for each set of leading cells, and all cells of the records that share them."""
    lines = {}
    for record in chosen:
        leading = line_of(record)
        lines.setdefault(tuple(leading.values()), leading).update(cells_of(record))
    return tabulate(list(lines.values()), headers="keys", tablefmt="github", disable_numparse=True)


def decoder_step(results: list[dict]) -> str:
    compiled = {case_of(r): r for r in results if r["row"] == "torch.compile"}

    def figures(record):
        text = f"{milliseconds(record['ms'])}, {record['total_gib']:.1f} GiB"
        peer = compiled.get(case_of(record), record)
        if peer is not record and peer["status"] == "ok":
            text += f", {peer['ms'] / record['ms']:.1f}x faster"
        return text

    return pivot(
        sorted(results, key=lambda r: (list(LOSSES).index(r["loss"]), r["K"])),
        lambda r: {"loss": LOSSES[r["loss"]], "K": r["K"]},
        lambda r: {f"{r['row']}, {r['dtype']}": cell(r, figures)},
    )


def headline(results: list[dict]) -> str:
    """One sentence, of the hierarchical loss in float32 at the largest K."""
    chosen = [r for r in results if (r["loss"], r["dtype"]) == ("hierarchical", "float32")]
    ours, compiled = (
        max((r for r in chosen if r["row"] == row), key=lambda r: r["K"]) for row in ("flex_sae", "torch.compile")
    )
    figures = [cell(r, lambda r: f"{milliseconds(r['ms'])} and {r['total_gib']:.1f} GiB") for r in (ours, compiled)]
    shape = " ".join(f"{axis}={ours[axis]}" for axis in "BKFD")
    return (
        f"A HierarchicalTopK decoder step (loss, gradients, Adam) of {shape} in float32\n"
        f"takes {figures[0]}, and {figures[1]} with torch.compile."
    )


def case_of(record: dict) -> tuple:
    return tuple(record[key] for key in (*"BKFD", "dtype", "distribution", "loss", "mode"))


def losses(results: list[dict]) -> str:
    def line(record):
        mode = ", deterministic" if record["mode"] == "deterministic" else ""
        keys = (*"BKFD", "dtype", "distribution")
        return {**{key: record[key] for key in keys}, "": record["row"] + mode}

    return pivot(results, line, both_times)


def sizes(results: list[dict]) -> str:
    return pivot(results, lambda r: {**{axis: r[axis] for axis in "BKFD"}, "": r["row"]}, both_times)


def small(results: list[dict]) -> str:
    return pivot(results, lambda r: {"": r["row"], "how": MODES[r["mode"]]}, both_times)


def memory(results: list[dict]) -> str:
    """The package's own float32 cases with uniform indices; of each dictionary the largest K."""
    own = [r for r in results if (r["row"], r["dtype"], r["distribution"]) == ("flex_sae", "float32", "uniform")]
    largest = {}
    for r in own:
        largest[r["F"], r["D"]] = max(r["K"], largest.get((r["F"], r["D"]), 0))
    return pivot(
        sorted((r for r in own if r["K"] == largest[r["F"], r["D"]]), key=lambda r: r["D"]),
        lambda r: {axis: r[axis] for axis in "BKFD"},
        lambda r: {loss_of(r): cell(r, lambda r: f"{r['extra_gib']:.2f} GiB")},
    )


TABLES = {table.__name__: table for table in (headline, decoder_step, losses, sizes, small, memory)}
SUITES = {"headline": "decoder_step", "memory": "losses"}  # of the tables whose suite has another name


class Results:
    """The suites that a report uses, read once; they must be of one commit and one GPU."""

    def __init__(self, folder: Path):
        self.folder, self.suites = folder, {}

    def suite(self, name: str) -> tuple[dict, list[dict]]:
        if name not in self.suites:
            path = self.folder / f"{name}.jsonl"
            if not path.is_file():
                raise ReportError(f"{path.name} is missing: run `python benchmarks/run.py --suite {name}` on a GPU.")
            about, lines = records.load(path)
            for other, (known, _) in self.suites.items():
                for key in ("commit", "gpu"):
                    if known[key] != about[key]:
                        raise ReportError(
                            f"Results of different runs do not mix: {key} is {known[key]} in {other}.jsonl "
                            f"and {about[key]} in {path.name}; run both suites again."
                        )
            self.suites[name] = about, lines
        return self.suites[name]

    def table(self, name: str) -> str:
        """The table and the line that says where it comes from."""
        if name not in TABLES:
            raise ReportError(f"There is no table {name}; there are {', '.join(TABLES)}.")
        about, lines = self.suite(SUITES.get(name, name))
        if name == "headline":  # the table of the same results says where it comes from
            return headline(lines)
        source = "<sub>`{command}` on {gpu}, torch {torch}, triton {triton}, commit {commit}</sub>".format(**about)
        return f"{TABLES[name](lines)}\n\n{source}"


def fill(text: str, results: Results) -> str:
    """A document with its tables written anew."""
    if len(MARKED.findall(text)) != text.count("<!-- table:"):
        raise ReportError("A <!-- table:NAME --> has no <!-- /table --> of its own.")

    def marked(match):
        return f"<!-- table:{match[1]} -->\n\n{results.table(match[1])}\n\n<!-- /table -->"

    return MARKED.sub(marked, text)


def plot(results: Results, path: Path) -> None:
    """Time and peak memory of a decoder step against K."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    timed = [record for record in results.suite("decoder_step")[1] if record["status"] == "ok"]
    # Mid-tones, readable on white and on GitHub's dark background alike.
    ink, colours = "#767d86", {"flex_sae": "#2f81f7", "torch.compile": "#c9601c"}
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    # The salt makes the same file of the same results.
    style = {"svg.hashsalt": "flex_sae", "font.size": 9, "legend.frameon": False, **dict.fromkeys(inked, ink)}
    with plt.rc_context(style):
        figure, grid = plt.subplots(2, 2, figsize=(7, 4.5), sharex=True, layout="constrained")
        for axes, loss in zip(grid[0], LOSSES, strict=True):
            axes.set_title(LOSSES[loss])
        for line, (key, label) in zip(grid, (("ms", "time (ms)"), ("total_gib", "peak memory (GiB)")), strict=True):
            for axes, loss in zip(line, LOSSES, strict=True):
                for row, colour in colours.items():
                    for dtype, dashes in (("float32", "-"), ("bfloat16", ":")):
                        chosen = [r for r in timed if (r["loss"], r["row"], r["dtype"]) == (loss, row, dtype)]
                        ks, values = [r["K"] for r in chosen], [r[key] for r in chosen]
                        axes.plot(
                            ks, values, "o", markersize=4, linestyle=dashes, color=colour, label=f"{row}, {dtype}"
                        )
                axes.set(ylim=(0, None), ylabel=label)
                axes.set_xticks(sorted({r["K"] for r in timed}))
                axes.grid(alpha=0.3)
                axes.spines[["top", "right"]].set_visible(False)
        for axes in grid[1]:
            axes.set_xlabel("K")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def report(documents: list[Path], folder: Path, check: bool) -> list[Path]:
    """Write the tables and the plot, or only check the tables; returns the documents that differed."""
    results, changed = Results(folder), {}
    for document in documents:
        text = document.read_text()
        try:
            filled = fill(text, results)
        except ReportError as error:
            raise ReportError(f"{document.name}: {error}") from None
        if filled != text:
            changed[document] = filled
    if not check:
        plot(results, folder / "decoder_step.svg")
        for document, filled in changed.items():
            document.write_text(filled)
    return list(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of the documents and the plot from the results.")
    documents = [records.ROOT / "README.md", *sorted((records.ROOT / "docs").glob("*.md"))]
    parser.add_argument("documents", nargs="*", type=Path, default=documents, help="default: README.md and docs/*.md")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="FOLDER", help="of the results files")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a table is not that of the results"
    )
    args = parser.parse_args()
    try:
        changed = report(args.documents, args.results, args.check)
    except ReportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if args.check and changed:
        sys.exit(f"Not the tables of the results: {', '.join(document.name for document in changed)}.")


if __name__ == "__main__":
    main()
