"""Fill the tables of README.md from the files that benchmarks/run.py wrote.

    python benchmarks/table.py [--readme README.md]

A table stands between <!-- table:NAME --> and <!-- /table -->, where NAME is a function in TABLES.
"""

import argparse
import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
LOSSES = {"topk": "TopK", "hierarchical": "HierarchicalTopK"}
MODES = {
    "adam": "training step",
    "step": "forward + backward",
    "deterministic": "forward + backward, deterministic",
    "forward": "forward",
    "graph": "forward + backward, CUDA graph",
    "deterministic graph": "forward + backward, deterministic, CUDA graph",
}
AXES = "BKFD"


def load(suite: str) -> dict:
    path = RESULTS / f"{suite}.json"
    if not path.is_file():
        raise SystemExit(f"{path.name} is missing: python benchmarks/run.py --suite {suite} --json {path}")
    return json.loads(path.read_text())


def relative_cost(records: list[dict]) -> list[dict]:
    """The package's own CUDA graphs with `cost`: time a byte moved, as a multiple of the loss's best point."""
    own = [r for r in records if (r["row"], r["mode"]) == ("flex_sae", "graph") and "ms" in r]
    best = {loss: min((r["ms"] / r["bytes"] for r in own if r["loss"] == loss), default=None) for loss in LOSSES}
    return [{**record, "cost": record["ms"] / record["bytes"] / best[record["loss"]]} for record in own]


def along(axis: str, records: list[dict], base: dict) -> list[dict]:
    """The records in which only `axis` differs from `base`, the first one of a scaling suite."""
    same = [record for record in records if all(record[other] == base[other] for other in AXES if other != axis)]
    return sorted(same, key=lambda record: record[axis])


def same_shape(record: dict, other: dict) -> bool:
    return all(record[axis] == other[axis] for axis in AXES)


def time_of(record: dict) -> str:
    if "ms" not in record:
        return record["status"]
    return f"{record['ms']:.{3 if record['ms'] < 1 else 2}f} ms"


def per_k(records: list[dict], columns: dict, cell) -> list[list[str]]:
    """A line for every combination of what `columns` (heading: function of a record) give, and a column for every K."""
    ks = sorted({record["K"] for record in records})
    lines = {}
    for record in records:
        label = tuple(str(column(record)) for column in columns.values())
        lines.setdefault(label, dict.fromkeys(ks, ""))[record["K"]] = cell(record)
    return [[*columns, *(f"K={k}" for k in ks)], *([*label, *cells.values()] for label, cells in lines.items())]


def loss_of(record: dict) -> str:
    return LOSSES[record["loss"]]


def mode_of(record: dict) -> str:
    return MODES[record["mode"]]


def training(records: list[dict]) -> list[list[str]]:
    """A training step, with and without the optimiser: time and peak memory."""
    columns = {"loss": loss_of, "what": mode_of, "dtype": lambda r: r["dtype"], "": lambda r: r["row"]}
    return per_k(
        records, columns, lambda r: f"{time_of(r)}, {r['total_mib'] / 1024:.2f} GiB" if "ms" in r else r["status"]
    )


def targets(records: list[dict]) -> list[list[str]]:
    """The package alone: time, fraction of the ceiling, the host's time, peak memory beyond inputs and gradients."""
    columns = {"loss": loss_of, "what": mode_of} | {
        heading: lambda r, key=key: r[key]
        for heading, key in (("dtype", "dtype"), ("indices", "distribution"), ("B", "B"))
    }

    def cell(record):
        if "ms" not in record:
            return record["status"]
        memory = f", {record['beyond_gradients_mib']:.0f} MiB" if "beyond_gradients_mib" in record else ""
        fraction = f", {record['fraction']:.0%}" if "fraction" in record else ""
        return f"{time_of(record)}{fraction}, host {record['host_ms']:.2f} ms{memory}"

    return per_k([record for record in records if record["row"] == "flex_sae"], columns, cell)


def peers(records: list[dict]) -> list[list[str]]:
    """Everything that was timed beside the package at B=4096: forward + backward, and how many times slower."""
    chosen = [r for r in records if (r["mode"], r["distribution"], r["B"]) == ("step", "uniform", records[0]["B"])]
    own = {(r["loss"], r["dtype"], r["K"]): r.get("ms") for r in chosen if r["row"] == "flex_sae"}

    def cell(record):
        base = own[record["loss"], record["dtype"], record["K"]]
        if "ms" not in record or base is None or record["row"] == "flex_sae":
            return time_of(record)
        return f"{time_of(record)}, {record['ms'] / base:.1f}x"

    return per_k(chosen, {"loss": loss_of, "dtype": lambda r: r["dtype"], "": lambda r: r["row"]}, cell)


def scaling(records: list[dict]) -> list[list[str]]:
    """One axis at a time, then what differs in several: time, eager, of the host and as a CUDA graph, and the graph's a
    byte moved relative to the best."""
    whats = ("", ", host", ", graph", ", a byte")
    table = [["", *(f"{loss}{what}" for loss in LOSSES.values() for what in whats), "TopK, dense"]]
    base, costs, failed = records[0], relative_cost(records), {"status": "failed"}
    eager = [r for r in records if (r["row"], r["mode"]) == ("flex_sae", "step")]
    dense = [r for r in records if r["row"] == "dense"]
    shapes = {f"{axis}={r[axis]}": r for axis in AXES for r in along(axis, records, base)}
    for record in records:
        different = [axis for axis in AXES if record[axis] != base[axis]]
        if len(different) > 1:
            shapes[" ".join(f"{axis}={record[axis]}" for axis in different)] = record
    for label, shape in shapes.items():
        line = [label]
        for loss in LOSSES:
            step, replay = (
                next((r for r in chosen if r["loss"] == loss and same_shape(r, shape)), failed)
                for chosen in (eager, costs)
            )
            host = f"{step['host_ms']:.2f} ms" if "host_ms" in step else ""
            line += [time_of(step), host, time_of(replay), f"{replay['cost']:.2f}x" if "cost" in replay else ""]
        table.append([*line, next((time_of(r) for r in dense if same_shape(r, shape)), "")])
    return table


def small(records: list[dict]) -> list[list[str]]:
    """A small step: eager on the host's clock, and the replay of its CUDA graph."""
    kinds = [(loss, mode) for loss in LOSSES for mode in ("wall", "one thread", "graph")]
    names = {"wall": "eager", "one thread": "eager, one thread", "graph": "graph replay"}
    lines = {record["row"]: dict.fromkeys(kinds, "") for record in records}
    for record in records:
        lines[record["row"]][record["loss"], record["mode"]] = time_of(record)
    heading = ["", *(f"{LOSSES[loss]}, {names[mode]}" for loss, mode in kinds)]
    return [heading, *([row, *cells.values()] for row, cells in lines.items())]


# The name between the markers: the suite it is made from, and how.
TABLES = {
    "training": ("readme", training),
    "targets": ("targets", targets),
    "peers": ("targets", peers),
    "scaling": ("scaling", scaling),
    "small": ("small", small),
}


def render(name: str) -> str:
    """A table in Markdown, and below it what it was measured with."""
    if name not in TABLES:
        raise SystemExit(f"README asks for the table {name!r}, known are {', '.join(TABLES)}.")
    suite, make = TABLES[name]
    results = load(suite)
    heading, *lines = make(results["records"])
    rows = [heading, ["---"] * len(heading), *lines]
    source = "`{command}` on {gpu}, driver {driver}, torch {torch}, triton {triton}, commit {commit}".format(**results)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n<sub>{source}</sub>"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill the tables of README.md from benchmarks/results.")
    parser.add_argument("--readme", type=Path, default=RESULTS.parent.parent / "README.md", help="the file to fill")
    readme = parser.parse_args().readme
    filled = re.sub(
        r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)",
        lambda match: f"{match[1]}\n{render(match[2])}\n\n{match[3]}",
        readme.read_text(),
        flags=re.DOTALL,
    )
    readme.write_text(filled)


if __name__ == "__main__":
    main()
