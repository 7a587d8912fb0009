# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib"]
# ///
"""Draw benchmarks/results/*.svg from the files that benchmarks/run.py wrote beside them.

python benchmarks/plot.py
"""

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from table import AXES, LOSSES, MODES, RESULTS, along, load, relative_cost

# Mid-tones, at least 3.7 to 1 against white and against GitHub's dark background alike. (No colour has 4.4 to both.)
INK = "#767d86"
COLOURS = ("#2f81f7", "#c9601c", "#8957e5", "#2c974b", "#bf4b8a", "#9a7b1c", "#768390")
STYLE = {
    "svg.hashsalt": "flex_sae",  # the same file for the same results
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.marker": "o",
    "lines.markersize": 4,
    **dict.fromkeys(
        [
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ],
        INK,
    ),
}


def save(figure, name: str) -> None:
    figure.savefig(RESULTS / name, transparent=True, metadata={"Date": None, "Creator": None})
    print(RESULTS / name)


def colours(records: list[dict]) -> dict[str, str]:
    """A colour for every row, the package's first."""
    return dict(zip(dict.fromkeys(record["row"] for record in records), COLOURS, strict=False))


def label_sizes(axes, sizes: list[int]) -> None:
    """Ticks at the measured sizes, on a logarithmic axis."""
    axes.set_xscale("log", base=2)
    # Of neighbours closer than a third, the label of the roundest.
    shown = []
    for size in sorted(sizes, key=lambda size: size & -size, reverse=True):
        if all(max(size, other) > 4 / 3 * min(size, other) for other in shown):
            shown.append(size)
    axes.set_xticks(shown, [f"{size // 1024}Ki" if size % 1024 == 0 else str(size) for size in shown], rotation=45)
    axes.minorticks_off()


def training() -> None:
    """Time and peak memory of a training step against K."""
    records = [r for r in load("readme")["records"] if r["mode"] == "adam" and "ms" in r]
    colour = colours(records)
    figure, grid = plt.subplots(2, 2, figsize=(8, 6), sharex=True, layout="constrained")
    figure.suptitle("A training step with Adam, B={B} F={F} D={D}".format(**records[0]))
    quantities = (("ms", 1, "time (ms)"), ("total_mib", 1024, "peak memory (GiB)"))
    for line, (key, unit, label) in zip(grid, quantities, strict=True):
        for axes, loss in zip(line, LOSSES, strict=True):
            for row in colour:
                for dtype, style in (("float32", "-"), ("bfloat16", ":")):
                    chosen = [r for r in records if (r["loss"], r["row"], r["dtype"]) == (loss, row, dtype)]
                    values = [r[key] / unit for r in chosen]
                    ks, name = [r["K"] for r in chosen], f"{row}, {dtype}"
                    # Hollow and larger, so that of two equal values both are seen.
                    other = {} if row == "flex_sae" else {"markersize": 8, "markerfacecolor": "none"}
                    axes.plot(ks, values, linestyle=style, color=colour[row], label=name, **other)
            label_sizes(axes, sorted({r["K"] for r in records}))
            axes.set(title=LOSSES[loss], xlabel="K", ylabel=label, ylim=(0, None))
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, "training.svg")


def ceiling() -> None:
    """The fraction of what the memory system allows that the package reaches, in the eager cases of the targets
    suite."""
    records = [r for r in load("targets")["records"] if "fraction" in r and not r["mode"].endswith("graph")]
    records = [r for r in records if r["row"] == "flex_sae"]
    records.sort(key=lambda r: (list(LOSSES).index(r["loss"]), list(MODES).index(r["mode"])))
    cases = [
        "{} {dtype} {distribution} B={B} K={K}, {}".format(LOSSES[record["loss"]], MODES[record["mode"]], **record)
        for record in records
    ]
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.23 * len(cases)), layout="constrained")
    axes.plot([record["fraction"] for record in records], range(len(cases)), "o", color=COLOURS[0])
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set(xlabel="fraction of the ceiling measured in the same run", xlim=(0, 1.05))
    axes.axvline(1, color=INK, linewidth=1, marker="")
    axes.invert_yaxis()
    save(figure, "ceiling.svg")


def scaling() -> None:
    """Time, and time a byte moved, along each axis."""
    records = load("scaling")["records"]
    costs = relative_cost(records)
    figure, grid = plt.subplots(2, len(AXES), figsize=(12, 5.5), sharex="col", sharey="row", layout="constrained")
    figure.suptitle("Forward + backward as a CUDA graph around B={B} K={K} F={F} D={D}, float32".format(**records[0]))
    dense = [r for r in records if r["row"] == "dense" and "ms" in r]
    for column, axis in enumerate(AXES):
        time, cost = grid[:, column]
        for loss, colour in zip(LOSSES, COLOURS, strict=False):
            chosen = [r for r in along(axis, costs, records[0]) if r["loss"] == loss]
            sizes = [r[axis] for r in chosen]
            time.plot(sizes, [r["ms"] for r in chosen], color=colour, label=LOSSES[loss])
            cost.plot(sizes, [r["cost"] for r in chosen], color=colour)
        if axis == "F":
            chosen = along(axis, dense, records[0])
            time.plot(
                [r[axis] for r in chosen],
                [r["ms"] for r in chosen],
                color=COLOURS[2],
                label="TopK, dense matmul, eager",
            )
        time.set_yscale("log")
        cost.axhline(1, color=INK, linewidth=1, marker="")
        cost.set(xlabel=axis)
        cost.set_yscale("log", base=2)
        cost.yaxis.set_major_formatter("{x:g}x")
        label_sizes(cost, sorted({r[axis] for r in along(axis, costs, records[0])}))
    grid[0, 0].set_ylabel("time (ms)")
    grid[1, 0].set_ylabel("time a byte moved,\nrelative to the best point")
    handles, labels = grid[0, AXES.index("F")].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    save(figure, "scaling.svg")


if __name__ == "__main__":
    with plt.rc_context(STYLE):
        training()
        ceiling()
        scaling()
