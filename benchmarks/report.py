# /// script
# requires-python = ">=3.11"
# dependencies = ["tabulate", "matplotlib"]
# ///
"""Write the tables of README.md and docs/*.md, and the plots, from the results that run.py and budgets.py left.

    python benchmarks/report.py [--check] [DOCUMENT ...]

A table stands between <!-- table:NAME --> and <!-- /table -->, where NAME is a function of TABLES.
"""

import argparse
import contextlib
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
    return f"{ms:.{3 if ms < 0.9995 else 2 if ms < 9.995 else 1}f} ms"


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


def training_step(results: list[dict], loss: str) -> list[dict]:
    """The records of eager training steps with fused Adam, in TF32 and autocast."""
    return [r for r in results if (r["mode"], r["loss"], r["optimizer"]) == ("training", loss, "fused")]


def shape_of(record: dict) -> dict:
    return {axis: record[axis] for axis in "BKFD"}


def headline(results: list[dict]) -> str:
    """One sentence, of the hierarchical loss in TF32 at the middle of the three shapes."""
    chosen = [r for r in training_step(results, "hierarchical") if r["precision"] == "TF32"]
    middle = sorted({r["F"] for r in chosen})[1]
    figures = {
        r["row"]: cell(r, lambda r: f"{milliseconds(r['ms'])} and {r['total_gib']:.1f} GiB")
        for r in chosen
        if r["F"] == middle
    }
    shape = " ".join(f"{axis}={size}" for axis, size in shape_of(next(r for r in chosen if r["F"] == middle)).items())
    return (
        f"A HierarchicalTopK training step (encoder, loss, gradients, Adam) of {shape} in TF32\n"
        f"takes {figures['flex_sae']}; {figures['torch eager']} with torch eager, "
        f"{figures['torch.compile']} with torch.compile."
    )


def training(results: list[dict], loss: str = "hierarchical") -> str:
    """Milliseconds, how many times those of the package they are, and GiB."""
    chosen = training_step(results, loss)
    ours = {(case_of(r), r["precision"]): r for r in chosen if r["row"] == "flex_sae"}

    def figures(record):
        own, factor = ours[case_of(record), record["precision"]], ""
        if record is not own and own["status"] == "ok":
            factor = f" ({record['ms'] / own['ms']:.1f}x)"
        return f"{milliseconds(record['ms']).removesuffix(' ms')}{factor}, {record['total_gib']:.1f}"

    return pivot(
        chosen,
        lambda r: {"B/K/F/D": "/".join(str(size) for size in shape_of(r).values()), "precision": r["precision"]},
        lambda r: {r["row"]: cell(r, figures)},
    )


def training_topk(results: list[dict]) -> str:
    return training(results, "topk")


def training_parts(results: list[dict]) -> str:
    """What each part takes, and its share of their sum."""
    lines = {}
    for r in results:
        if r["mode"] == "parts":
            leading = {**shape_of(r), "precision": r["precision"], "step": LOSSES[r["loss"]]}
            lines.setdefault(tuple(leading.values()), (leading, {}))[1][r["row"]] = r
    table = []
    for leading, parts in lines.values():
        failed = next((r["status"] for r in parts.values() if r["status"] != "ok"), None)
        if failed:
            table.append({**leading, "matmul": failed})
            continue
        ms = {row: r["ms"] for row, r in parts.items()}
        # What encode takes beyond its matmuls
        ms = {"matmul": ms.pop("matmul"), "selection": ms.pop("encode") - parts["matmul"]["ms"], **ms}
        total = sum(ms.values())
        table.append({**leading, **{part: f"{milliseconds(t)} ({t / total:.0%})" for part, t in ms.items()}})
    return tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)


def training_graph(results: list[dict]) -> str:
    """The package's step in eager mode and as one CUDA graph."""
    names = {"training": "eager", "training graph": "CUDA graph"}
    own = [r for r in results if r["row"] == "flex_sae" and r["mode"] in names and r["optimizer"] == "fused"]
    return pivot(
        sorted(own, key=lambda r: list(names).index(r["mode"])),
        lambda r: {**shape_of(r), "precision": r["precision"], "loss": LOSSES[r["loss"]]},
        lambda r: {
            f"{names[r['mode']]}, {what}": cell(r, lambda r, key=key: milliseconds(r[key]))
            for what, key in TIMES.items()
        },
    )


def training_defaults(results: list[dict]) -> str:
    """The package's step at the shape that also has torch's defaults, from these to TF32 and fused Adam."""
    own = [r for r in results if (r["row"], r["mode"], r["loss"]) == ("flex_sae", "training", "hierarchical")]
    shapes = [shape_of(r) for r in own if r["optimizer"] == "default"]
    order = [("float32", "default"), ("TF32", "default"), ("TF32", "fused"), ("autocast", "fused")]
    return pivot(
        sorted((r for r in own if shape_of(r) in shapes), key=lambda r: order.index((r["precision"], r["optimizer"]))),
        lambda r: {"matmuls": r["precision"], "Adam": r["optimizer"]},
        lambda r: {
            "step": cell(r, lambda r: milliseconds(r["ms"])),
            "peak memory": cell(r, lambda r: f"{r['total_gib']:.1f} GiB"),
        },
    )


def encoder(results: list[dict]) -> str:
    """Encoder and selection with their gradients: time, and memory beyond inputs and gradients."""
    return pivot(
        [r for r in results if r["mode"] == "encoder"],
        lambda r: {**shape_of(r), "precision": r["precision"]},
        lambda r: {r["row"]: cell(r, lambda r: f"{milliseconds(r['ms'])}, {r['extra_gib']:.2f} GiB")},
    )


def auxk(results: list[dict]) -> str:
    """What AuxK takes, and how much that is of a TopK step."""
    steps = {
        (*shape_of(r).values(), r["precision"]): r for r in training_step(results, "topk") if r["row"] == "flex_sae"
    }

    def figures(record):
        step = steps[(*shape_of(record).values(), record["precision"])]
        share = f" ({record['ms'] / step['ms']:.0%})" if step["status"] == "ok" else ""
        return milliseconds(record["ms"]) + share

    return pivot(
        [r for r in results if r["mode"] == "auxk"],
        lambda r: {**shape_of(r), "precision": r["precision"]},
        lambda r: {r["row"]: cell(r, figures)},
    )


def decode(results: list[dict]) -> str:
    """Decode and gradients: time, and memory beyond inputs and gradients."""
    names = {"topk": "flex_sae, TopK loss"}
    return pivot(
        results,
        lambda r: {"": names.get(r["loss"], r["row"])},
        lambda r: {
            f"{'/'.join(str(size) for size in shape_of(r).values())}, {r['dtype']}": cell(
                r, lambda r: f"{milliseconds(r['ms'])}, {r['extra_gib']:.2f} GiB"
            )
        },
    )


def nested(results: list[dict]) -> str:
    """Nested losses and gradients: time, and how many times that of the TopK loss."""
    topk = {tuple(shape_of(r).values()): r for r in results if r["loss"] == "topk"}

    def figures(record):
        own = topk[tuple(shape_of(record).values())]
        times = f" ({record['ms'] / own['ms']:.2f}x)" if own["status"] == "ok" and record is not own else ""
        return f"{milliseconds(record['ms'])}{times}, {record['extra_gib']:.2f} GiB"

    return pivot(
        results,
        lambda r: {"": LOSSES.get(r["loss"], r["row"])},
        lambda r: {"/".join(str(size) for size in shape_of(r).values()): cell(r, figures)},
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


def budgets(results: list[dict]) -> str:
    """Explained variance at each k; how many of the true features were found, where these are known."""
    found = {}
    for r in results:
        found.setdefault((r["data"], r["row"]), set()).add(r["recovered"])

    def recovered(record):
        shares = found[record["data"], record["row"]]
        if None in shares:
            return "unknown"
        return " to ".join(f"{share:.0%}" for share in sorted({min(shares), max(shares)}))

    return pivot(
        results,
        lambda r: {"data": r["data"], "SAE": r["row"], "true features found": recovered(r)},
        lambda r: {f"k = {r['k']}": f"{r['explained_variance']:.3f}"},
    )


OF_TRAINING = (headline, training, training_topk, training_parts, training_graph, training_defaults, encoder, auxk)
OTHERS = (decode, nested, decoder_step, losses, sizes, small, memory, budgets)
TABLES = {table.__name__: table for table in (*OF_TRAINING, *OTHERS)}
# Of the tables whose suite has another name
SUITES = {**{table.__name__: "training" for table in OF_TRAINING}, "memory": "losses"}


class Results:
    """The suites that a report uses, read once; they must be of one commit and one GPU."""

    def __init__(self, folder: Path):
        self.folder, self.suites = folder, {}

    def suite(self, name: str) -> tuple[dict, list[dict]]:
        if name not in self.suites:
            path = self.folder / f"{name}.jsonl"
            if not path.is_file():
                command = "budgets.py" if name == "budgets" else f"run.py --suite {name}"
                raise ReportError(f"{path.name} is missing: run `python benchmarks/{command}` on a GPU.")
            about, lines = records.load(path)
            for other, (known, _) in self.suites.items():
                for key in ("commit", "gpu"):
                    if known[key] != about[key]:
                        raise ReportError(
                            f"Results of different runs do not mix: {key} is {known[key]} in {other}.jsonl "
                            f"and {about[key]} in {path.name}; run both again."
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


# Mid-tones, readable on white and on GitHub's dark background alike.
INK, COLOURS = "#767d86", ("#2f81f7", "#7aa63c", "#c9601c", "#a371c7")


@contextlib.contextmanager
def drawing(path: Path):
    """A figure that is written to path at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    # The salt makes the same file of the same results.
    style = {"svg.hashsalt": "flex_sae", "font.size": 9, "legend.frameon": False, **dict.fromkeys(inked, INK)}
    with matplotlib.rc_context(style):
        figure = Figure(layout="constrained")
        yield figure
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def plot(results: Results, path: Path) -> None:
    """Time and peak memory of a training step with the hierarchical loss, at each shape."""
    chosen = training_step(results.suite("training")[1], "hierarchical")
    shapes = sorted({tuple(shape_of(r).values()) for r in chosen}, key=lambda shape: shape[2])
    precisions, rows = (list(dict.fromkeys(r[key] for r in chosen)) for key in ("precision", "row"))
    with drawing(path) as figure:
        figure.set_size_inches(8, 4.8)
        grid = figure.subplots(2, len(shapes), sharex=True)
        for line, (key, label) in zip(grid, (("ms", "time (ms)"), ("total_gib", "peak memory (GiB)")), strict=True):
            line[0].set_ylabel(label)
            for axes, shape in zip(line, shapes, strict=True):
                for record in chosen:
                    if tuple(shape_of(record).values()) != shape:
                        continue
                    row, ok = rows.index(record["row"]), record["status"] == "ok"
                    place = precisions.index(record["precision"]) + (row - (len(rows) - 1) / 2) * 0.2
                    axes.bar(place, record[key] if ok else 0, 0.18, color=COLOURS[row], label=record["row"])
                    if not ok:
                        axes.text(place, 0, f" {record['status']}", rotation=90, ha="center", va="bottom", fontsize=7)
                axes.set(ylim=(0, None), xticks=range(len(precisions)), xticklabels=precisions)
                axes.grid(alpha=0.3, axis="y")
                axes.set_axisbelow(True)
                axes.spines[["top", "right"]].set_visible(False)
        for axes, (B, K, F, D) in zip(grid[0], shapes, strict=True):
            axes.set_title(f"B={B} K={K}\nF={F} D={D}")
        handles = dict(zip(*grid[0, 0].get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(rows))


def plot_budgets(results: Results, path: Path) -> None:
    """Explained variance over k, of each data and SAE."""
    lines = results.suite("budgets")[1]
    rows, datas = (list(dict.fromkeys(r[key] for r in lines)) for key in ("row", "data"))
    with drawing(path) as figure:
        figure.set_size_inches(8, 3.4)
        for axes, data in zip(figure.subplots(1, len(datas), squeeze=False)[0], datas, strict=True):
            chosen = [r for r in lines if r["data"] == data]
            ks = sorted({r["k"] for r in chosen})
            for row, colour, marker in zip(rows, COLOURS, "os^", strict=False):
                heights = [r["explained_variance"] for k in ks for r in chosen if (r["row"], r["k"]) == (row, k)]
                axes.plot(ks, heights, color=colour, marker=marker, markersize=4, label=row)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ks, map(str, ks))
            axes.set(title=data, xlabel="active features k")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("explained variance, held-out")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows))


def report(documents: list[Path], folder: Path, check: bool) -> list[Path]:
    """Write the tables and the plots, or only check the tables; returns the documents that differed."""
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
        plot(results, folder / "training.svg")
        if (folder / "budgets.jsonl").exists():
            plot_budgets(results, folder / "budgets.svg")
        for document, filled in changed.items():
            document.write_text(filled)
    return list(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of the documents and the plots from the results.")
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
