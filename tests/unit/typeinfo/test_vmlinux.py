"""Kernels in files: what is read equals what the compiler says; what is no kernel is refused."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcpstuck_bpf.errors import CannotTraceError, TcpstuckError, UsageError
from tcpstuck_bpf.host import programs
from tcpstuck_bpf.kernel.layout import find_layout
from tcpstuck_bpf.typeinfo import unpacking, vmlinux
from tcpstuck_bpf.typeinfo.graph import MemberPlace
from tcpstuck_bpf.typeinfo.vmlinux import read_image, types_of_running_kernel
from tests import fake_kernel

FORMS = {
    "DWARF": ("-g",),
    "DWARF 4": ("-gdwarf-4",),
    "DWARF 2": ("-gdwarf-2", "-gstrict-dwarf"),
    "BTF": ("-gbtf",),
}
LOADER = b"MZ" + bytes(510) + b"\x1f\x8b\x08 BZh \x5d\0\0 \x28\xb5\x2f\xfd \xfd7zXZ\0 a loader"
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}
PROGRAMS = {"zstd": ("zstd", "-c"), "lz4": ("lz4", "-l", "-c"), "lzo": ("lzop", "-c")}


@pytest.fixture(scope="module", params=FORMS)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_kernel.build(tmp_path_factory.mktemp("kernel"), *FORMS[request.param])


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_kernel.build(tmp_path_factory.mktemp("kernel"), "-g")


def test_members_are_where_the_compiler_put_them(image: Path) -> None:
    types = read_image(str(image)).types
    lines = list(fake_kernel.what_the_compiler_says(image))
    assert len(lines) == len(fake_kernel.MEMBERS) + len(fake_kernel.BIT_FIELDS)
    for first, second, third, fourth in lines:
        if first != "bits":
            assert types.place(first, second) == MemberPlace(int(third), int(fourth), 0), second


def test_bit_fields_are_told_apart(image: Path) -> None:
    types = read_image(str(image)).types
    for first, name, bit, width in fake_kernel.what_the_compiler_says(image):
        if first == "bits":
            place = types.place("look_alike", name)
            assert place is not None
            assert (place.offset, place.bits) == (int(bit) // 8, int(width))


def parameters_of(declaration: str) -> int:
    """How many parameters are between the outer parentheses."""
    depth = commas = 0
    for character in declaration:
        depth += {"(": 1, ")": -1}.get(character, 0)
        commas += character == "," and depth == 1
    return commas + 1


def test_prototypes_are_as_they_were_written(image: Path) -> None:
    types = read_image(str(image)).types
    for name, written in fake_kernel.PROTOTYPES.items():
        prototype = types.prototype(name)
        assert prototype is not None
        assert prototype.text(name).replace("_Bool", "bool") == written
        assert types.parameter_count(name) == parameters_of(written)
    assert types.prototype("tcp_v4_rcv") is None
    assert types.parameter_count("tcp_v4_rcv") is None


def test_enumerators_and_a_layout_come_of_it(image: Path) -> None:
    types = read_image(str(image)).types
    assert types.enumerators("LINUX_MIB_") == fake_kernel.ENUMERATORS
    assert types.enumerators("SKB_DROP_REASON_") == fake_kernel.DROP_REASONS
    assert types.enumerators("NO_SUCH_") == {}
    assert find_layout(types, 1).has_counters
    assert types.place("look_alike", "no_such_member") is None
    assert types.place("no_such_struct", "first") is None


def test_without_an_address_table_the_source_file_names_lead_there(
    kernel: Path, tmp_path: Path
) -> None:
    if shutil.which("objcopy") is None:
        pytest.skip("no objcopy")
    stripped = tmp_path / "vmlinux"
    subprocess.run(
        ["objcopy", "--remove-section=.debug_aranges", str(kernel), str(stripped)],
        check=True,
        timeout=60,
    )
    assert read_image(str(stripped)).types.place("look_alike", "last") == read_image(
        str(kernel)
    ).types.place("look_alike", "last")


def test_release_and_functions_come_from_the_file(kernel: Path) -> None:
    image = read_image(str(kernel))
    assert image.release == fake_kernel.RELEASE
    assert image.symbols is not None
    assert image.symbols >= fake_kernel.PROTOTYPES.keys()


def packed(name: str, data: bytes) -> bytes:
    """A file like a vmlinuz: a loader with false hits, the stream, its unpacked size, and more."""
    if name in PACKERS:
        stream = PACKERS[name](data)
    else:
        if shutil.which(PROGRAMS[name][0]) is None:
            pytest.skip(f"no program {PROGRAMS[name][0]}")
        stream = subprocess.run(
            PROGRAMS[name], input=data, stdout=subprocess.PIPE, check=True, timeout=60
        ).stdout
    return LOADER + stream + struct.pack("<I", len(data)) + b"what follows"


def test_every_packing_has_a_case_and_the_lab_its_program() -> None:
    assert {one.name for one in unpacking._PACKINGS} == {*PACKERS, *PROGRAMS}
    installed = (Path(__file__).parents[3] / "lab" / "setup.sh").read_text().split()
    assert {words[0] for words in PROGRAMS.values()} <= set(installed)


@pytest.mark.parametrize("name", [*PACKERS, *PROGRAMS])
def test_a_compressed_kernel_is_unpacked(name: str, kernel: Path, tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(packed(name, kernel.read_bytes()))
    image = read_image(str(path))
    assert image.packing == name
    assert image.types.place("look_alike", "last") == read_image(str(kernel)).types.place(
        "look_alike", "last"
    )


def test_a_missing_program_is_named(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(packed("zstd", kernel.read_bytes()))
    monkeypatch.setattr(programs, "PLACES", (str(tmp_path),))
    with pytest.raises(CannotTraceError) as raised:
        read_image(str(path))
    assert "apt install zstd" in raised.value.remedy


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_image(str(path))
    return f"{raised.value.what}: {raised.value.why}"


@pytest.mark.parametrize("name", ["none", *PACKERS, *PROGRAMS])
@pytest.mark.parametrize("eighths", [1, 4, 7])
def test_a_kernel_that_was_cut_off_is_said_to_be(
    name: str, eighths: int, kernel: Path, tmp_path: Path
) -> None:
    whole = kernel.read_bytes() if name == "none" else packed(name, kernel.read_bytes())
    said = refusal(tmp_path / "vmlinuz", whole[: len(whole) * eighths // 8])
    assert "truncated" in said, said


def bomb(name: str, fill: int) -> bytes:
    """Few bytes that begin as a kernel does when they are unpacked, and go on for as many more."""
    head = b"\x7fELF" + bytes(60)
    if name in PROGRAMS:
        if shutil.which(PROGRAMS[name][0]) is None:
            pytest.skip(f"no program {PROGRAMS[name][0]}")
        command = f"(printf '\\177ELF'; head -c {fill} /dev/zero) | {' '.join(PROGRAMS[name])}"
        return subprocess.run(
            ["sh", "-c", command], stdout=subprocess.PIPE, check=True, timeout=300
        ).stdout
    makers = {
        "gzip": lambda: zlib.compressobj(9, wbits=31),
        "xz": lambda: lzma.LZMACompressor(preset=0),
        "bzip2": lambda: bz2.BZ2Compressor(9),
        "lzma": lambda: lzma.LZMACompressor(lzma.FORMAT_ALONE, preset=0),
    }
    packer = makers[name]()
    pieces = [packer.compress(head)]
    pieces += [packer.compress(bytes(1 << 20)) for _ in range(fill >> 20)]
    return b"".join([*pieces, packer.flush()])


@pytest.mark.parametrize("name", [*PACKERS, *PROGRAMS])
def test_what_unpacks_to_more_than_a_kernel_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "LARGEST_UNPACKED", 1 << 23)
    tracemalloc.start()
    try:
        packed_bomb = bomb(name, 1 << 26)
        tracemalloc.reset_peak()
        said = refusal(tmp_path / "vmlinuz", LOADER + packed_bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "unpacks to more than 8 MiB" in said
    assert peak < (1 << 25) + 4 * len(packed_bomb)


def test_what_takes_too_long_to_unpack_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "zstd"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o700)
    monkeypatch.setattr(programs, "PLACES", (str(tmp_path),))
    monkeypatch.setattr(unpacking, "UNPACKING_LIMIT_S", 0.05)
    said = refusal(tmp_path / "vmlinuz", b"\x28\xb5\x2f\xfd" + bytes(1 << 20))
    assert "longer than" in said


def test_thousands_of_beginnings_are_not_all_tried(tmp_path: Path) -> None:
    said = refusal(tmp_path / "vmlinuz", b"\x28\xb5\x2f\xfd" * 20_000)
    assert "places look like a compressed kernel" in said


def test_a_file_that_is_larger_than_any_kernel_is_not_searched(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    for begin, size in ((b"\x7fELF", 1 << 40), (b"MZ", 1 << 31)):
        with path.open("wb") as file:
            file.write(begin)
            file.truncate(size)
        with pytest.raises(UsageError, match="too large"):
            read_image(str(path))


def test_what_takes_more_memory_than_there_is_is_refused(
    kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(vmlinux, "_types", too_large)
    with pytest.raises(CannotTraceError) as raised:
        read_image(str(kernel))
    assert "not enough memory" in raised.value.why


@pytest.mark.parametrize("claim", ["nobits", "compressed", "zdebug"])
def test_a_section_that_claims_more_than_there_is_is_refused(
    claim: str, kernel: Path, tmp_path: Path
) -> None:
    """SHT_NOBITS takes no room in the file, and pyelftools makes zeros of it."""
    content = bytearray(kernel.read_bytes())
    with kernel.open("rb") as file:
        elf = ELFFile(file)
        number = elf.get_section_index(".debug_info")
        header = elf["e_shoff"] + number * elf["e_shentsize"]
        place = elf.get_section(number)["sh_offset"]
        names = elf.get_section(elf["e_shstrndx"])["sh_offset"]
        line = elf.get_section_by_name(".debug_line")["sh_name"]
    if claim == "nobits":
        struct.pack_into("<I", content, header + 4, 8)
        struct.pack_into("<Q", content, header + 32, 1 << 36)
    elif claim == "compressed":
        struct.pack_into("<Q", content, header + 8, 0x800)
        struct.pack_into("<IIQQ", content, place, 1, 0, 1 << 36, 1)
    else:
        content[names + line : names + line + 11] = b".zdebug_lin"
    path = tmp_path / "vmlinux"
    said = refusal(path, bytes(content))
    assert ("its type information claims" in said) == (claim != "zdebug")
    assert "damaged" in said


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (bytes(0x10008) + b"S390EP" + bytes(99), "s390x"),
        (bytes(0x24) + b"\x18\x28\x6f\x01" + bytes(99), "32-bit ARM"),
        (b"MZ" + bytes(58) + b"\x40\0\0\0PE\0\0\x64\x62" + bytes(99), "loongarch64"),
    ],
)
def test_an_image_of_an_architecture_that_cannot_be_read_is_named(
    content: bytes, name: str, tmp_path: Path
) -> None:
    """Debian's /boot/vmlinuz for s390x holds no ELF file."""
    said = refusal(tmp_path / "vmlinuz", content + gzip.compress(b"its own form"))
    assert f"is a kernel for {name}" in said
    assert "not a Linux kernel" not in said


def test_another_byte_order_is_named_and_not_called_damage(tmp_path: Path) -> None:
    order, number = (">", 2) if sys.byteorder == "little" else ("<", 1)
    identity = b"\x7fELF" + bytes((2, number, 1)) + bytes(9)
    s390 = 22
    header = struct.pack(f"{order}HHIQQQIHHHHHH", 2, s390, 1, 0, 0, 0, 0, 64, 0, 0, 64, 0, 0)
    banner = b"Linux version 9.8.7 (look@alike) (cc) #1\n"
    said = refusal(tmp_path / "vmlinux", identity + header + banner)
    assert "byte order" in said
    assert "for s390x" in said
    assert "damaged" not in said


def flat_image(magic: bytes, kernel: Path, *, cut: int | None = None) -> bytes:
    """A flat Image: a header, and what the linker laid out, type information among it."""
    with kernel.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".BTF")
        assert section is not None
        btf = section.data()
    banner = f"Linux version {fake_kernel.RELEASE} (look@alike) (cc) {fake_kernel.VERSION}\n"
    false_hit = btf[:8] + bytes(64)
    return bytes(56) + magic + bytes(68) + banner.encode() + false_hit + btf[:cut] + bytes(99)


@pytest.mark.parametrize("magic", [b"ARM\x64", b"RSC\x05"])
@pytest.mark.parametrize("name", ["none", *PACKERS, *PROGRAMS])
def test_a_flat_image_is_read_too(magic: bytes, name: str, tmp_path: Path) -> None:
    kernel = fake_kernel.build(tmp_path, *FORMS["BTF"])
    flat = flat_image(magic, kernel)
    path = tmp_path / "vmlinuz"
    path.write_bytes(flat if name == "none" else packed(name, flat))
    image, elf = read_image(str(path)), read_image(str(kernel))
    assert (image.packing, image.release, image.symbols) == (name, fake_kernel.RELEASE, None)
    for struct_name, member in fake_kernel.MEMBERS:
        assert image.types.place(struct_name, member) == elf.types.place(struct_name, member)
    for function in fake_kernel.PROTOTYPES:
        assert image.types.prototype(function) == elf.types.prototype(function)
    assert image.types.enumerators("LINUX_MIB_") == fake_kernel.ENUMERATORS


def test_a_flat_image_without_types_or_cut_off_is_said(tmp_path: Path) -> None:
    kernel = fake_kernel.build(tmp_path, *FORMS["BTF"])
    for cut, told in ((0, "does not describe"), (400, "does not describe")):
        path = tmp_path / "vmlinuz"
        path.write_bytes(flat_image(b"ARM\x64", kernel, cut=cut))
        with pytest.raises(CannotTraceError, match=told):
            read_image(str(path))


@pytest.mark.parametrize("content", [b"", b"text", LOADER, gzip.compress(b"text"), b"\x7fELF"])
def test_what_is_no_kernel_is_wrong_use(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        read_image(str(path))


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/no/such/file", "/bin/sh"])
def test_other_things_are_wrong_use(path: str) -> None:
    with pytest.raises(UsageError):
        read_image(path)


def test_a_file_that_cannot_be_mapped_is_read_all_the_same() -> None:
    """Files in /proc and /sys have a meaningless size, so the error is about their content."""
    with pytest.raises(UsageError) as raised:
        read_image("/proc/version")
    assert "neither an ELF file" in raised.value.why


def test_debug_information_packed_in_a_new_way_is_not_called_damaged(
    kernel: Path, tmp_path: Path
) -> None:
    """A compression that nobody knows stands for all that pyelftools does not."""
    content = bytearray(kernel.read_bytes())
    with kernel.open("rb") as file:
        elf = ELFFile(file)
        table, entry = elf["e_shoff"], elf["e_shentsize"]
        number = elf.get_section_index(".debug_info")
        start = elf.get_section(number)["sh_offset"]
    compressed, unknown = 0x800, 99
    struct.pack_into("<Q", content, table + number * entry + 8, compressed)
    struct.pack_into("<IIQQ", content, start, unknown, 0, 4096, 1)
    path = tmp_path / "vmlinux"
    path.write_bytes(content)
    with pytest.raises(CannotTraceError) as raised:
        read_image(str(path))
    assert "damaged" not in raised.value.what + raised.value.why
    assert "--decompress-debug-sections" in raised.value.remedy


def test_a_kernel_without_types_is_said(tmp_path: Path) -> None:
    with pytest.raises(CannotTraceError, match="does not describe"):
        read_image(str(fake_kernel.build(tmp_path, "-s")))


def ask_everything(path: Path) -> None:
    """Every question, on a file that may be damaged."""
    types = read_image(str(path)).types
    for name in fake_kernel.PROTOTYPES:
        types.prototype(name)
        types.parameter_count(name)
    for struct_name, member in fake_kernel.MEMBERS:
        types.place(struct_name, member)
    types.enumerators("LINUX_MIB_")


def places_of_meaning(path: Path) -> list[int]:
    """Where damage can matter: the file's own headers, its type information, its symbols."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        places = [*range(64), *range(elf["e_shoff"], path.stat().st_size)]
        for section in elf.iter_sections():
            if section.name.startswith((".BTF", ".debug", ".symtab", ".strtab")):
                start = section["sh_offset"]
                places += range(start, start + section["sh_size"])
    return places


@settings(
    derandomize=True,
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_damage_ends_in_a_typed_error(image: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(image.read_bytes())
    places = places_of_meaning(image)
    for _ in range(data.draw(st.integers(0, 20))):
        content[data.draw(st.sampled_from(places))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    path = tmp_path / "damaged"
    path.write_bytes(content[:cut])
    with contextlib.suppress(TcpstuckError):
        ask_everything(path)


def running(monkeypatch: pytest.MonkeyPatch, release: str, version: str) -> None:
    monkeypatch.setattr(
        vmlinux,
        "os",
        SimpleNamespace(uname=lambda: SimpleNamespace(release=release, version=version)),
    )


def test_only_the_running_kernel_s_own_file_is_believed(
    kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CannotTraceError, match="not the file of the running kernel") as raised:
        types_of_running_kernel(str(kernel))
    assert os.uname().release in raised.value.why
    running(monkeypatch, fake_kernel.RELEASE, fake_kernel.VERSION)
    assert types_of_running_kernel(str(kernel)).place("look_alike", "first") is not None
    running(monkeypatch, fake_kernel.RELEASE, "#2 SMP look-alike")
    with pytest.raises(CannotTraceError) as raised:
        types_of_running_kernel(str(kernel))
    assert "another build" in raised.value.why
