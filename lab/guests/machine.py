"""How a guest is put together: virtme-run's arguments and the script that the guest runs first.

Everything here only makes text, so that it can be tested without booting.

virtme-run boots the kernel on a 9p export of the root tree that caches nothing, where every start
of a Python program reads thousands of pages from the host again. The script therefore mounts the
same tree a second time with a cache, puts a writable throw-away overlay on it and makes that the
root: an interpreter then starts three to four times faster, and the command may write anywhere.

A root tree of another suite holds no kernel, so the kernel's modules are exported beside it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lab.patience import PATIENCE_VARIABLE

CONTROL_MOUNT = "/run/lab/control"
"""Where the guest sees the directory through which harness and guest talk."""
STARTED_FILE = "started"
STATUS_FILE = "status"
SCRIPT_FILE = "boot.sh"
STDOUT_PIPE = "stdout"
STDERR_PIPE = "stderr"
STREAM_PORTS = (STDOUT_PIPE, STDERR_PIPE, "dev_stdout", "dev_stderr")
"""One virtio port for each writer: a port can be opened only once at a time, so that a command
which opens /dev/stdout or /dev/stderr itself needs another one, to the same pipe on the host."""

GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INSTRUCTION_CLOCK = "shift=0,sleep=off"
"""QEMU's -icount: 1 ns of guest time per instruction, and idle time skipped, not waited for."""
_9P_OPTIONS = "trans=virtio,version=9p2000.L,access=any,msize=512000"


class Wire(NamedTuple):
    """One end of a cable between two guests, each with a network interface on it."""

    descriptor: int
    """A stream socket; the other guest's QEMU gets the one it is connected to."""
    address: str
    """The interface's hardware address."""


@dataclass(frozen=True)
class GuestOptions:
    """What to run a command in; the defaults suit the kernel tests."""

    kernel: Path | None = None
    """Kernel image, its modules in the lib/modules of the tree it lies in; None: the cached one."""
    root: Path = Path("/")
    """The tree that becomes the guest's root; the guest cannot change it."""
    cpus: int = 2
    memory: str = "2G"
    icount: bool = False
    """Let the guest's clock count instructions (one CPU, emulation)."""
    shares: tuple[Path, ...] = ()
    """Directories the guest sees at the same path and may write to."""
    views: tuple[Path, ...] = ()
    """Directories the guest sees at the same path; what it writes there is thrown away."""
    wire: Wire | None = None
    """The guest's only network interface; its driver is left to the command to load."""
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    """For boot and command together."""
    native: str = "auto"
    """Run on this machine's kernel instead: "auto" where it lets us trace, "always", "never"."""

    @property
    def needs_guest(self) -> bool:
        """Whether something was asked for that only a guest has."""
        own = (self.kernel, self.wire)
        return self.icount or self.has_own_root or any(one is not None for one in own)

    @property
    def has_own_root(self) -> bool:
        """Whether the root is another tree than this machine's, one without a kernel."""
        return self.root != Path("/")


def command_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as shell text, with just these additions to an empty environment."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    return shlex.join(["/usr/bin/env", "-i", *settings, *command])


def guest_environment(additions: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command in a guest: nothing of the host's but the user's patience."""
    basis = {"PATH": GUEST_PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
    passed_on = {name: os.environ[name] for name in (PATIENCE_VARIABLE,) if name in os.environ}
    return {**basis, **passed_on, **additions}


def _share_tag(index: int) -> str:
    return f"lab.share{index}"


def _view_tag(index: int) -> str:
    return f"lab.view{index}"


def _modules_lines() -> str:
    """Let what the guest still lacks, such as the stream ports' driver, be loaded."""
    return f"""mkdir -p /lib/modules
mount -t 9p -o ro,{_9P_OPTIONS},cache=loose lab.modules /lib/modules
modprobe virtio_console
udevadm settle
"""


def _view_lines(index: int, path: Path) -> str:
    """A read-only export under a writable overlay, as the root tree has it."""
    place = f"$lab/over/view{index}"
    target = f'"$root"{shlex.quote(str(path))}'
    layers = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
    return f"""mkdir -p {place}/lower {place}/upper {place}/work {target}
mount -t 9p -o ro,{_9P_OPTIONS},cache=loose {_view_tag(index)} {place}/lower
mount -t overlay -o {layers} lab {target}
"""


def boot_script(command: Sequence[str], options: GuestOptions, cwd: Path) -> str:
    """The script the guest runs as root; it never returns, it resets the machine.

    A reset at the end, because with QEMU's -no-reboot that is the fastest way to switch off;
    what the command wrote has reached the host by then (ports and shares are synchronous).
    """
    shares = "\n".join(
        f'mkdir -p "$root"{shlex.quote(str(path))}\n'
        f'mount -t 9p -o rw,{_9P_OPTIONS} {_share_tag(index)} "$root"{shlex.quote(str(path))}'
        for index, path in enumerate(options.shares)
    )
    views = "".join(_view_lines(index, path) for index, path in enumerate(options.views))
    line = command_line(command, guest_environment(options.environment))
    return f"""set -eu
{_modules_lines() if options.has_own_root else ""}lab=/run/lab
root=$lab/over/root
mkdir -p $lab/lower $lab/over
mount -t 9p -o ro,{_9P_OPTIONS},cache=loose lab.root $lab/lower
mount -t tmpfs tmpfs $lab/over
mkdir $lab/over/upper $lab/over/work $root
mount -t overlay -o lowerdir=$lab/lower,upperdir=$lab/over/upper,workdir=$lab/over/work lab $root
mount -t tmpfs -o mode=0755 tmpfs $root/run
mkdir -p $root/run/lock $root{CONTROL_MOUNT} $root$lab/old
for tree in /dev /proc /sys; do mount --rbind $tree $root$tree; done
if mountpoint -q /lib/modules; then
    mkdir -p $root/lib/modules
    mount --rbind /lib/modules $root/lib/modules
fi
mount --move {CONTROL_MOUNT} $root{CONTROL_MOUNT}
{views}{shares}
udevadm control --exit || :
cd $root
pivot_root . ./$lab/old
cd /
umount -l $lab/old
for stream in stdout stderr; do
    rm -f /dev/$stream
    ln -s /dev/virtio-ports/lab.dev_$stream /dev/$stream
done
ulimit -l unlimited
cd {shlex.quote(str(cwd))}
set +e
: > {CONTROL_MOUNT}/{STARTED_FILE}
{line} < /dev/null > /dev/virtio-ports/lab.{STDOUT_PIPE} 2> /dev/virtio-ports/lab.{STDERR_PIPE}
echo $? > {CONTROL_MOUNT}/{STATUS_FILE}
echo b > /proc/sysrq-trigger
"""


def native_script(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The same command for this machine's own kernel, with the environment added to ours.

    A limit on locked memory that cannot be lifted here is for the command to meet and report.
    """
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()
    )
    return f"ulimit -l unlimited 2> /dev/null\n{exports}exec {shlex.join(command)}\n"


def _quoted(path: Path) -> str:
    """A path inside a QEMU option, where a comma separates and two commas mean one."""
    return str(path).replace(",", ",,")


def _export(path: Path, tag: str, read_only: bool) -> list[str]:
    access = ",readonly=on" if read_only else ""
    # Files of several file systems in one export need their inode numbers kept apart.
    return [
        "-virtfs",
        f"local,path={_quoted(path)},mount_tag={tag},security_model=none,multidevs=remap{access}",
    ]


def modules_of(kernel: Path) -> Path:
    """The modules beside a kernel image: lib/modules of the tree whose boot the image is in."""
    return kernel.parent.parent / "lib" / "modules"


def qemu_arguments(options: GuestOptions, control: Path, kernel: Path) -> list[str]:
    """What QEMU gets beyond virtme-run's own: exports, stream ports, wire, instruction clock."""
    arguments = _export(options.root, "lab.root", read_only=True)
    arguments += _export(control, "lab.control", read_only=False)
    for index, path in enumerate(options.shares):
        arguments += _export(path, _share_tag(index), read_only=False)
    for index, path in enumerate(options.views):
        arguments += _export(path, _view_tag(index), read_only=True)
    if options.has_own_root:
        arguments += _export(modules_of(kernel).resolve(), "lab.modules", read_only=True)
    arguments += ["-device", "virtio-serial-pci"]
    for port in STREAM_PORTS:
        pipe = control / port.replace("dev_", "")
        arguments += ["-chardev", f"file,id=lab.{port},path={_quoted(pipe)}"]
        arguments += ["-device", f"virtserialport,name=lab.{port},chardev=lab.{port}"]
    if options.wire is not None:
        arguments += ["-netdev", f"socket,id=lab.wire,fd={options.wire.descriptor}"]
        card = f"virtio-net-pci,netdev=lab.wire,mac={options.wire.address},romfile="
        arguments += ["-device", card]
    if options.icount:
        arguments += ["-icount", INSTRUCTION_CLOCK]
    return arguments


def virtme_arguments(
    options: GuestOptions, *, kernel: Path, busybox: Path, control: Path, use_kvm: bool
) -> list[str]:
    """virtme-run's arguments for one guest.

    9p is forced because virtme-ng would otherwise first try, for three seconds and in vain, the
    virtiofsd that Debian 12 ships.
    """
    first = (
        f"mkdir -p {CONTROL_MOUNT} && "
        f"mount -t 9p -o rw,{_9P_OPTIONS} lab.control {CONTROL_MOUNT} && "
        f"exec /bin/bash {CONTROL_MOUNT}/{SCRIPT_FILE}"
    )
    arguments = ["--kimg", str(kernel), "--mods", "auto", "--busybox", str(busybox)]
    arguments += ["--root", str(options.root), "--force-9p", "--name", "tcpstuck-guest"]
    arguments += [] if use_kvm and not options.icount else ["--disable-kvm"]
    arguments += ["--cpus", "1" if options.icount else str(options.cpus)]
    arguments += ["--memory", options.memory]
    # Modules of a kernel that is not installed are linked into /lib/modules by virtme-ng.
    arguments += ["--overlay-rwdir", "/lib", "--overlay-rwdir", "/etc"]
    # On a busy host an emulated timer can come too late for the kernel, which panics without it:
    # "IO-APIC + timer doesn't work!" (check_timer in arch/x86/kernel/apic/io_apic.c).
    arguments += ["--kopt", "no_timer_check"]
    arguments += ["--show-boot-console", "--kopt", "loglevel=5", "--script-sh", first]
    return [*arguments, "--qemu-opts", *qemu_arguments(options, control, kernel)]
