"""A Debian kernel, and the few tools its guest needs, without installing them on this machine.

Installing a kernel package would add a boot entry and might be booted next time, so the packages
are downloaded with apt and only unpacked, below `$XDG_CACHE_HOME/tcpstuck-trace/guest`. Two
symbolic links there, `kernel` and `busybox`, name what is current; a link moves only once its
package is completely unpacked, so that an interrupted download is never booted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from lab.errors import LabError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DOWNLOAD_LIMIT_S = 600.0
BUSYBOX_PACKAGE = "busybox-static"
"""Static, because virtme-ng copies this one file into the guest's initial file system."""


class CacheError(LabError):
    """The kernel to boot is not there, or cannot be fetched."""

    exit_status: ClassVar[int] = 125


class Package(NamedTuple):
    """A Debian package in one version."""

    name: str
    version: str

    @property
    def directory_name(self) -> str:
        """The name of the directory it is unpacked into."""
        return f"{self.name}_{self.version}"


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where packages for guests are kept, by the XDG base directory specification."""
    base = environment.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "tcpstuck-trace" / "guest"


def cached_kernel() -> Path:
    """The kernel image of the last fetch; its modules lie in the same tree.

    Raises CacheError where none has been fetched.
    """
    images = sorted((cache_directory() / "kernel" / "boot").glob("vmlinu[xz]-*"))
    if not images:
        raise CacheError(
            "no kernel to boot a guest with",
            f"{cache_directory() / 'kernel'} holds none",
            "run `make setup`, or name an image with --kernel",
        )
    return images[0].resolve()


def cached_busybox() -> Path:
    """The static busybox of the last fetch. Raises CacheError where none has been fetched."""
    busybox = cache_directory() / "busybox" / "bin" / "busybox"
    if not busybox.exists():
        raise CacheError(
            "no busybox for the guest's initial file system",
            f"{busybox} does not exist",
            "run `make setup`",
        )
    return busybox.resolve()


def parse_record(record: str) -> dict[str, str]:
    """The one-line fields of the first paragraph of `apt-cache show` output."""
    fields: dict[str, str] = {}
    for line in record.split("\n\n", 1)[0].splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith(" "):
            fields[name] = value.strip()
    return fields


def kernel_dependency(record: str) -> str | None:
    """The package that a kernel meta-package's record leads to, or None."""
    for alternative in parse_record(record).get("Depends", "").split(","):
        name = alternative.split("|")[0].split("(")[0].strip()
        if name.startswith("linux-image-"):
            return name
    return None


def _run(command: list[str], cwd: Path | None = None) -> str:
    """Standard output of an external command. Raises CacheError with its last error line."""
    remedy = "run `make setup`, which refreshes the package lists, and look at the network"
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CacheError(f"`{' '.join(command)}` did not run", str(error), remedy) from error
    if done.returncode != 0:
        complaint = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise CacheError(f"`{' '.join(command)}` failed", complaint, remedy)
    return done.stdout


def _candidate_record(name: str) -> str:
    return _run(["apt-cache", "show", "--no-all-versions", name])


def kernel_package() -> Package:
    """What the distribution's kernel meta-package for this architecture stands for now."""
    architecture = _run(["dpkg", "--print-architecture"]).strip()
    meta = f"linux-image-{architecture}"
    name = kernel_dependency(_candidate_record(meta))
    if name is None:
        raise CacheError(
            f"package {meta} leads to no kernel image",
            "none of its dependencies is one",
            "name an image with --kernel",
        )
    return candidate(name)


def candidate(name: str) -> Package:
    """The version of a package that apt would install."""
    version = parse_record(_candidate_record(name)).get("Version")
    if version is None:
        raise CacheError(f"package {name} has no candidate", "apt knows none", "run `make setup`")
    return Package(name, version)


def fetch(package: Package, link: str) -> bool:
    """Make `link` in the cache name the unpacked package; False if it already did."""
    cache = cache_directory()
    unpacked = cache / "packages" / package.directory_name
    pointer = cache / link
    if unpacked.is_dir() and pointer.resolve() == unpacked.resolve():
        return False
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    previous = pointer.resolve() if pointer.is_symlink() else None
    if not unpacked.is_dir():
        _download_and_unpack(package, unpacked)
    fresh = cache / f".{link}.{os.getpid()}"
    fresh.symlink_to(unpacked)
    fresh.replace(pointer)
    if previous is not None and previous.parent == unpacked.parent.resolve():
        shutil.rmtree(previous, ignore_errors=True)
    return True


def _download_and_unpack(package: Package, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        here = Path(scratch)
        # apt's unprivileged download user cannot enter a private cache directory.
        as_us = ["-o", "APT::Sandbox::User=root"]
        _run(["apt-get", *as_us, "download", f"{package.name}={package.version}"], cwd=here)
        archive = next(here.glob("*.deb"))
        _run(["dpkg-deb", "-x", str(archive), str(here / "tree")])
        (here / "tree").chmod(0o755)
        (here / "tree").rename(target)


def _fetch_command(_arguments: argparse.Namespace) -> int:
    for package, link in ((kernel_package(), "kernel"), (candidate(BUSYBOX_PACKAGE), "busybox")):
        state = "unpacked into the cache" if fetch(package, link) else "already in the cache"
        print(f"{package.name} {package.version}: {state}")
    return 0


def add_parser(subparsers: Subparsers) -> None:
    """The `fetch` command: bring the guest's kernel and busybox into the cache."""
    parser = subparsers.add_parser("fetch", help="download the kernel that guests boot")
    parser.set_defaults(run=_fetch_command)
