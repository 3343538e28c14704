"""Builds root trees and gets kernels of Debian suites for guests, by package name, not version.

A row of the kernel matrix is a suite's kernel over a userland with that suite's BCC. mmdebstrap
builds the trees below `$XDG_CACHE_HOME/tcpstuck-trace/guest`, from the archive that this machine's
apt uses. A tree contains only Debian packages, and no kernel headers. A tree is rebuilt if a
package in the lists below has a newer version, or if the recipe below has changed. A tree gets its
name only when it is complete.
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
"""Packages that the kernel tests and the guest's boot script need; zstd unpacks kernels."""
VERSIONED_PACKAGES = ("mariadb-server-core", "mariadb-client-core")
"""Packages that have MariaDB's version in their names in older suites."""
PACKAGES_OF_SOME_SUITES = ("util-linux-extra",)
"""Since util-linux 2.42 this package contains pivot_root, which the boot script needs."""
RECIPE = (
    "--variant=essential",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
)
"""mmdebstrap's options."""
BUILD_LIMIT_S = 1800.0
HEADERS = re.compile(r"^Package: (linux-(?:.*-)?headers(?:-.*)?|linux-libc-dev)$", re.MULTILINE)
"""Matches packages with kernel headers in dpkg's status file."""
BACKPORTS = "-backports"


@dataclass(frozen=True)
class Row:
    """A kernel, and the userland to test it with."""

    suite: str
    """The kernel's suite; a backported kernel runs over the tree of the suite without backports."""
    counts: bool = True
    """Whether a failure in this row fails the matrix; the newest kernels are only reported."""

    @property
    def tree_suite(self) -> str:
        """The suite of the userland, including BCC."""
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
    """The URL of the Debian archive that this machine's apt uses.

    Raises CacheError if apt's package lists come from none.
    """
    conditions = ("Created-By: Packages", "Origin: Debian", "Label: Debian")
    addresses = THIS_MACHINE.run(
        "apt-get", "indextargets", "--format", "$(REPO_URI)", *conditions
    ).split()
    if not addresses:
        raise CacheError(
            "no Debian archive to get other suites from",
            "apt has no package lists from a Debian archive",
            "run `apt-get update` with a Debian archive in apt's sources",
        )
    return addresses[0]


def source_line(mirror: str, suite: str) -> str:
    """The sources.list(5) line for a suite.

    apt checks the signature but not the validity dates. The dates of an archived suite have passed,
    and those of an unstable suite pass if a mirror is some days behind.
    """
    return f"deb [check-valid-until=no] {mirror} {suite} main"


def configuration(directory: Path) -> str:
    """An apt.conf(5) without this machine's sources, preferences and packages."""
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
    """An apt for a suite, with updated package lists. Raises CacheError.

    If the archive cannot be reached, the lists of the last update are used.
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
    """The known package with that name, or else with that name and the highest version suffix."""
    found: list[tuple[list[int], str]] = []
    for one in known:
        match = re.fullmatch(rf"{re.escape(name)}(?:-([0-9]+(?:\.[0-9]+)*))?", one)
        if match and match[1] is None:
            return one
        if match:
            found.append(([int(part) for part in match[1].split(".")], one))
    return max(found)[1] if found else None


def tree_packages(apt: Apt) -> list[Package]:
    """The packages of a tree, with the versions that apt would install. Raises CacheError."""
    known = set(apt.run("apt-cache", "pkgnames").split())
    versioned = [newest_of(name, known) or name for name in VERSIONED_PACKAGES]
    optional = [name for name in PACKAGES_OF_SOME_SUITES if name in known]
    return apt.candidates([*PACKAGES, *versioned, *optional])


def tree_name(suite: str, packages: Sequence[Package]) -> str:
    """The name of a tree; a changed recipe or package list gives another name."""
    ingredients = json.dumps([RECIPE, sorted(packages)])
    return f"{suite}_{hashlib.sha256(ingredients.encode()).hexdigest()[:16]}"


def headers_in(tree: Path) -> list[str]:
    """The kernel headers in a tree; there must be none, because the tool must work without them."""
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
        # If killed, mmdebstrap leaves /proc and more mounted; unshare keeps that out of our
        # namespace.
        alone = ("unshare", "--mount") if os.geteuid() == 0 else ()
        maker = (*alone, "mmdebstrap", f"--architectures={architecture()}")
        run_tool([*maker, *RECIPE, contents, *where], limit_s=BUILD_LIMIT_S)
        headers = headers_in(tree)
        if headers:
            why = f"it would contain {', '.join(headers)}"
            raise CacheError(f"no tree of {suite}", why, "find the package that adds them")
        tree.rename(target)


def current_tree(suite: str, apt: Apt, mirror: str) -> tuple[Path, bool]:
    """The tree of a suite, and whether it was built now; a new tree replaces the old one.

    No guest may run over the old tree. Raises CacheError.
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
    """The kernel and the root tree of a row's guest."""

    kernel: Path
    """The kernel image, with its modules in the same tree."""
    root: Path
    fresh: bool
    """Whether the kernel or the tree is new."""
    programs: Path | None = None
    """The directory of programs compiled for this kernel; None: the guest compiles all."""


def prepare(row: Row) -> BootFiles:
    """The kernel and the tree of a row, fetched or built if missing or stale. Raises CacheError."""
    mirror = debian_mirror()
    kernels = suite_apt(row.suite, mirror)
    same = row.suite == row.tree_suite
    userland = kernels if same else suite_apt(row.tree_suite, mirror)
    link = f"kernel-{row.suite}"
    new_kernel = fetch(kernels.kernel(), link, kernels)
    root, new_tree = current_tree(row.tree_suite, userland, mirror)
    return BootFiles(cached_kernel(link), root, new_kernel or new_tree)


def row_named(suite: str) -> Row:
    """The row of a suite's kernel, for argparse. Raises ArgumentTypeError if there is none."""
    for row in ROWS:
        if row.suite == suite:
            return row
    known = ", ".join(row.suite for row in ROWS)
    raise argparse.ArgumentTypeError(f"{suite!r} is not one of {known}")


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
    parser.add_argument("rows", metavar="ROW", nargs="*", type=row_named, help=f"one of {suites}")
    parser.set_defaults(run=_trees_command)
