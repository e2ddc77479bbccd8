"""The one place of the version number, and the commit of a checkout."""

import subprocess
from pathlib import Path

__version__ = "0.1.0"


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from, "+" added when files differ from it.

    None where there is no checkout, or no git that answers within 10 seconds.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str | None:
        # Looking must not write to the index, which others may be using.
        command = ["git", "--no-optional-locks", "-C", str(root), *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "-uno") else "")
