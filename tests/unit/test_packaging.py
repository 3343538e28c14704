"""What a wheel carries, compared with the tree it is made from."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tcpstuck_bpf
from lab.pages.build import BASH, MANUAL, ZSH, write_pages
from tcpstuck_bpf.output.explain import explanation

REPOSITORY = Path(__file__).resolve().parents[2]
MEASURED = ("bpf", "docs", "tcpstuck_bpf")
BESIDE_THE_MODULES = ("bpf", "docs")
"""Directories at the top of the tree that are within the package in a wheel."""


def tree_files(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of a copy of the tree, because building writes into the tree it builds from."""
    source = tmp_path_factory.mktemp("source")
    named = ["setup.cfg", "pyproject.toml", "LICENSE", "lab", *MEASURED]
    named += ["README.md"] if (REPOSITORY / "README.md").exists() else []
    subprocess.run(["cp", "-r", *named, str(source)], cwd=REPOSITORY, check=True)
    target = tmp_path_factory.mktemp("wheel")
    # Without isolation, so that no index is asked: the development extras bring the builder.
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    subprocess.run(
        [*build, "--no-index", "--wheel-dir", str(target), str(source)],
        check=True,
        capture_output=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_has_every_file_of_the_bpf_tree_byte_for_byte(wheel: zipfile.ZipFile) -> None:
    expected = tree_files(REPOSITORY / "bpf")
    prefix = "tcpstuck_bpf/bpf/"
    carried = {name[len(prefix) :] for name in wheel.namelist() if name.startswith(prefix)}
    assert carried == expected
    assert any(name.startswith("stub/include/uapi/") for name in expected)
    for name in expected:
        assert wheel.read(prefix + name) == (REPOSITORY / "bpf" / name).read_bytes()


def test_a_verdict_is_explained_from_the_wheel_alone(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    shown = subprocess.run(
        [sys.executable, "-m", "tcpstuck_bpf", "--explain", "ack-missing"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert shown.stdout.splitlines() == list(explanation("ack-missing", 80))
    carried = {name for name in wheel.namelist() if name.startswith("tcpstuck_bpf/docs/")}
    assert carried == {"tcpstuck_bpf/docs/verdicts.md"}


def test_wheel_has_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = tree_files(REPOSITORY / "tcpstuck_bpf")
    carried = {
        name.partition("/")[2]
        for name in wheel.namelist()
        if name.startswith("tcpstuck_bpf/") and name.split("/")[1] not in BESIDE_THE_MODULES
    }
    assert carried == expected
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"tcpstuck_bpf", *(top for top in tops if top.endswith((".dist-info", ".data")))}


def test_wheel_has_the_pages_where_their_readers_look(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    carried = {
        name.partition(".data/data/")[2]: wheel.read(name).decode()
        for name in wheel.namelist()
        if ".data/data/" in name
    }
    written = {path.name: path.read_text() for path in write_pages(tmp_path)}
    assert {
        name: without_date(carried[f"share/{place}/{name}"])
        for name, place in {
            MANUAL: "man/man8",
            BASH: "bash-completion/completions",
            ZSH: "zsh/site-functions",
        }.items()
    } == {name: without_date(text) for name, text in written.items()}
    assert len(carried) == len(written)


def without_date(text: str) -> str:
    return re.sub(r"^(\.TH \S+ \S+) \S+", r"\1", text)


def test_wheel_says_what_setup_cfg_says(wheel: zipfile.ZipFile) -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    (info,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {tcpstuck_bpf.__version__}\n" in metadata
    needed = set(config["options"]["install_requires"].split())
    always = {
        line.split(":", 1)[1].strip()
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    }
    assert always == needed
    assert "tcpstuck_bpf.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert any(re.fullmatch(rf"{re.escape(info)}/(licenses/)?LICENSE", n) for n in wheel.namelist())


def test_bpf_text_and_licence_agree_on_the_licence() -> None:
    """The kernel lends its GPL-only helpers only to programs that say they are GPL."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    identifier = f"SPDX-License-Identifier: {config['metadata']['license']}"
    for path in (REPOSITORY / "bpf").glob("*.[ch]"):
        assert identifier in path.read_text().splitlines()[0], path
    text = (REPOSITORY / "LICENSE").read_text()
    assert "GNU GENERAL PUBLIC LICENSE" in text
    assert "Version 2, June 1991" in text
