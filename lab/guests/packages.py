"""Downloads Debian kernels and the tools that guests need, without installing them.

An installed kernel package would add a boot entry, and this machine might boot it next time.
Therefore apt only downloads the packages, and dpkg-deb unpacks them below
`$XDG_CACHE_HOME/tcpstuck-trace/guest`. Symbolic links there, such as `kernel` and `busybox`, point
to the current packages. A link changes only after its packages are completely unpacked, so no guest
boots an interrupted download.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from lab.errors import LabError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DOWNLOAD_LIMIT_S = 600.0
IMAGE_VARIABLE = "TCPSTUCK_LAB_KERNEL_IMAGE"
"""In a guest, the path of the image that the guest was booted from."""
BUSYBOX_PACKAGE = "busybox-static"
"""A static busybox, because virtme-ng copies only this file into the guest's initramfs."""
PROMETHEUS_PACKAGE = "prometheus"
"""Prometheus with promtool; fetched only on request: 19 MB download, 95 MB unpacked (2.42, Debian
12)."""


class CacheError(LabError):
    """A package for guests is missing from the cache, or cannot be fetched."""

    exit_status: ClassVar[int] = 125


class Package(NamedTuple):
    """A Debian package in one version."""

    name: str
    version: str

    @property
    def directory_name(self) -> str:
        """The name of the directory for the unpacked package."""
        return f"{self.name}_{self.version}"


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """The directory of packages for guests, according to the XDG base directory specification."""
    base = environment.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "tcpstuck-trace" / "guest"


def cached_kernel(link: str = "kernel") -> Path:
    """The last kernel image fetched under that link; its modules are in the same tree.

    Raises CacheError if none has been fetched.
    """
    images = sorted((cache_directory() / link / "boot").glob("vmlinu[xz]-*"))
    if not images:
        raise CacheError(
            "no kernel to boot a guest with",
            f"{cache_directory() / link} contains none",
            "run `make setup`, or name an image with --kernel",
        )
    return images[0].resolve()


def running_kernel_image() -> Path | None:
    """The image file of the running kernel; None if it is not on this machine."""
    named = os.environ.get(IMAGE_VARIABLE)
    release = os.uname().release
    try:
        image = Path(named) if named else cached_kernel()
    except CacheError:
        image = Path("/boot") / f"vmlinuz-{release}"
    return image if image.exists() and image.name.endswith(release) else None


def cached_busybox() -> Path:
    """The static busybox of the last fetch. Raises CacheError if none has been fetched."""
    busybox = cache_directory() / "busybox" / "bin" / "busybox"
    if not busybox.exists():
        raise CacheError(
            "no busybox for the guest's initramfs",
            f"{busybox} does not exist",
            "run `make setup`",
        )
    return busybox.resolve()


def cached_prometheus() -> Path:
    """The directory of `prometheus` and `promtool`. Raises CacheError if none was fetched."""
    programs = cache_directory() / PROMETHEUS_PACKAGE / "usr" / "bin"
    if not (programs / "promtool").exists():
        raise CacheError(
            "no Prometheus to test the metrics with",
            f"{programs} has no promtool",
            "run `python3 -m lab fetch --prometheus`",
        )
    return programs.resolve()


def parse_record(record: str) -> dict[str, str]:
    """The one-line fields in the first paragraph of `apt-cache show` output."""
    fields: dict[str, str] = {}
    for line in record.split("\n\n", 1)[0].splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith(" "):
            fields[name] = value.strip()
    return fields


def dependencies(record: str) -> list[str]:
    """The first alternative of each dependency in a record, without versions."""
    wanted = parse_record(record).get("Depends", "").split(",")
    names = [one.split("|")[0].split("(")[0].strip() for one in wanted]
    return [name for name in names if name]


def kernel_dependency(record: str) -> str | None:
    """The image package that a kernel meta-package's record depends on, or None."""
    return next((n for n in dependencies(record) if n.startswith("linux-image-")), None)


def kernel_parts(image: str, record: str) -> list[str]:
    """The packages that contain the kernel of an image package, according to its record.

    Since 7.2, Debian's linux-image-RELEASE is empty and depends on linux-binary-RELEASE and
    linux-modules-RELEASE. Older image packages contain everything themselves.
    """
    release = image[len("linux-image-") :]
    return [name for name in dependencies(record) if name.endswith(f"-{release}")]


def run_tool(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit_s: float = DOWNLOAD_LIMIT_S,
) -> str:
    """Run an external command with `environment` added to ours; returns its standard output.

    Raises CacheError with the command's error line.
    """
    named = textwrap.shorten(f"`{' '.join(command)}`", 120)
    remedy = "run `make setup`, which refreshes the package lists, and check the network"
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CacheError(f"{named} did not run", str(error), remedy) from error
    if done.returncode != 0:
        raise CacheError(f"{named} failed", _error_line(done), remedy)
    return done.stdout


def _error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The first line that apt marks as an error; later ones are consequences."""
    lines = done.stderr.strip().splitlines()
    marked = [line for line in lines if line.startswith("E: ")]
    return (marked[:1] or lines[-1:] or [f"status {done.returncode}"])[0]


@dataclass(frozen=True)
class Apt:
    """apt for this machine's archives or, with a configuration, for others."""

    configuration: Path | None = None
    """An apt.conf(5) file that apt reads before all others; None: this machine's configuration."""

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run an apt command; returns its standard output. Raises CacheError."""
        given = {} if self.configuration is None else {"APT_CONFIG": str(self.configuration)}
        return run_tool(command, cwd=cwd, environment=given)

    def record(self, name: str) -> str:
        """The candidate's record from `apt-cache show`. Raises CacheError if there is none."""
        return self.run("apt-cache", "show", "--no-all-versions", name)

    def candidates(self, names: Sequence[str]) -> list[Package]:
        """The versions of the packages that apt would install. Raises CacheError if one has none.

        One call handles all packages, because apt may read its lists again for each call.
        """
        records = self.run("apt-cache", "show", "--no-all-versions", *names).split("\n\n")
        fields = [parse_record(record) for record in records]
        versions = {one["Package"]: one["Version"] for one in fields if "Version" in one}
        for name in names:
            if name not in versions:
                why, remedy = "apt finds no version", "run `make setup`"
                raise CacheError(f"package {name} has no candidate", why, remedy)
        return [Package(name, versions[name]) for name in names]

    def kernel(self) -> list[Package]:
        """The packages of the current kernel for this architecture, the image package first.

        Raises CacheError if there is no meta-package, or if it depends on no image.
        """
        meta = f"linux-image-{architecture()}"
        image = kernel_dependency(self.record(meta))
        if image is None:
            raise CacheError(
                f"package {meta} depends on no kernel image",
                "none of its dependencies is a linux-image package",
                "name an image with --kernel",
            )
        return self.candidates([image, *kernel_parts(image, self.record(image))])

    def download_and_unpack(self, packages: Sequence[Package], target: Path) -> None:
        """Download packages and unpack them into a new directory `target`. Raises CacheError."""
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            here = Path(scratch)
            # apt's unprivileged download user cannot enter a private cache directory.
            as_us = ("-o", "APT::Sandbox::User=root")
            wanted = [f"{package.name}={package.version}" for package in packages]
            self.run("apt-get", *as_us, "download", *wanted, cwd=here)
            for archive in here.glob("*.deb"):
                run_tool(["dpkg-deb", "-x", str(archive), str(here / "tree")])
            give_one_layout(here / "tree")
            (here / "tree").chmod(0o755)
            (here / "tree").rename(target)


THIS_MACHINE = Apt()


def architecture() -> str:
    """Debian's name of this machine's architecture. Raises CacheError without dpkg."""
    return run_tool(["dpkg", "--print-architecture"]).strip()


def give_one_layout(tree: Path) -> None:
    """Give newer packages' files the paths that older packages use.

    Debian 13's packages have bin and lib only below usr. Since 7.2, a kernel's image is in the
    directory of its modules. The image gets a hard link, because virtme-ng finds the modules by the
    image's directory.
    """
    for name in ("bin", "sbin", "lib"):
        if (tree / "usr" / name).is_dir() and not (tree / name).exists():
            (tree / name).symlink_to(Path("usr") / name)
    for image in tree.glob("usr/lib/modules/*/vmlinuz"):
        (tree / "boot").mkdir(exist_ok=True)
        os.link(image, tree / "boot" / f"vmlinuz-{image.parent.name}")


def fetch(packages: Sequence[Package], link: str, apt: Apt = THIS_MACHINE) -> bool:
    """Point `link` in the cache to the unpacked packages; returns False if it already did.

    The first package gives the directory its name. Raises CacheError if a download fails.
    """
    cache = cache_directory()
    unpacked = cache / "packages" / packages[0].directory_name
    pointer = cache / link
    if unpacked.is_dir() and pointer.resolve() == unpacked.resolve():
        return False
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    previous = pointer.resolve() if pointer.is_symlink() else None
    if not unpacked.is_dir():
        apt.download_and_unpack(packages, unpacked)
    fresh = cache / f".{link}.{os.getpid()}"
    fresh.symlink_to(unpacked)
    fresh.replace(pointer)
    if previous is not None and previous.parent == unpacked.parent.resolve():
        _remove_unless_linked(previous)
    return True


def _remove_unless_linked(unpacked: Path) -> None:
    """Remove a directory unless another link points to it: two suites may share a kernel."""
    links = (path for path in cache_directory().iterdir() if path.is_symlink())
    if all(link.resolve() != unpacked for link in links):
        shutil.rmtree(unpacked, ignore_errors=True)


def _fetch_command(arguments: argparse.Namespace) -> int:
    if arguments.prometheus:
        wanted = [(THIS_MACHINE.candidates([PROMETHEUS_PACKAGE]), PROMETHEUS_PACKAGE)]
    else:
        busybox = THIS_MACHINE.candidates([BUSYBOX_PACKAGE])
        wanted = [(THIS_MACHINE.kernel(), "kernel"), (busybox, "busybox")]
    for packages, link in wanted:
        state = "unpacked into the cache" if fetch(packages, link) else "already in the cache"
        print(f"{packages[0].name} {packages[0].version}: {state}")
    return 0


def add_parser(subparsers: Subparsers) -> None:
    """Add the `fetch` command, which downloads the guest's kernel and busybox."""
    parser = subparsers.add_parser("fetch", help="download the kernel that guests boot")
    parser.add_argument(
        "--prometheus",
        action="store_true",
        help="fetch Debian's Prometheus (19 MB) instead, for an optional test of the metrics",
    )
    parser.set_defaults(run=_fetch_command)
