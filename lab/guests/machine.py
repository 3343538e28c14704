"""Generates virtme-run's arguments and the script that a guest runs first.

All functions only generate text, so that tests need not boot a guest.

virtme-run boots the kernel on a 9p export of the root tree without a cache. On it, every start of a
Python program reads thousands of pages from the host again. The script therefore mounts the same
tree a second time with a cache, adds a writable throw-away overlay, and makes the overlay the root.
An interpreter then starts three to four times faster, and the command may write anywhere.

A root tree of another suite contains no kernel, so the kernel's modules are exported separately.
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
"""The guest's mount point of the directory that harness and guest share."""
STARTED_FILE = "started"
STATUS_FILE = "status"
SCRIPT_FILE = "boot.sh"
STDOUT_PIPE = "stdout"
STDERR_PIPE = "stderr"
STREAM_PORTS = (STDOUT_PIPE, STDERR_PIPE, "dev_stdout", "dev_stderr")
"""One virtio port per writer, because a port can be opened only once at a time. A command that
opens /dev/stdout or /dev/stderr itself needs another port, connected to the same pipe on the
host."""

GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INSTRUCTION_CLOCK = "shift=0,sleep=off"
"""QEMU's -icount: 1 ns of guest time per instruction; idle time is skipped without waiting."""
EMULATED = ("tsc=reliable", "mitigations=off")
"""Kernel options for emulation; together they save a third of the processor time of programs that
start. All emulated processors read the same time-stamp counter, but the kernel's check finds them
apart if the host delays one, and then each look at the clock is an access to the emulated HPET,
under QEMU's global lock. Retpolines guard against speculation, which an emulator does not do. A
guest that counts instructions keeps both, because its counts stand for a real machine."""
ONE_THREAD = ("-accel", "tcg,thread=single")
"""QEMU's options for emulation: all processors of a guest take turns on one thread of the host.

With a thread for each, a processor whose thread waits for the host's CPU keeps the others waiting,
and they wait busily: for a spin lock, or until every processor has seen that code or page tables
have changed, as for each program that is attached. Beside a second guest on two CPUs that took a
third of the host's processor time. Now a processor that waits (PAUSE) gives its turn away. Turns
also change with each interrupt, and every 100 ms at the latest (accel/tcg/tcg-accel-ops-rr.c).
"""
KICKED_DIRECTLY = ("virtio-serial-pci.ioeventfd=off", "virtio-9p-pci.ioeventfd=off")
"""QEMU's -global options: a guest's request is taken by the thread that emulates its processor.

With ioeventfd each request wakes QEMU's main loop, which asks some 450 descriptors each time,
because a virtio-serial device has 64 queues. That took a quarter of a guest's processor time.
"""
FEW_DEVICES = ("-machine", "sata=off,smbus=off,vmport=off,i8042=off")
PLAIN_CPU = ("-cpu", "qemu64,-svm,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,+rdseed")
"""QEMU's options for emulation: what is not there needs no driver, and udev finds less to do.

virtme-ng's `-cpu max` makes the kernel load KVM and a dozen ciphers, which test themselves at the
start. x86-64-v2 is what wheels from PyPI are compiled for. Without a random number instruction the
kernel would wait for entropy. With these options and KICKED_DIRECTLY a guest boots in less than
half of the processor time. A guest that counts instructions has neither, because its counts stand
for a real machine.
"""
_9P_OPTIONS = "trans=virtio,version=9p2000.L,access=any,msize=512000"


class Wire(NamedTuple):
    """One end of a cable that connects the network interfaces of two guests."""

    descriptor: int
    """One socket of a stream socket pair; the other guest's QEMU gets the other one."""
    address: str
    """The interface's hardware address."""


@dataclass(frozen=True)
class GuestOptions:
    """The properties of a guest; the defaults suit the kernel tests."""

    kernel: Path | None = None
    """Kernel image, with its modules in lib/modules of the same tree; None: the cached kernel."""
    root: Path = Path("/")
    """The tree that becomes the guest's root; the guest cannot change it."""
    cpus: int = 2
    memory: str = "2G"
    icount: bool = False
    """The guest's clock counts instructions (one CPU, emulation)."""
    shares: tuple[Path, ...] = ()
    """Directories that the guest sees at the same path and may write to."""
    views: tuple[Path, ...] = ()
    """Directories that the guest sees at the same path; the guest's writes are discarded."""
    wire: Wire | None = None
    """The guest's only network interface; the command must load its driver."""
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    """For boot and command together."""
    silence_s: float | None = None
    """A command that prints nothing for this long counts as hung and is ended; None: no limit."""
    native: str = "auto"
    """Run on this machine's kernel instead: "auto" (if it can be traced), "always" or "never"."""

    @property
    def needs_guest(self) -> bool:
        """Whether an option requires a guest."""
        own = (self.kernel, self.wire)
        return self.icount or self.has_own_root or any(one is not None for one in own)

    @property
    def has_own_root(self) -> bool:
        """Whether the root is a tree without a kernel, not this machine's root."""
        return self.root != Path("/")


def command_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as shell text, with only these variables in its environment."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    return shlex.join(["/usr/bin/env", "-i", *settings, *command])


def guest_environment(additions: Mapping[str, str]) -> dict[str, str]:
    """A command's environment in a guest; from the host's it has only PATIENCE_VARIABLE."""
    basis = {"PATH": GUEST_PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
    passed_on = {name: os.environ[name] for name in (PATIENCE_VARIABLE,) if name in os.environ}
    return {**basis, **passed_on, **additions}


def _share_tag(index: int) -> str:
    return f"lab.share{index}"


def _view_tag(index: int) -> str:
    return f"lab.view{index}"


def _modules_lines() -> str:
    """Shell lines that load missing modules, such as the stream ports' driver."""
    return f"""mkdir -p /lib/modules
mount -t 9p -o ro,{_9P_OPTIONS},cache=loose lab.modules /lib/modules
modprobe virtio_console
udevadm settle
"""


def _view_lines(index: int, path: Path) -> str:
    """Shell lines that mount a read-only export under a writable overlay, as for the root."""
    place = f"$lab/over/view{index}"
    target = f'"$root"{shlex.quote(str(path))}'
    layers = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
    return f"""mkdir -p {place}/lower {place}/upper {place}/work {target}
mount -t 9p -o ro,{_9P_OPTIONS},cache=loose {_view_tag(index)} {place}/lower
mount -t overlay -o {layers} lab {target}
"""


def boot_script(command: Sequence[str], options: GuestOptions, cwd: Path) -> str:
    """The script that the guest runs as root; it ends with a reset of the machine.

    With QEMU's -no-reboot, a reset is the fastest way to power off. The command's output has
    reached the host by then, because ports and shares are synchronous.
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
    """The script that runs a command on this machine's own kernel, with `environment` added.

    If the limit on locked memory cannot be raised, the command must report that itself.
    """
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()
    )
    return f"ulimit -l unlimited 2> /dev/null\n{exports}exec {shlex.join(command)}\n"


def _quoted(path: Path) -> str:
    """A path for a QEMU option: commas are separators there, and `,,` is a literal comma."""
    return str(path).replace(",", ",,")


def _export(path: Path, tag: str, read_only: bool) -> list[str]:
    access = ",readonly=on" if read_only else ""
    # multidevs=remap keeps inode numbers of several file systems in one export distinct.
    return [
        "-virtfs",
        f"local,path={_quoted(path)},mount_tag={tag},security_model=none,multidevs=remap{access}",
    ]


def modules_of(kernel: Path) -> Path:
    """The modules of a kernel image: lib/modules of the tree that has the image in boot."""
    return kernel.parent.parent / "lib" / "modules"


def qemu_arguments(options: GuestOptions, control: Path, kernel: Path) -> list[str]:
    """QEMU arguments in addition to virtme-run's: exports, stream ports, wire, -icount."""
    arguments = _export(options.root, "lab.root", read_only=True)
    arguments += _export(control, "lab.control", read_only=False)
    for index, path in enumerate(options.shares):
        arguments += _export(path, _share_tag(index), read_only=False)
    for index, path in enumerate(options.views):
        arguments += _export(path, _view_tag(index), read_only=True)
    if options.has_own_root:
        arguments += _export(modules_of(kernel).resolve(), "lab.modules", read_only=True)
    arguments += [word for setting in KICKED_DIRECTLY for word in ("-global", setting)]
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

    9p is forced because virtme-ng would first try the virtiofsd of Debian 12 for three seconds,
    which always fails.
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
    # virtme-ng links the modules of a kernel that is not installed into /lib/modules.
    arguments += ["--overlay-rwdir", "/lib", "--overlay-rwdir", "/etc"]
    # On a busy host, an emulated timer interrupt can come too late, and the kernel panics without
    # this option: "IO-APIC + timer doesn't work!" (check_timer in arch/x86/kernel/apic/io_apic.c).
    arguments += ["--kopt", "no_timer_check"]
    hastened = not use_kvm and not options.icount
    if hastened:
        arguments += [word for option in EMULATED for word in ("--kopt", option)]
    arguments += ["--show-boot-console", "--kopt", "loglevel=5", "--script-sh", first]
    machine_arguments = qemu_arguments(options, control, kernel)
    lighter = (*ONE_THREAD, *FEW_DEVICES, *PLAIN_CPU) if hastened else ()
    return [*arguments, "--qemu-opts", *lighter, *machine_arguments]
