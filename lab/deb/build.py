"""`python3 -m lab deb`: builds the package with only the dependencies in packaging/debian.

The build runs in a fresh tree for two reasons. debhelper and lintian pull in a hundred packages
that the lab does not need otherwise, and a minimal tree reveals missing build dependencies.
mmdebstrap runs the steps inside the tree, as root or as a user, and then deletes the tree.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import LabError
from lab.golden_files import kept_recording
from lab.guests.kernel_tests import BUILD, REPOSITORY
from lab.guests.packages import run_tool
from lab.guests.trees import debian_mirror, source_line
from tcpstuck_bpf import __version__

if TYPE_CHECKING:
    from lab.guests.packages import Subparsers

NAME = "tcpstuck-trace"
BUILT_IN = "bookworm"
TRIED_IN = ("bookworm", "trixie")
"""One build serves all suites: the package has no machine code, and newer suites accept it."""
OUTPUT = BUILD / "deb"
PACKAGING = REPOSITORY / "packaging"
SOURCES = (
    *("setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"),
    *("tcpstuck_bpf", "bpf", "docs", "lab"),
)
TRIAL = Path(__file__).with_name("trial.sh")
TRIAL_TOOLS = ("man-db", "systemd")
"""Packages that trial.sh uses to check the installed package."""
RECORDING = "overflow"
LIMIT_S = 1800.0
LAST_LINES = 40
"""Number of output lines to print if the steps fail."""
LINTIAN = "lintian --allow-root --info --display-info --pedantic --tag-display-limit=0"
"""The command greps the output for tags, because --fail-on also counts overridden tags."""


def in_fresh_tree(
    suite: str, packages: Sequence[str], source: Path, script: str, log: Path
) -> None:
    """Run a script as root in a fresh tree of a suite that contains a copy of `source`.

    Files that the script leaves in `out` are copied back into `source`; its output goes to `log`.
    Raises LabError.
    """
    inside = f"cd /{source.name} && export LC_ALL=C.UTF-8 && mkdir out && {script}"
    hooks = (
        f"copy-in {shlex.quote(str(source))} /",
        f'chroot "$1" sh -ec {shlex.quote(inside)}',
        f"copy-out /{source.name}/out {shlex.quote(str(source))}",
    )
    # If killed, mmdebstrap leaves /proc and more mounted; unshare keeps that out of our namespace.
    alone = ("unshare", "--mount") if os.geteuid() == 0 else ()
    words = [*alone, "mmdebstrap", "--variant=apt", "--format=null"]
    words += [f"--include={','.join(packages)}", *(f"--customize-hook={hook}" for hook in hooks)]
    words += [suite, "/dev/null", source_line(debian_mirror(), suite)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        status = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=LIMIT_S
        ).returncode
    if status:
        print("".join(log.read_text("utf-8", "replace").splitlines(keepends=True)[-LAST_LINES:]))
        raise LabError(
            f"the steps in a fresh tree of {suite} failed",
            f"mmdebstrap ended with status {status}",
            f"see above; the whole output is in {log}",
        )


def build_dependencies() -> list[str]:
    """Build-Depends of packaging/debian/control, with debhelper for debhelper-compat."""
    control = (PACKAGING / "debian" / "control").read_text("utf-8")
    field = re.search(r"^Build-Depends:((?:.*\n)(?: .*\n)*)", control, re.MULTILINE)
    assert field is not None
    names = [one.split()[0] for one in field[1].split(",")]
    return ["debhelper" if name == "debhelper-compat" else name for name in names]


def _copy_sources(target: Path) -> None:
    target.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, target / name, ignore=ignored)
        else:
            shutil.copy2(path, target)
    shutil.copytree(PACKAGING / "debian", target / "debian")
    for file in PACKAGING.glob(f"{NAME}.*"):
        shutil.copy2(file, target / "debian")


def build(output: Path = OUTPUT) -> Path:
    """Build the package and check it with lintian; returns its path. Raises LabError."""
    packages = [*build_dependencies(), "lintian"]
    # -d skips the dependency check, which demands build-essential; nothing is compiled here.
    script = (
        "cd source && dpkg-buildpackage --build=binary --no-sign -d && cd .. "
        f"&& mv {NAME}_* out && {LINTIAN} out/*.changes >found "
        "&& cat found && ! grep -q '^[EWIPXC]: ' found"
    )
    with tempfile.TemporaryDirectory(prefix="tcpstuck-deb-") as scratch:
        place = Path(scratch) / "build"
        place.mkdir()
        _copy_sources(place / "source")
        in_fresh_tree(BUILT_IN, packages, place, script, output / "build.log")
        (built,) = (place / "out").glob("*.deb")
        return Path(shutil.copy2(built, output))


def dependencies(package: Path) -> list[str]:
    """The package names in a package's Depends field. Raises LabError."""
    field = run_tool(["dpkg-deb", "--field", str(package), "Depends"])
    return [re.split(r"[ :(]", one.strip())[0] for one in field.split(",")]


def try_in(suite: str, package: Path, output: Path = OUTPUT) -> None:
    """Install, use and purge a package in a fresh tree of a suite. Raises LabError."""
    with tempfile.TemporaryDirectory(prefix="tcpstuck-deb-") as scratch:
        place = Path(scratch) / "trial"
        place.mkdir()
        shutil.copy2(package, place)
        shutil.copy2(TRIAL, place)
        (place / "recording").write_bytes(kept_recording(RECORDING))
        script = f"./{TRIAL.name} /trial/{package.name} {__version__} /trial/recording"
        needed = [*dependencies(package), *TRIAL_TOOLS]
        in_fresh_tree(suite, needed, place, script, output / f"trial-{suite}.log")


def _deb_command(arguments: argparse.Namespace) -> int:
    package = build()
    print(package)
    for suite in TRIED_IN if arguments.trial else ():
        try_in(suite, package)
        print(f"{suite}: installed, used, removed and purged")
    return 0


def add_parser(subparsers: Subparsers) -> None:
    """Add the `deb` command."""
    parser = subparsers.add_parser("deb", help="build the Debian package in a fresh tree")
    suites = " and ".join(TRIED_IN)
    parser.add_argument(
        "--trial", action="store_true", help=f"test the package in fresh trees of {suites}"
    )
    parser.set_defaults(run=_deb_command)
