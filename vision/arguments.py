"""Command-line arguments that several tools take."""

import argparse
import ast
from typing import Any


def key_value(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; a value that is no Python literal is a string.

    Raises:
        argparse.ArgumentTypeError: there is no equals sign.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"wanted KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
