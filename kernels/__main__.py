"""`python -m vision.kernels [device ...]`: print which backend of which operator runs where."""

import sys

from . import list_backends


def main(devices: list[str]) -> None:
    """Print a table of operator, backend, device and availability.

    Args:
        devices: device names; none for the CPU and the accelerator.
    """
    table = [("op", "backend", "device", "available")]
    for row in list_backends(devices or None):
        state = "no: " + row.reason if row.reason is not None else "yes"
        table.append((row.op, row.backend, row.device, state + " (default)" * row.default))
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        print("  ".join([f"{cell:{w}}" for cell, w in zip(line, widths, strict=False)] + [line[3]]))


if __name__ == "__main__":
    main(sys.argv[1:])
