"""Reads a kernel image: an ELF vmlinux, a flat Image, or a compressed /boot/vmlinuz that holds one.

The image yields the kernel's types (its .BTF section, else DWARF), its release, and the names of
its functions if it has a symbol table. The kernel need not run.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import re
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from tcpstuck_bpf.errors import CannotTraceError, TcpstuckError, UsageError
from tcpstuck_bpf.typeinfo.btf import Btf
from tcpstuck_bpf.typeinfo.dwarf import Dwarf, has_dwarf
from tcpstuck_bpf.typeinfo.graph import KernelTypes
from tcpstuck_bpf.typeinfo.unpacking import Data, Recognizer, find_packed

ELF_MAGIC = b"\x7fELF"
FLAT_MAGIC_PLACE = 56
FLAT_MAGICS = {b"ARM\x64": "aarch64", b"RSC\x05": "riscv64"}
"""uname(2)'s architecture by the magic number of a flat Image
(Documentation/arch/arm64/booting.rst, arch/riscv/boot-image-header.rst)."""
HEAD_BYTES = FLAT_MAGIC_PLACE + 4
_ELF_MACHINE = struct.Struct("<18xH")
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
"""e_machine of elf.h."""
_OTHER_MACHINES = {
    "EM_S390": "s390x",
    "EM_PPC64": "ppc64",
    "EM_PPC": "ppc",
    "EM_MIPS": "mips",
    "EM_SPARCV9": "sparc64",
    "EM_PARISC": "parisc",
    "EM_386": "i386",
    "EM_ARM": "32-bit ARM",
    "EM_68K": "m68k",
}
"""Common names of 32-bit and big-endian machines, by pyelftools' names."""
BTF_HEADER = struct.pack("=HBBI", 0xEB9F, 1, 0, 24)
BTF_HEADER_BYTES = 24
LARGEST_FILE = 1 << 32
"""Bytes. A vmlinux with all its debug information has up to a gigabyte."""
LARGEST_PACKED = 1 << 28
"""Bytes. A distribution's compressed kernel has 10 to 60 MB."""
MOST_GROWTH = 64
"""Largest allowed growth factor of compressed debug information; a tenth of it is usual."""
LARGEST_UNMAPPED = 1 << 26
"""Bytes."""
_FOREIGN_IMAGES = (
    (0x10008, b"S390EP", "s390x"),
    (0x24, b"\x18\x28\x6f\x01", "32-bit ARM"),
)
"""File offset, magic bytes and architecture of each image: EP_STRING of
arch/s390/include/asm/setup.h, and the magic number of an ARM zImage (arch/arm/boot/compressed)."""
_PE_HEADER_AT = 0x3C
_FOREIGN_PE = {b"\x64\x62": "loongarch64", b"\x32\x62": "loongarch32", b"\xc2\x01": "32-bit ARM"}
"""IMAGE_FILE_MACHINE_* of include/linux/pe.h, in images that EFI firmware starts."""

# linux_banner of init/version.c; /proc/version shows the same text.
_BANNER = re.compile(rb"Linux version ([!-~]{1,64}) \([ -~]{1,1024}")


@dataclass(frozen=True)
class KernelImage:
    """What an image says about its kernel."""

    path: str
    packing: str
    """Name of the compression; `none` for an ELF file or a flat Image."""
    release: str
    """Release, as in uname(2)."""
    banners: tuple[str, ...]
    """All `Linux version ...` texts; the first of two link passes may leave one of its own."""
    types: KernelTypes
    symbols: frozenset[str] | None
    """Names of the kernel's functions; None if the image has no symbol table."""
    architecture: str
    """Architecture, as in uname(2); empty if unknown to the tool."""


def read_image(path: str) -> KernelImage:
    """Read a kernel from a file.

    Raises UsageError where the file is not a kernel, and CannotTraceError where the kernel cannot
    be read here: no program to unpack it, or no type information.
    """
    try:
        return _read_image(path)
    except MemoryError as error:
        raise CannotTraceError(
            f"{path} cannot be read",
            "there is not enough memory",
            "read it on a larger machine, or name the vmlinuz in place of the vmlinux",
        ) from error


def _read_image(path: str) -> KernelImage:
    data = _read(path)
    packing = "none"
    if not _is_kernel(data[:HEAD_BYTES]):
        packing, data = _unpacked(path, data)
    types, symbols = _flat(data, path) if _is_flat(data[:HEAD_BYTES]) else _elf(data, path)
    banners = list(_BANNER.finditer(data))
    release = banners[0][1].decode("ascii")
    texts = tuple(banner[0].decode("ascii") for banner in banners)
    machine = _architecture(data[:HEAD_BYTES])
    return KernelImage(path, packing, release, texts, types, symbols, machine)


def _architecture(head: bytes) -> str:
    if _is_flat(head):
        return FLAT_MAGICS[head[FLAT_MAGIC_PLACE:HEAD_BYTES]]
    return _ELF_MACHINES.get(_ELF_MACHINE.unpack_from(head)[0], "")


def _is_flat(head: bytes) -> bool:
    return head[FLAT_MAGIC_PLACE:HEAD_BYTES] in FLAT_MAGICS


def _is_kernel(head: bytes) -> bool:
    return head.startswith(ELF_MAGIC) or _is_flat(head)


def _require_banner(data: Data, path: str) -> None:
    if _BANNER.search(data) is None:
        raise UsageError(
            f"{path} is not a Linux kernel",
            "it has no text `Linux version ...`; a file with debug information alone has none "
            "either",
            "name a vmlinux, or a /boot/vmlinuz-...",
        )


def _elf(data: Data, path: str) -> tuple[KernelTypes, frozenset[str] | None]:
    try:
        elf = ELFFile(io.BytesIO(data) if isinstance(data, bytes) else data)
        # This check comes first, because anything may be missing from a truncated file. The
        # section table is the last part of an ELF file.
        needed = elf["e_shoff"] + elf["e_shnum"] * elf["e_shentsize"]
        if len(data) < needed:
            raise _damaged(path, f"it ends after {len(data)} of {needed} bytes")
        _require_banner(data, path)
        _require_bounded(elf, len(data), path)
        return _types(elf, path), _functions(elf)
    except (TcpstuckError, MemoryError):
        raise
    except Exception as error:  # pyelftools raises whatever it meets in a damaged file
        raise _damaged(path, f"{type(error).__name__} {error}") from error


def _require_bounded(elf: ELFFile, size: int, path: str) -> None:
    """Raises UsageError where sections claim far more bytes than the file has.

    pyelftools would believe them.
    """
    claimed = 0
    for section in elf.iter_sections():
        if section.name.startswith(".zdebug"):
            raise _damaged(path, f"{section.name}: no kernel compresses its debug information so")
        if section.name.startswith((".BTF", ".debug")) and (
            section.compressed or section["sh_type"] == "SHT_NOBITS"
        ):
            claimed += section.data_size
    if claimed > MOST_GROWTH * size:
        raise _damaged(path, f"its type information claims {claimed} bytes, the file has {size}")


def _flat(data: Data, path: str) -> tuple[KernelTypes, None]:
    """The types in an Image. It has no sections, so the first readable BTF header counts."""
    _require_banner(data, path)
    place = data.find(BTF_HEADER)
    while place != -1:
        length = Btf.length(data[place : place + BTF_HEADER_BYTES])
        try:
            return Btf(data[place : place + length], path), None
        except CannotTraceError:
            place = data.find(BTF_HEADER, place + 1)
    raise CannotTraceError(
        f"{path} does not describe the kernel's types",
        "it holds no whole BTF (CONFIG_DEBUG_INFO_BTF); only an ELF file could hold DWARF",
        "name the vmlinux of the kernel's debug package",
    )


def types_of_running_kernel(path: str) -> KernelTypes:
    """The types in the running kernel's own file.

    Raises what read_image raises, and CannotTraceError where the file is another kernel's:
    even another build of the same release may have other member offsets.
    """
    image, running = read_image(path), os.uname()
    if image.release != running.release:
        difference = f"it is Linux {image.release}, the running kernel is {running.release}"
    elif not any(banner.endswith(running.version) for banner in image.banners):
        difference = f"it is another build of {running.release}, not `{running.version}`"
    else:
        return image.types
    raise CannotTraceError(
        f"{path} is not the file of the running kernel",
        difference,
        f"name /boot/vmlinuz-{running.release}, or the vmlinux of its debug package",
    )


def _read(path: str) -> Data:
    try:
        state = Path(path).stat()
        if not stat.S_ISREG(state.st_mode):
            raise UsageError(
                f"{path} is not a kernel", "it is not a regular file", "name a vmlinux or vmlinuz"
            )
        if state.st_size > LARGEST_FILE:
            raise _too_large(path, LARGEST_FILE, "a kernel")
        with Path(path).open("rb") as file:
            # Mapped, not read: a vmlinux with debug information has up to a gigabyte.
            with contextlib.suppress(OSError, ValueError):
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Files in /proc and /sys cannot be mapped; /proc/kcore has no end.
            data = file.read(LARGEST_UNMAPPED)
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    if not data:
        raise _unreadable(path, "it is empty")
    return data


def _too_large(path: str, limit: int, what: str) -> UsageError:
    return UsageError(
        f"{path} is too large for {what}",
        f"it has more than {limit >> 20} MiB",
        "name a vmlinux, or a /boot/vmlinuz-...",
    )


def _unreadable(path: str, why: str | None) -> UsageError:
    remedy = "name a vmlinux or vmlinuz that you may read"
    return UsageError(f"cannot read {path}", why or "no reason given", remedy)


def _damaged(path: str, why: str) -> UsageError:
    return UsageError(
        f"{path} is not a readable kernel", f"damaged or truncated: {why}", "name another file"
    )


def _unpacked(path: str, data: Data) -> tuple[str, bytes]:
    """Name of a compressed image's compression, and the kernel in it."""
    foreign = _foreign(data)
    if foreign is not None:
        raise UsageError(
            f"{path} is a kernel for {foreign}",
            "the tool cannot unpack this image format, and does not support that architecture",
            "name another kernel; to see this one's types, name the vmlinux of its debug package "
            "(if it has this machine's byte order)",
        )
    if len(data) > LARGEST_PACKED:
        raise _too_large(path, LARGEST_PACKED, "a compressed kernel")
    found = find_packed(path, data, Recognizer(_is_kernel, HEAD_BYTES))
    if found is not None:
        return found
    raise UsageError(
        f"{path} is not a Linux kernel",
        "it is neither an ELF file nor a flat Image, and holds no compressed one that can be "
        "unpacked; a kernel truncated early looks the same",
        "name a vmlinux, or a /boot/vmlinuz-...",
    )


def _foreign(data: Data) -> str | None:
    """The architecture of an image that cannot be read, by its header; None for other files."""
    for place, magic, name in _FOREIGN_IMAGES:
        if data[place : place + len(magic)] == magic:
            return name
    if data[:2] == b"MZ" and len(data) >= _PE_HEADER_AT + 4:
        (header,) = struct.unpack_from("<I", data, _PE_HEADER_AT)
        if data[header : header + 4] == b"PE\0\0":
            return _FOREIGN_PE.get(bytes(data[header + 4 : header + 6]))
    return None


def _types(elf: ELFFile, path: str) -> KernelTypes:
    if elf.elfclass != 64:
        raise UsageError(
            f"{path} is not a kernel that can be traced",
            f"it is a {elf.elfclass}-bit kernel{_for_machine(elf)}",
            "name the file of a 64-bit kernel",
        )
    if elf.little_endian != (sys.byteorder == "little"):
        raise UsageError(
            f"{path} has another byte order than this machine",
            f"it is a kernel{_for_machine(elf)}; its type information can only be read on a "
            "machine of the same byte order",
            "examine it on such a machine",
        )
    section = elf.get_section_by_name(".BTF")
    if section is not None:
        try:
            return Btf(section.data(), path)
        except CannotTraceError as error:
            raise _damaged(path, f".BTF: {error.why}") from error
    if has_dwarf(elf):
        return Dwarf(elf, path)
    raise CannotTraceError(
        f"{path} does not describe the kernel's types",
        "it has neither a .BTF section (CONFIG_DEBUG_INFO_BTF) nor DWARF (.debug_info)",
        "name the vmlinux of the kernel's debug package",
    )


def _for_machine(elf: ELFFile) -> str:
    machine = elf["e_machine"]
    name = _OTHER_MACHINES.get(machine, _ELF_MACHINES.get(machine))
    return f", for {name}" if name else ""


def _functions(elf: ELFFile) -> frozenset[str] | None:
    table = elf.get_section_by_name(".symtab")
    if not isinstance(table, SymbolTableSection):
        return None
    return frozenset(
        symbol.name for symbol in table.iter_symbols() if symbol["st_info"]["type"] == "STT_FUNC"
    )
