"""Runs a command over a root tree on this machine's own kernel, with bubblewrap.

What needs a tree's programs but not its kernel takes some twenty times longer in an emulated guest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lab.guests.machine import guest_environment
from lab.guests.packages import run_tool

IN_TREE_LIMIT_S = 600.0
_PARTS = ("bin", "etc", "lib*", "sbin", "usr", "var")
"""Patterns of the top directories that contain a tree's programs; the others are empty."""


def bubblewrap(
    tree: Path,
    command: Sequence[str],
    *,
    readable: Sequence[Path] = (),
    writable: Sequence[Path] = (),
    cwd: Path,
) -> list[str]:
    """The command that runs another one over a tree.

    It sees the tree read-only, and these directories of this machine at the same paths. It has no
    network and none of our environment, and it ends with us.
    """
    words = ["bwrap", "--die-with-parent", "--unshare-net", "--clearenv"]
    words += ["--dev", "/dev", "--proc", "/proc"]
    words += [word for place in ("/tmp", "/run", "/root") for word in ("--tmpfs", place)]
    for path in sorted(path for pattern in _PARTS for path in tree.glob(pattern)):
        what = "--symlink" if path.is_symlink() else "--ro-bind"
        words += [what, str(path.readlink() if path.is_symlink() else path), f"/{path.name}"]
    words += [word for path in readable for word in ("--ro-bind", str(path), str(path))]
    words += [word for path in writable for word in ("--bind", str(path), str(path))]
    for name, value in guest_environment({}).items():
        words += ["--setenv", name, value]
    return [*words, "--chdir", str(cwd), *command]


def run_in_tree(
    tree: Path,
    command: Sequence[str],
    *,
    readable: Sequence[Path] = (),
    writable: Sequence[Path] = (),
    cwd: Path,
) -> str:
    """Run a command over a tree; returns its standard output. Raises CacheError if it fails."""
    words = bubblewrap(tree, command, readable=readable, writable=writable, cwd=cwd)
    return run_tool(words, limit_s=IN_TREE_LIMIT_S)
