"""What is built for a kernel's file is what the kernel's own machine asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tcpstuck_bpf.errors import CannotTraceError, UsageError
from tcpstuck_bpf.kernel import artifact, builder
from tcpstuck_bpf.kernel.artifact import Artifact
from tcpstuck_bpf.kernel.artifact_store import BuiltPrograms
from tcpstuck_bpf.kernel.attach_plan import AttachRequest, attach
from tcpstuck_bpf.kernel.compilation import Compilation
from tcpstuck_bpf.kernel.description import KernelDescription
from tcpstuck_bpf.kernel.layout import find_layout
from tcpstuck_bpf.kernel.probes import Probe
from tcpstuck_bpf.kernel.softirqs import softirq_gaps
from tcpstuck_bpf.model import CoverageGap
from tcpstuck_bpf.typeinfo.vmlinux import KernelImage
from tests.btf_writer import RT_INTERLEAVED, Types, kernel, with_functions, with_members

RELEASE = "6.1.0-99-test"
OWN = os.uname().machine
BOTH = AttachRequest(), AttachRequest(rescue=True, why=False)


@pytest.fixture
def build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Types, AttachRequest, str], list[str]]:
    """Build for a kernel of these types, with a compiler that only notes what it is given."""

    def compiled(wanted: Compilation) -> bytes:
        who = (wanted.identity(), wanted.made_for, "none", wanted.mode, wanted.architecture)
        return artifact.encode(Artifact(*who, programs=(), maps=()))

    def run(types: Types, request: AttachRequest, architecture: str = OWN) -> list[str]:
        image = KernelImage("vmlinuz", "none", RELEASE, (), types.btf(), None, architecture)
        monkeypatch.setattr(builder, "read_image", lambda _path: image)
        return list(builder.build(tmp_path / "built", ["vmlinuz"], request))

    monkeypatch.setattr(builder, "compile_in_child", compiled)
    monkeypatch.setattr(builder.features, "require_privileges", lambda: None)
    return run


def asked_for(types: Types, request: AttachRequest, mode: str, option: str | None) -> Compilation:
    """What the machine that runs this kernel would have compiled."""
    btf = types.btf()
    layout = find_layout(btf, 0xFFFF_FFFF_8200_0000)
    running = KernelDescription(RELEASE, btf, layout, softirq_gaps(btf, option))
    found: list[tuple[Probe, ...]] = []

    def start(wanted: tuple[Probe, ...]) -> str:
        found.append(wanted)
        return mode

    there: Iterable[str] = {probe.symbol for probe in request.probes}
    gaps: tuple[CoverageGap, ...] = running.softirq_gaps
    left_out = {} if layout.drop_obstacle is None else {"kfree_skb": layout.drop_obstacle}
    request = AttachRequest(btf, rescue=request.rescue, why=request.why, left_out=left_out)
    attach(frozenset(there), request, layout.has_counters, start, gaps)
    return running.compilation(found[-1], mode)


@pytest.mark.parametrize("request_", BOTH, ids=["plain", "rescue"])
@pytest.mark.parametrize("mode", builder.MODES)
@pytest.mark.parametrize("members", [(), RT_INTERLEAVED], ids=["usual", "RT"])
@pytest.mark.parametrize("option", [None, "y", "n"])
def test_what_was_built_fits(
    build: Callable[..., list[str]],
    tmp_path: Path,
    request_: AttachRequest,
    mode: str,
    members: tuple[str, ...],
    option: str | None,
) -> None:
    types = with_members(with_functions(kernel()), *members)
    lines = build(types, request_)
    assert len(lines) == len(list((tmp_path / "built").iterdir()))
    wanted = asked_for(types, request_, mode, option)
    assert BuiltPrograms(tmp_path / "built").find(wanted).identity == wanted.identity()


def test_the_files_are_root_s_to_write_and_everybody_s_to_read(
    build: Callable[..., list[str]], tmp_path: Path
) -> None:
    build(with_functions(kernel()), AttachRequest())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "built").iterdir()}
    assert modes == {0o644}


def test_a_mode_that_the_kernel_cannot_do_is_said(build: Callable[..., list[str]]) -> None:
    """An extra parameter prevents fentry, but not kprobes."""
    types = with_functions(
        kernel(), {"tcp_rcv_state_process": ("struct sock", "struct sk_buff", "int")}
    )
    lines = build(types, AttachRequest())
    assert any("no fentry programs" in line and "3 parameters" in line for line in lines)
    assert any("-kprobe.programs" in line for line in lines)


def test_nothing_is_built_for_what_cannot_be_traced_or_compiled(
    build: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(CannotTraceError, match="tcp_conn_request"):
        build(kernel(), AttachRequest())
    with pytest.raises(CannotTraceError, match="nothing can be built") as raised:
        build(with_functions(kernel()), AttachRequest(), "riscv64")
    assert "riscv64" in raised.value.why
    assert list((tmp_path / "built").iterdir()) == []


def test_another_architecture_is_compiled_for(
    build: Callable[..., list[str]], tmp_path: Path
) -> None:
    foreign = {"x86_64": "aarch64"}.get(OWN, "x86_64")
    build(with_functions(kernel()), AttachRequest(), foreign)
    found = [artifact.decode(path.read_bytes()) for path in (tmp_path / "built").iterdir()]
    assert {one.architecture for one in found} == {foreign}


def test_a_place_that_cannot_be_written_is_a_user_s_mistake(
    build: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "built").touch()
    with pytest.raises(UsageError, match="cannot make the directory"):
        build(with_functions(kernel()), AttachRequest())
