"""Root trees and kernels of Debian's suites for guests, by package name, never by version.

A row of the kernel matrix is a suite's kernel over a userland with that suite's BCC. Trees are
made by mmdebstrap below `$XDG_CACHE_HOME/tcpstuck-trace/guest`, from the archive that apt already
uses on this machine, of Debian's packages only and without kernel headers. They are made anew when
a package named here has a newer version or the recipe below changed; a tree appears under its name
only once it is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab.guests.packages import (
    THIS_MACHINE,
    Apt,
    CacheError,
    Package,
    architecture,
    cache_directory,
    cached_kernel,
    fetch,
    run_tool,
)

if TYPE_CHECKING:
    from lab.guests.packages import Subparsers

PACKAGES = (
    "python3",
    "python3-bpfcc",
    "python3-pyelftools",
    "python3-pyroute2",
    "python3-pytest",
    "python3-pytest-timeout",
    "python3-tabulate",
    "iproute2",
    "iptables",
    "nftables",
    "kmod",
    "mount",
    "udev",
    "zstd",
)
"""What the kernel tests need, and what the guest's own first steps do; zstd unpacks kernels."""
VERSIONED_PACKAGES = ("mariadb-server-core", "mariadb-client-core")
"""Older suites have these only with MariaDB's version in the name."""
PACKAGES_OF_SOME_SUITES = ("util-linux-extra",)
"""Since util-linux 2.42 it has pivot_root, by which a guest changes its root."""
RECIPE = (
    "--variant=essential",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
)
"""mmdebstrap's options."""
BUILD_LIMIT_S = 1800.0
HEADERS = re.compile(r"^Package: (linux-(?:.*-)?headers(?:-.*)?|linux-libc-dev)$", re.MULTILINE)
"""Packages with the kernel's declarations, in dpkg's status file."""
BACKPORTS = "-backports"


@dataclass(frozen=True)
class Row:
    """A kernel, and the userland it is tried with."""

    suite: str
    """The suite the kernel is from; a backported one runs over the tree it is backported to."""
    counts: bool = True
    """Whether a failure fails the matrix: the newest kernels are only reported."""

    @property
    def tree_suite(self) -> str:
        """The suite the userland is from, BCC among it."""
        return self.suite[: -len(BACKPORTS)] if self.suite.endswith(BACKPORTS) else self.suite


ROWS = (
    Row("bullseye"),
    Row("bookworm"),
    Row("bookworm-backports"),
    Row("trixie"),
    Row("trixie-backports", counts=False),
    Row("sid", counts=False),
)


def debian_mirror() -> str:
    """The address of the Debian archive this machine's apt uses.

    Raises CacheError where its package lists name none.
    """
    conditions = ("Created-By: Packages", "Origin: Debian", "Label: Debian")
    addresses = THIS_MACHINE.run(
        "apt-get", "indextargets", "--format", "$(REPO_URI)", *conditions
    ).split()
    if not addresses:
        raise CacheError(
            "no Debian archive to take other suites from",
            "apt's package lists are of none",
            "run `apt-get update` with a Debian archive in apt's sources",
        )
    return addresses[0]


def source_line(mirror: str, suite: str) -> str:
    """The line of sources.list(5) for a suite.

    Validity dates are not checked: those of an archived suite have passed, and those of an
    unstable one pass where a mirror is some days behind. The signature is.
    """
    return f"deb [check-valid-until=no] {mirror} {suite} main"


def configuration(directory: Path) -> str:
    """An apt.conf(5) with nothing of this machine's sources, preferences and packages."""
    places = {
        "Dir::Etc::sourcelist": str(directory / "sources.list"),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State::lists": str(directory / "lists"),
        "Dir::State::status": "/dev/null",
        "Dir::Cache": str(directory / "cache"),
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    return "".join(f'{name} "{value}";\n' for name, value in places.items())


def suite_apt(suite: str, mirror: str) -> Apt:
    """An apt for that suite, its package lists as new as can be had. Raises CacheError.

    Where the archive cannot be reached the lists of the last time do.
    """
    directory = cache_directory() / "apt" / suite
    for part in ("lists/partial", "cache"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    (directory / "sources.list").write_text(source_line(mirror, suite) + "\n")
    settings = directory / "apt.conf"
    settings.write_text(configuration(directory))
    apt = Apt(settings)
    apt.run("apt-get", "-qq", "update")
    return apt


def newest_of(name: str, known: Iterable[str]) -> str | None:
    """The package of that name, or of that name and the highest version, among those known."""
    found: list[tuple[list[int], str]] = []
    for one in known:
        match = re.fullmatch(rf"{re.escape(name)}(?:-([0-9]+(?:\.[0-9]+)*))?", one)
        if match and match[1] is None:
            return one
        if match:
            found.append(([int(part) for part in match[1].split(".")], one))
    return max(found)[1] if found else None


def tree_packages(apt: Apt) -> list[Package]:
    """The packages to put into a tree, in the versions it would get. Raises CacheError."""
    known = set(apt.run("apt-cache", "pkgnames").split())
    versioned = [newest_of(name, known) or name for name in VERSIONED_PACKAGES]
    optional = [name for name in PACKAGES_OF_SOME_SUITES if name in known]
    return apt.candidates([*PACKAGES, *versioned, *optional])


def tree_name(suite: str, packages: Sequence[Package]) -> str:
    """The name of a tree; another one as soon as it would be made differently."""
    ingredients = json.dumps([RECIPE, sorted(packages)])
    return f"{suite}_{hashlib.sha256(ingredients.encode()).hexdigest()[:16]}"


def headers_in(tree: Path) -> list[str]:
    """What a tree holds of the kernel's headers, which the tool must do without."""
    status = tree / "var" / "lib" / "dpkg" / "status"
    packages = HEADERS.findall(status.read_text())
    places = ("usr/include/linux", "usr/src/linux-*", "lib/modules/*")
    return packages + [str(found) for place in places for found in tree.glob(place)]


def _build(suite: str, packages: Sequence[Package], mirror: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as scratch:
        tree = Path(scratch) / "tree"
        contents = f"--include={','.join(package.name for package in packages)}"
        where = (suite, str(tree), source_line(mirror, suite))
        # Killed, mmdebstrap leaves /proc and more mounted in the tree: not in our mounts, though.
        alone = ("unshare", "--mount") if os.geteuid() == 0 else ()
        maker = (*alone, "mmdebstrap", f"--architectures={architecture()}")
        run_tool([*maker, *RECIPE, contents, *where], limit_s=BUILD_LIMIT_S)
        headers = headers_in(tree)
        if headers:
            why = f"it would hold {', '.join(headers)}"
            raise CacheError(f"no tree of {suite}", why, "see which package brings them")
        tree.rename(target)


def current_tree(suite: str, apt: Apt, mirror: str) -> tuple[Path, bool]:
    """The tree of a suite, and whether it had to be made, where the old one goes.

    Raises CacheError. A guest must not be running over the old one.
    """
    packages = tree_packages(apt)
    target = cache_directory() / "trees" / tree_name(suite, packages)
    if target.is_dir():
        return target, False
    _build(suite, packages, mirror, target)
    for other in target.parent.glob(f"{suite}_*"):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target, True


@dataclass(frozen=True)
class BootFiles:
    """What a row's guest boots."""

    kernel: Path
    """The kernel image, its modules in the tree it lies in."""
    root: Path
    fresh: bool
    """Whether either had to be made."""


def prepare(row: Row) -> BootFiles:
    """The kernel and the tree of a row, made if they are missing or stale. Raises CacheError."""
    mirror = debian_mirror()
    kernels = suite_apt(row.suite, mirror)
    same = row.suite == row.tree_suite
    userland = kernels if same else suite_apt(row.tree_suite, mirror)
    link = f"kernel-{row.suite}"
    new_kernel = fetch(kernels.kernel(), link, kernels)
    root, new_tree = current_tree(row.tree_suite, userland, mirror)
    return BootFiles(cached_kernel(link), root, new_kernel or new_tree)


def row_named(suite: str) -> Row:
    """The row of a suite's kernel, for argparse: raises ArgumentTypeError for none."""
    for row in ROWS:
        if row.suite == suite:
            return row
    known = ", ".join(row.suite for row in ROWS)
    raise argparse.ArgumentTypeError(f"{suite!r} is none of {known}")


def _trees_command(arguments: argparse.Namespace) -> int:
    for row in arguments.rows or ROWS:
        place = prepare(row)
        state = "made" if place.fresh else "up to date"
        print(f"{row.suite}: {place.kernel} over {place.root}: {state}", flush=True)
    return 0


def add_parser(subparsers: Subparsers) -> None:
    """Add the `trees` command."""
    parser = subparsers.add_parser("trees", help="build what the kernel matrix boots")
    suites = ", ".join(row.suite for row in ROWS)
    parser.add_argument("rows", metavar="ROW", nargs="*", type=row_named, help=f"of {suites}")
    parser.set_defaults(run=_trees_command)
