"""The Debian package: of this version, built clean, and gone after a purge."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import tcpstuck_bpf
from lab.deb import build as deb
from lab.guests.trees import debian_mirror

DEBIAN = deb.PACKAGING / "debian"
LIMIT_S = 3600
"""Each fresh tree takes minutes where the machine has other work."""


def test_it_is_of_this_version() -> None:
    first = (DEBIAN / "changelog").read_text("utf-8").splitlines()[0]
    assert first.startswith(f"{deb.NAME} ({tcpstuck_bpf.__version__}) ")


def test_what_a_wheel_needs_the_package_needs() -> None:
    """dh_python3 takes the others from the wheel; that BCC is needed no wheel can say."""
    control = (DEBIAN / "control").read_text("utf-8")
    assert re.search(r"^Depends: python3-bpfcc, .*\$\{python3:Depends\}$", control, re.MULTILINE)


def test_its_build_dependencies_are_read() -> None:
    names = deb.build_dependencies()
    assert names[0] == "debhelper"
    assert {"pybuild-plugin-pyproject", "python3-setuptools"} <= set(names)


def test_every_override_has_its_reason() -> None:
    lines = (DEBIAN / f"{deb.NAME}.lintian-overrides").read_text("utf-8").splitlines()
    for before, line in zip(["", *lines], lines):
        if not line.startswith("#"):
            assert before.startswith("# "), line


def test_nobody_is_named_as_its_maintainer() -> None:
    """RFC 2606: nothing sent to example.org arrives at anybody's."""
    for name in ("control", "changelog"):
        addresses = re.findall(r"<([^>]+@[^>]+)>", (DEBIAN / name).read_text("utf-8"))
        assert {one.partition("@")[2] for one in addresses} == {"example.org"}


def test_its_description_fits_a_terminal() -> None:
    """lintian's limit of 80 characters (extended-description-line-too-long), without a tree."""
    lines = (DEBIAN / "control").read_text("utf-8").splitlines()
    description = [line for line in lines if line.startswith(" ")]
    assert [line for line in description if len(line) > 80] == []


def test_what_fails_in_a_tree_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "unshare": 'shift; exec "$@"',
        "mmdebstrap": "echo E: some package is broken >&2; exit 25",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(deb, "debian_mirror", lambda: "http://mirror.example/debian")
    with pytest.raises(deb.LabError, match="bookworm"):
        deb.in_fresh_tree("bookworm", ["hello"], tmp_path, "true", tmp_path / "log" / "build.log")
    assert "some package is broken" in capsys.readouterr().out


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("mmdebstrap") is None:
        pytest.fail("no mmdebstrap: make setup installs it")
    debian_mirror()
    return deb.build(tmp_path_factory.mktemp("deb"))


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
def test_it_is_built_and_lintian_has_no_complaint(package: Path) -> None:
    assert {"python3-bpfcc", "python3-pyelftools", "python3-tabulate", "python3"} <= set(
        deb.dependencies(package)
    )
    listed = subprocess.run(
        ["dpkg-deb", "--contents", str(package)], check=True, capture_output=True, text=True
    ).stdout
    for place in (
        "./usr/bin/tcpstuck-trace",
        "./usr/share/man/man8/tcpstuck-trace.8.gz",
        "./usr/share/bash-completion/completions/tcpstuck-trace",
        "./usr/share/zsh/vendor-completions/_tcpstuck-trace",
        "./etc/default/tcpstuck-trace",
        "/systemd/system/tcpstuck-trace.service",
    ):
        assert f"{place}\n" in listed


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("suite", deb.TRIED_IN)
def test_it_is_installed_used_and_purged(package: Path, suite: str, tmp_path: Path) -> None:
    deb.try_in(suite, package, tmp_path)
    log = (tmp_path / f"trial-{suite}.log").read_text("utf-8", "replace")
    assert "trial: installed, used, removed and purged" in log
