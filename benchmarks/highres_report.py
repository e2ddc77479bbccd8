"""What the rows of benchmarks/highres_seg.py say: tables, crossovers, fits, plots."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import Row, markdown_table, read_rows

BENCHMARK = "highres_seg"
# How many 16 x 16 patches an image has is its number of tokens, whatever a model makes of it.
PIXELS_OF_TOKEN = 256
# panel -> key of the row, unit, factor from the row's unit
PANELS = {
    "time of a batch": ("median_ms", "ms", 1.0),
    "extra memory": ("memory_bytes", "MiB", 2.0**-20),
    "throughput": ("images_per_s", "images/s", 1.0),
}

Points = Sequence[tuple[float, float]]


def load(path: Path) -> list[Row]:
    """Return the rows of a file of this benchmark.

    Raises:
        ValueError: the file holds something else; it is left as it is.
    """
    try:
        rows = read_rows(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}); name another file") from error
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and row.get("benchmark") == BENCHMARK for row in rows
    ):
        raise ValueError(
            f"{path} was not written by benchmarks/highres_seg.py: it takes a list of rows with "
            f"'benchmark': '{BENCHMARK}'; name another file"
        )
    return rows


def size_name(row: Row) -> str:
    """HEIGHTxWIDTH in pixels."""
    return f"{row['height']}x{row['width']}"


def _pixels(row: Row) -> int:
    return int(row["height"] * row["width"])


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by machine and settings, those without size and model; the name says the settings."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        machine = row["machine"].get("gpu") if row["device"] == "cuda" else row["machine"]["cpu"]
        words = [
            row["task"],
            "backbone alone" if row["head"] == "none" else f"with head {row['head']}",
            row["precision"],
            *["compiled"] * row["compiled"],
            f"batch {row['batch']}",
            f"{machine}, {row['threads']} thread(s)",
        ]
        groups.setdefault(", ".join(words), []).append(row)
    return groups


def curves(rows: Sequence[Row], key: str, factor: float = 1.0) -> dict[str, list]:
    """For each model its (pixels, value), sorted; the mean where two shapes have as many pixels."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        of = found.setdefault(row["model"], {})
        if row["error"] is None and row.get(key):
            of.setdefault(_pixels(row), []).append(row[key] * factor)
    return {
        model: [(pixels, sum(of[pixels]) / len(of[pixels])) for pixels in sorted(of)]
        for model, of in found.items()
    }


def crossovers(first: Points, other: Points) -> list[tuple[float, float]]:
    """Where two lines on logarithmic axes meet, at the x that both have and between them.

    Args:
        first: (x, y), all positive.
        other: likewise.

    Returns:
        (x, y) of each meeting, sorted by x; lines that coincide meet at every common x.
    """
    one, two = dict(first), dict(other)
    common = sorted(one.keys() & two.keys())
    gaps = [(x, math.log(one[x] / two[x])) for x in common]
    meetings = [(x, one[x]) for x, gap in gaps if gap == 0]
    for (x0, gap0), (x1, gap1) in pairwise(gaps):
        if gap0 * gap1 < 0:
            share = gap0 / (gap0 - gap1)
            x = math.exp(math.log(x0) + share * math.log(x1 / x0))
            y = math.exp(math.log(one[x0]) + share * math.log(one[x1] / one[x0]))
            meetings.append((float(x), float(y)))
    return sorted(meetings)


def linear_fit(points: Points) -> tuple[float, float, float]:
    """Least squares of y = slope * x + offset.

    Returns:
        Slope, offset, and the largest distance of a point from the line over its y.

    Raises:
        ValueError: fewer than three points, which any line would fit.
    """
    if len(points) < 3:
        raise ValueError(f"a line through {len(points)} point(s) tells nothing; measure 3 sizes")
    x, y = np.array(points, dtype=float).T
    slope, offset = np.polyfit(x, y, 1)
    worst = np.max(np.abs(slope * x + offset - y) / np.abs(y))
    return float(slope), float(offset), float(worst)


def _cells(row: Row, first: Row | None) -> list[str]:
    if row["error"] is not None:
        return [row["error"], *[""] * 9]
    ratio = ""
    if first is not None and first["error"] is None:
        # Only neighbours met the same noise of the machine.
        far = "" if first["group"] == row["group"] else "*"
        ratio = f"{row['median_ms'] / first['median_ms']:.2f}{far}"
    memory = row["memory_bytes"]
    return [
        f"{row['median_ms']:.4g} ({row['p20_ms']:.4g}-{row['p80_ms']:.4g})",
        ratio,
        f"{row['images_per_s']:.3g}",
        "?" if memory is None else f"{memory / 2**20:.1f}",
        f"{row['params'] / 1e6:.2f}",
        f"{row['macs'] / 1e9:.2f}",
        f"{row['flops_per_s'] / 1e9:.1f}",
        *(f"{100 * row[f'{name}_share']:.0f}" for name in ("product", "operator", "other")),
    ]


def table(rows: Sequence[Row]) -> str:
    """Rows of one series, a line for each size and model; ratios are to the first model."""
    first = rows[0]["model"]
    order = sorted(rows, key=lambda row: (_pixels(row), row["height"]))
    references = {size_name(row): row for row in rows if row["model"] == first}
    lines = [
        [size_name(row), row["model"], *_cells(row, references.get(size_name(row)))]
        for row in order
    ]
    head = ["px", "model", "ms (p20-p80)", "ratio", "images/s", "extra MiB", "Mparams", "GMACs"]
    return markdown_table([*head, "GFLOP/s", "products %", "operators %", "other %"], lines)


def _crossing_lines(rows: Sequence[Row]) -> list[str]:
    first = rows[0]["model"]
    lines = []
    for title, (key, unit, factor) in list(PANELS.items())[:2]:
        found = curves(rows, key, factor)
        for other in found:
            if other == first:
                continue
            meetings = crossovers(found[first], found[other])
            places = [f"{math.sqrt(x):.0f} px ({y:.3g} {unit})" for x, y in meetings]
            common = dict(found[first]).keys() & dict(found[other]).keys()
            lines.append(
                f"- {title}, {first} and {other}: "
                + (", ".join(places) or f"none at the {len(common)} sizes that both have")
            )
    return lines


def _fit_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for model, points in curves(rows, "memory_bytes").items():
        if len(points) >= 3:
            tokens = [(pixels / PIXELS_OF_TOKEN, memory) for pixels, memory in points]
            slope, offset, worst = linear_fit(tokens)
            lines.append(
                f"- {model}: {slope / 2**10:.3g} KiB a token {offset / 2**20:+.3g} MiB, "
                f"off by at most {100 * worst:.0f} %"
            )
    # What the claim is about comes first.
    return sorted(lines, key=lambda line: "rwkv" not in line)


def summary(rows: Sequence[Row]) -> str:
    """Return all tables, crossovers and fits in Markdown."""
    parts = []
    for name, group in series(rows).items():
        parts += [
            f"## {name}",
            table(group),
            "Time is the median of a batch; the ratio is to the first model at that size, * where "
            "the two were not timed side by side. Extra memory is what a call holds at most beyond "
            "weights, input and result (in training also beyond gradients). FLOP/s are two for "
            "each multiply-add, and three forward passes for a training step.",
        ]
        crossings, fits = _crossing_lines(group), _fit_lines(group)
        if crossings:
            parts += ["Crossovers, the side of a square of as many pixels:", "\n".join(crossings)]
        if fits:
            parts += ["Extra memory as a line over tokens (16 x 16 px each):", "\n".join(fits)]
    return "\n\n".join(parts)


def draw(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draw time, memory and throughput over resolution, a line of panels for each series.

    Args:
        rows: what was measured.
        path: the JSON file; the pictures lie beside it.

    Returns:
        The files written, PNG and SVG; none where every row failed.
    """
    groups = {
        name: group
        for name, group in series(rows).items()
        if any(row["error"] is None for row in group)
    }
    if not groups:
        return []
    figure = Figure(figsize=(16, 0.6 + 4.6 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), len(PANELS), squeeze=False)
    models = list(dict.fromkeys(row["model"] for row in rows))
    colors = {model: colormaps["tab10"](i % 10) for i, model in enumerate(models)}
    for line, (name, group) in zip(axes, groups.items(), strict=True):
        line[1].set_title(name, fontsize="small")
        for ax, (title, (key, unit, factor)) in zip(line, PANELS.items(), strict=True):
            _draw_panel(ax, curves(group, key, factor), group[0]["model"], colors)
            ax.set(xlabel="side of a square of as many pixels, px", ylabel=f"{title}, {unit}")
    handles = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
    wanted = [handles[name] for name in [*models, "crossover"] if name in handles]
    figure.legend(handles=wanted, loc="outside lower center", ncols=5, fontsize="small")
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in files:
        figure.savefig(file, dpi=110)
    return files


def _draw_panel(
    ax: Axes, found: Mapping[str, Points], first: str, colors: Mapping[str, object]
) -> None:
    for model, points in found.items():
        if points:
            sides = [math.sqrt(pixels) for pixels, _ in points]
            ax.plot(sides, [y for _, y in points], "o-", label=model, color=colors[model])
        if model == first:
            continue
        for x, y in crossovers(found[first], points):
            side = math.sqrt(x)
            ax.plot([side], [y], "*", ms=15, mec="k", mfc=colors[model], label="crossover")
            ax.annotate(f"{side:.0f} px", (side, y), (6, -12), textcoords="offset points")
    ax.set(xscale="log", yscale="log")
    ticks = sorted({math.sqrt(x) for points in found.values() for x, _ in points})
    ax.set_xticks(ticks, [f"{x:.0f}" for x in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.grid(alpha=0.3)
