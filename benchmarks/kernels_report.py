"""What the rows of benchmarks/kernels.py say: tables, the ratios held to limits, a plot."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Row, draw_lines, markdown_table

Shape = tuple[int, int, int]

SHAPES: tuple[Shape, ...] = ((8, 196, 192), (1, 1024, 192), (1, 4096, 192), (1, 16384, 192))
FORWARD, BOTH = "forward", "forward + backward"
PASSES = "both passes, no graph"  # what autograd costs is left out
FLOOR = "both passes, empty graph"  # beside a graph of one function that does nothing
TORCH = "torch"


@dataclass(frozen=True)
class Term:
    """Which row a ratio takes: of the default backend unless one is named, at `shape` if given."""

    op: str
    direction: str = FORWARD
    backend: str | None = None
    shape: Shape | None = None

    def find(self, rows: Sequence[Row], shape: Shape) -> Row | None:
        """Return the row, None if it is missing or failed."""
        for row in rows:
            if (
                row["error"] is None
                and (row["op"], row["direction"]) == (self.op, self.direction)
                and tuple(row["shape"]) == (self.shape or shape)
                and (row["default"] if self.backend is None else row["backend"] == self.backend)
            ):
                return row
        return None


@dataclass(frozen=True)
class Limit:
    """A ratio of two medians and what is wanted of it, at most or at least, by shape."""

    name: str
    above: Term
    below: Term
    wanted: Mapping[Shape, float]
    at_most: bool = True


_WKV, _WKV_BOTH = Term("bi_wkv"), Term("bi_wkv", BOTH)
_LONG, _LONGEST = SHAPES[2], SHAPES[3]
LIMITS = (
    Limit("bi_wkv / exp(k)", _WKV, Term("exp"), dict(zip(SHAPES, (2, 2, 2, 2.5), strict=True))),
    Limit("bi_wkv: forward + backward / forward", _WKV_BOTH, _WKV, dict.fromkeys(SHAPES, 3.5)),
    Limit(
        "bi_wkv: both passes without a graph / forward",
        Term("bi_wkv", PASSES),
        _WKV,
        dict.fromkeys(SHAPES, 3.5),
    ),
    Limit(
        "bi_wkv: both passes beside an empty graph / forward",
        Term("bi_wkv", FLOOR),
        _WKV,
        dict.fromkeys(SHAPES, 3.5),
    ),
    Limit("bi_wkv / the block's products", _WKV, Term("matmuls"), dict.fromkeys(SHAPES, 0.05)),
    Limit(
        "sdpa / bi_wkv", Term("sdpa"), _WKV, dict(zip(SHAPES, (8, 30, 100), strict=False)), False
    ),
    Limit(
        "torch bi_wkv, T=16384 / T=4096",
        Term("bi_wkv", FORWARD, TORCH),
        Term("bi_wkv", FORWARD, TORCH, _LONG),
        {_LONGEST: 6},
    ),
    Limit(
        "torch bi_wkv, forward + backward, T=16384 / T=4096",
        Term("bi_wkv", BOTH, TORCH),
        Term("bi_wkv", BOTH, TORCH, _LONG),
        {_LONGEST: 6},
    ),
    *(
        Limit(
            f"{name}, {direction}, T=4096 / T=1024",
            Term("wkv6_bi", direction, backend),
            Term("wkv6_bi", direction, backend, SHAPES[1]),
            {_LONG: 5},
        )
        for name, backend in (("wkv6_bi", None), ("torch wkv6_bi", TORCH))
        for direction in (FORWARD, BOTH)
    ),
    Limit(
        "shift_mix / copy of what it reads and writes",
        Term("shift_mix"),
        Term("shift_mix_copy"),
        dict.fromkeys(SHAPES, 2.5),
    ),
)


def _named(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _by(rows: Sequence[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Group rows by what they say under the keys."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        name = tuple(tuple(row[key]) if key == "shape" else row[key] for key in keys)
        groups.setdefault(name, []).append(row)
    return groups


def _table(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    shapes = list(_by(rows, "shape"))
    lines = []
    for name, group in _by(rows, "op", "backend", "direction").items():
        cells = {tuple(row["shape"]): "failed" if row["error"] else cell(row) for row in group}
        lines.append([*name, *(cells.get(shape, "") for (shape,) in shapes)])
    return markdown_table(["op", "backend", "direction", *(_named(s) for (s,) in shapes)], lines)


def _time_cell(row: Row) -> str:
    return f"{row['median_ms']:.3g} ({row['p20_ms']:.3g}-{row['p80_ms']:.3g})"


def _memory_cell(row: Row) -> str:
    if row["extra_bytes"] is None:
        return "?"
    share = row["extra_bytes"] / (math.prod(row["shape"]) / 64 * 4)
    return f"{row['extra_bytes'] / 2**20:.2f} ({share:.1f})"


def ratio_table(rows: Sequence[Row]) -> str:
    """Return the ratios that are held to limits, of rows of one dtype, device and clock."""
    lines = []
    for limit in LIMITS:
        for shape, wanted in limit.wanted.items():
            above, below = limit.above.find(rows, shape), limit.below.find(rows, shape)
            if above is None or below is None:
                continue
            ratio = above["median_ms"] / below["median_ms"]
            met = ratio <= wanted if limit.at_most else ratio >= wanted
            sign = "<=" if limit.at_most else ">="
            backends = f"{above['backend']} / {below['backend']}"
            line = [limit.name, backends, _named(shape), f"{ratio:.3g}", f"{sign} {wanted:g}"]
            lines.append([*line, "met" if met else "MISSED"])
    return markdown_table(["ratio", "backends", "shape", "value", "limit", ""], lines)


def bandwidth_table(rows: Sequence[Row]) -> str:
    """Return the least traffic over time as a fraction of that of the fastest copy."""
    copies = [row for row in rows if row["op"].endswith("copy") and row["error"] is None]
    fastest = max((row["traffic_bytes"] / row["median_ms"] for row in copies), default=math.nan)
    return _table(
        [row for row in rows if row["traffic_bytes"]],
        lambda row: f"{row['traffic_bytes'] / row['median_ms'] / fastest:.2f}",
    )


def summary(rows: Sequence[Row]) -> str:
    """Return all tables in Markdown."""
    parts = []
    for (device, dtype, clock, count), group in _by(
        rows, "device", "dtype", "clock", "threads"
    ).items():
        parts += [
            f"## {device}, {dtype}, {clock} clock, {count} thread(s)",
            "Milliseconds, median (20th-80th percentile):",
            _table(group, _time_cell),
        ]
        if clock != "wall":
            parts += [
                "Most memory held beyond inputs and results, MiB (over B·C·T/64 floats):",
                _table(group, _memory_cell),
                "Held to limits:" if clock == "thread" else "The limits on a CPU, to compare:",
                ratio_table(group),
            ]
        if device == "cuda":
            parts += [
                "Least traffic over time, as a fraction of that of the fastest copy:",
                bandwidth_table(group),
            ]
    failed = {f"{r['op']}, {r['backend']}, {r['dtype']}: {r['error']}" for r in rows if r["error"]}
    if failed:
        parts += ["Failed:", "\n".join(f"- {one}" for one in sorted(failed))]
    return "\n\n".join(parts)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw time a token over the number of tokens, a panel for each direction, dtype and clock."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["error"] is None:
            keys = ("direction", "device", "dtype", "clock")
            panel = panels.setdefault(", ".join(row[key] for key in keys), {})
            batch, tokens, _ = row["shape"]
            line = panel.setdefault(f"{row['op']} ({row['backend']})", [])
            line.append((tokens, row["median_ms"] * 1e3 / (batch * tokens)))
    draw_lines(path, panels, "tokens T", "µs a token")
