"""Debian kernels, and the few tools their guests need, without installing them on this machine.

Installing a kernel package would add a boot entry and might be booted next time, so the packages
are downloaded with apt and only unpacked, below `$XDG_CACHE_HOME/tcpstuck-trace/guest`. Symbolic
links there, such as `kernel` and `busybox`, name what is current; a link moves only once its
packages are completely unpacked, so that an interrupted download is never booted.
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
"""Names, in a guest, the image it was booted from."""
BUSYBOX_PACKAGE = "busybox-static"
"""Static, because virtme-ng copies this one file into the guest's initial file system."""
PROMETHEUS_PACKAGE = "prometheus"
"""With promtool. 19 MB to download and 95 MB unpacked (2.42, Debian 12): only who asks gets it."""


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


def cached_kernel(link: str = "kernel") -> Path:
    """The kernel image of the last fetch under that link; its modules lie in the same tree.

    Raises CacheError where none has been fetched.
    """
    images = sorted((cache_directory() / link / "boot").glob("vmlinu[xz]-*"))
    if not images:
        raise CacheError(
            "no kernel to boot a guest with",
            f"{cache_directory() / link} holds none",
            "run `make setup`, or name an image with --kernel",
        )
    return images[0].resolve()


def running_kernel_image() -> Path | None:
    """The file that the running kernel was booted from, None where it is not here."""
    named = os.environ.get(IMAGE_VARIABLE)
    release = os.uname().release
    try:
        image = Path(named) if named else cached_kernel()
    except CacheError:
        image = Path("/boot") / f"vmlinuz-{release}"
    return image if image.exists() and image.name.endswith(release) else None


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


def cached_prometheus() -> Path:
    """The directory of `prometheus` and `promtool`. Raises CacheError where none was fetched."""
    programs = cache_directory() / PROMETHEUS_PACKAGE / "usr" / "bin"
    if not (programs / "promtool").exists():
        raise CacheError(
            "no Prometheus to try the metrics with",
            f"{programs} has no promtool",
            "run `python3 -m lab fetch --prometheus`",
        )
    return programs.resolve()


def parse_record(record: str) -> dict[str, str]:
    """The one-line fields of the first paragraph of `apt-cache show` output."""
    fields: dict[str, str] = {}
    for line in record.split("\n\n", 1)[0].splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith(" "):
            fields[name] = value.strip()
    return fields


def dependencies(record: str) -> list[str]:
    """The first alternative of each dependency in a record, without its version."""
    wanted = parse_record(record).get("Depends", "").split(",")
    names = [one.split("|")[0].split("(")[0].strip() for one in wanted]
    return [name for name in names if name]


def kernel_dependency(record: str) -> str | None:
    """The package that a kernel meta-package's record leads to, or None."""
    return next((n for n in dependencies(record) if n.startswith("linux-image-")), None)


def kernel_parts(image: str, record: str) -> list[str]:
    """The packages that an image package's record splits its kernel into.

    Since 7.2 Debian's linux-image-RELEASE is empty and depends on linux-binary-RELEASE and
    linux-modules-RELEASE; before, it holds everything itself.
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
    """Standard output of an external command, its environment added to ours.

    Raises CacheError with its error line.
    """
    named = textwrap.shorten(f"`{' '.join(command)}`", 120)
    remedy = "run `make setup`, which refreshes the package lists, and look at the network"
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
    """The first that apt marks as an error: what follows is what came of it."""
    lines = done.stderr.strip().splitlines()
    marked = [line for line in lines if line.startswith("E: ")]
    return (marked[:1] or lines[-1:] or [f"status {done.returncode}"])[0]


@dataclass(frozen=True)
class Apt:
    """apt, asked about this machine's own archives or, with a configuration, about others."""

    configuration: Path | None = None
    """A file of apt.conf(5) that is read before all others; None: this machine as it is."""

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Standard output of one of apt's commands. Raises CacheError."""
        given = {} if self.configuration is None else {"APT_CONFIG": str(self.configuration)}
        return run_tool(command, cwd=cwd, environment=given)

    def record(self, name: str) -> str:
        """What `apt-cache show` says of the candidate. Raises CacheError where there is none."""
        return self.run("apt-cache", "show", "--no-all-versions", name)

    def candidates(self, names: Sequence[str]) -> list[Package]:
        """The versions of these packages that apt would install. Raises CacheError for none.

        All in one call, because apt may have to read its lists anew for each.
        """
        records = self.run("apt-cache", "show", "--no-all-versions", *names).split("\n\n")
        fields = [parse_record(record) for record in records]
        versions = {one["Package"]: one["Version"] for one in fields if "Version" in one}
        for name in names:
            if name not in versions:
                why, remedy = "apt knows none", "run `make setup`"
                raise CacheError(f"package {name} has no candidate", why, remedy)
        return [Package(name, versions[name]) for name in names]

    def kernel(self) -> list[Package]:
        """What the kernel meta-package for this architecture stands for now, the image first.

        Raises CacheError where there is no such package or it leads to no image.
        """
        meta = f"linux-image-{architecture()}"
        image = kernel_dependency(self.record(meta))
        if image is None:
            raise CacheError(
                f"package {meta} leads to no kernel image",
                "none of its dependencies is one",
                "name an image with --kernel",
            )
        return self.candidates([image, *kernel_parts(image, self.record(image))])

    def download_and_unpack(self, packages: Sequence[Package], target: Path) -> None:
        """Make the directory `target` of the packages' files. Raises CacheError."""
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
    """Let files be found where older packages have them, wherever newer ones put them.

    Debian 13's packages have bin and lib only below usr, and since 7.2 a kernel's image lies
    beside its modules. A hard link, because what it lies in tells virtme-ng where the modules are.
    """
    for name in ("bin", "sbin", "lib"):
        if (tree / "usr" / name).is_dir() and not (tree / name).exists():
            (tree / name).symlink_to(Path("usr") / name)
    for image in tree.glob("usr/lib/modules/*/vmlinuz"):
        (tree / "boot").mkdir(exist_ok=True)
        os.link(image, tree / "boot" / f"vmlinuz-{image.parent.name}")


def fetch(packages: Sequence[Package], link: str, apt: Apt = THIS_MACHINE) -> bool:
    """Make `link` in the cache name the unpacked packages; False if it already did.

    The first package names the directory. Raises CacheError where one cannot be had.
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
    """Two links may name the same directory: two suites may have the same kernel."""
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
    """The `fetch` command: bring the guest's kernel and busybox into the cache."""
    parser = subparsers.add_parser("fetch", help="download the kernel that guests boot")
    parser.add_argument(
        "--prometheus",
        action="store_true",
        help="instead Debian's Prometheus (19 MB), which a test of the metrics runs if it is there",
    )
    parser.set_defaults(run=_fetch_command)
