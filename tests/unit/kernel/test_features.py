"""What stands in the way is said as exactly as it can be known."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from tcpstuck_bpf.host import kallsyms
from tcpstuck_bpf.kernel import features
from tcpstuck_bpf.kernel.probes import WHY_PROBES

EPERM = "bpf: Failed to load program: Operation not permitted"


def without_kprobes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(features, "_KPROBE_PMU", tmp_path / "missing")


def with_kprobes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(features, "_KPROBE_PMU", tmp_path)


def locked(monkeypatch: pytest.MonkeyPatch, directory: Path, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "lockdown").write_text(text)
    monkeypatch.setattr(features, "_LOCKDOWN", directory / "lockdown")


def test_capabilities_are_named_by_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_effective_capabilities", lambda: 1 << 39 | 1 << 38)
    assert features.held_capabilities() == ["CAP_PERFMON", "CAP_BPF"]
    assert features.has_tracing_capabilities()
    monkeypatch.setattr(features, "_effective_capabilities", lambda: 1 << 39)
    assert not features.has_tracing_capabilities()


def test_the_lockdown_state_is_read_or_said_to_be_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    locked(monkeypatch, tmp_path / "security", "none [integrity] confidentiality\n")
    assert features.lockdown_text() == "lockdown is [integrity]"
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(features, "_LOCKDOWN", tmp_path / "empty" / "lockdown")
    assert "securityfs is not mounted" in features.lockdown_text()
    (tmp_path / "empty" / "lsm").write_text("capability")
    assert "no lockdown" in features.lockdown_text()


def test_both_obstacles_are_named_where_there_are_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_kprobes(monkeypatch, tmp_path)
    locked(monkeypatch, tmp_path / "security", "none integrity [confidentiality]\n")
    error = features.refusal(EPERM, "auto")
    assert "neither kprobes nor fentry" in error.what
    assert "no kprobe event type" in error.why
    assert "lockdown is [confidentiality]" in error.why


@pytest.mark.parametrize("wished", ["auto", "fentry", "kprobe"])
def test_eperm_with_kprobes_points_at_security(
    wished: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_kprobes(monkeypatch, tmp_path)
    error = features.refusal(EPERM, wished)
    assert "lockdown" in error.why
    assert "kprobe event type" not in error.why


@pytest.mark.parametrize("limit", [8 << 20, None])
def test_eperm_for_a_table_may_be_the_limit_of_locked_memory(
    limit: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_kprobes(monkeypatch, tmp_path)
    monkeypatch.setattr(features, "locked_memory_limits", lambda: (limit, limit))
    said = "could not open bpf map: awaiting_ack, error: Operation not permitted"
    error = features.refusal(said, "auto")
    assert "lockdown" in error.why
    assert (f"RLIMIT_MEMLOCK: it is {limit} bytes" in error.why) == (limit is not None)
    assert "RLIMIT_MEMLOCK" not in features.refusal(EPERM, "auto").why


def test_only_the_mode_that_was_asked_for_is_blamed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_kprobes(monkeypatch, tmp_path)
    assert "kprobe" not in features.refusal("bad program", "fentry").why
    assert "no kprobe event type" in features.refusal("not asked for", "kprobe").why


def test_a_kernel_option_is_read_packed_or_plain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = b"CONFIG_BPF=y\n# CONFIG_KPROBES is not set\n"
    for name, data in (("config.gz", gzip.compress(text)), ("config", text)):
        (tmp_path / name).write_bytes(data)
        monkeypatch.setattr(features, "_configurations", lambda n=name: [str(tmp_path / n)])
        assert features.kernel_option("CONFIG_BPF") == "y"
        assert features.kernel_option("CONFIG_KPROBES") == "n"
    monkeypatch.setattr(features, "_configurations", lambda: [str(tmp_path / "none")])
    assert features.kernel_option("CONFIG_BPF") is None


def test_suffixed_functions_are_found_beside_exact_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    symbols = tmp_path / "kallsyms"
    symbols.write_text(
        "ffff0001 T tcp_conn_request\n"
        "ffff0002 t tcp_check_req.isra.0\n"
        "ffff0003 D cookie_v4_check\n"
        "ffff0004 t my_cookie_v6_check\n"
        "ffff0005 t cookie_v6_check\t[module]\n"
    )
    monkeypatch.setattr(kallsyms, "_SYMBOLS", symbols)
    wanted = ("tcp_conn_request", "tcp_check_req", "cookie_v4_check", "cookie_v6_check")
    found = kallsyms.function_symbols(wanted)
    assert found == {"tcp_conn_request", "tcp_check_req.isra.0"}
    assert kallsyms.read_symbols(wanted, "cookie_v4_check")[1] == 0xFFFF0003


def test_the_tracepoint_is_found_where_no_data_is_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without CONFIG_KALLSYMS_ALL `D __tracepoint_kfree_skb` is missing."""
    symbols = tmp_path / "kallsyms"
    symbols.write_text("ffff0001 T __pfx___traceiter_kfree_skb\nffff0002 T __traceiter_kfree_skb\n")
    monkeypatch.setattr(kallsyms, "_SYMBOLS", symbols)
    (probe,) = WHY_PROBES
    assert kallsyms.function_symbols([probe.symbol]) == {probe.symbol}
    assert kallsyms.read_symbols([probe.symbol], "there_is_none")[0] == {probe.symbol}


@pytest.mark.parametrize(
    ("modules", "is_noted"),
    [
        ("nf_synproxy_core 20480 2 nft_synproxy,xt_SYNPROXY, Live 0x0\n", True),
        ("xt_tcpudp 20480 2 - Live 0x0\nnf_synproxy_core 1 0 - Live 0x0\n", True),
        ("my_nf_synproxy_core 1 0 - Live 0x0\nnf_synproxy_core2 1 0 - Live 0x0\n", False),
        ("", False),
        (None, False),
    ],
)
def test_a_loaded_synproxy_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modules: str | None, is_noted: bool
) -> None:
    path = tmp_path / "modules"
    if modules is not None:
        path.write_text(modules)
    monkeypatch.setattr(features, "_MODULES", path)
    assert ("SYNPROXY" in features.synproxy_note()) == is_noted


def test_limits_are_those_of_this_process() -> None:
    soft, hard = features.locked_memory_limits()
    for word, limit in zip(read_limits(), (soft, hard)):
        assert word == ("unlimited" if limit is None else str(limit))


def read_limits() -> list[str]:
    """The same by the kernel's own account (proc_pid_limits(5))."""
    lines = Path(f"/proc/{os.getpid()}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith("Max locked memory")).split()[3:5]
