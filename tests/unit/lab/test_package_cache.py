"""Where a guest's kernel comes from, without asking a package archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.guests import packages, run

RECORD = (
    "Package: linux-image-amd64\n"
    "Version: 9.8.7-6\n"
    "Depends: linux-base (>= 4), linux-image-9.8.7-abi (= 9.8.7-6)\n"
    "Description: Linux for 64-bit PCs\n"
    " Depends: linux-image-of-the-description\n"
    "\n"
    "Package: linux-image-amd64\n"
    "Version: 1.0-1\n"
)


def test_metapackage_leads_to_the_image_of_its_first_record() -> None:
    assert packages.kernel_dependency(RECORD) == "linux-image-9.8.7-abi"
    assert packages.parse_record(RECORD)["Version"] == "9.8.7-6"


def test_a_record_without_an_image_leads_nowhere() -> None:
    assert packages.kernel_dependency("Package: x\nDepends: linux-base\n") is None
    assert packages.kernel_dependency("") is None


@pytest.mark.parametrize("base", ["", "relative/path"])
def test_an_xdg_directory_that_is_not_absolute_counts_as_unset(base: str) -> None:
    unset = packages.cache_directory({})
    assert packages.cache_directory({"XDG_CACHE_HOME": base}) == unset


def test_an_empty_cache_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for look, remedy in (
        (packages.cached_kernel, "make setup"),
        (packages.cached_busybox, "make setup"),
        (packages.cached_prometheus, "lab fetch --prometheus"),
    ):
        with pytest.raises(packages.CacheError) as missing:
            look()
        assert remedy in missing.value.remedy
        assert missing.value.exit_status == run.HARNESS_STATUS


def test_link_moves_only_to_what_is_unpacked_and_the_old_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted: list[str] = []

    def unpack(_apt: packages.Apt, wanted_ones: list[packages.Package], target: Path) -> None:
        (package,) = wanted_ones
        wanted.append(package.version)
        if package.version == "3":
            raise packages.CacheError("x", "y", "z")
        (target / "boot").mkdir(parents=True)
        (target / "boot" / f"vmlinuz-{package.version}").touch()

    monkeypatch.setattr(packages.Apt, "download_and_unpack", unpack)
    for version, fresh in (("1", True), ("1", False), ("2", True)):
        assert packages.fetch([packages.Package("image", version)], "kernel") is fresh
    with pytest.raises(packages.CacheError):
        packages.fetch([packages.Package("image", "3")], "kernel")
    assert wanted == ["1", "2", "3"]
    assert packages.cached_kernel().name == "vmlinuz-2"
    unpacked = packages.cache_directory() / "packages"
    assert [path.name for path in unpacked.iterdir()] == ["image_2"]


def test_a_directory_that_another_link_names_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        packages.Apt, "download_and_unpack", lambda _apt, _packages, target: target.mkdir()
    )
    for link, version in (("kernel", "1"), ("kernel-suite", "1"), ("kernel", "2")):
        packages.fetch([packages.Package("image", version)], link)
    unpacked = packages.cache_directory() / "packages"
    assert sorted(path.name for path in unpacked.iterdir()) == ["image_1", "image_2"]
    packages.fetch([packages.Package("image", "2")], "kernel-suite")
    assert [path.name for path in unpacked.iterdir()] == ["image_2"]


@pytest.mark.parametrize(
    ("complaints", "told"),
    [
        (["W: odd", "E: the cause", "E: what came of it"], "E: the cause"),
        (["first", "the last word"], "the last word"),
        ([], "status 3"),
    ],
)
def test_the_error_line_of_a_tool_is_the_cause(complaints: list[str], told: str) -> None:
    said = "".join(f"echo '{line}' >&2; " for line in complaints)
    with pytest.raises(packages.CacheError) as failed:
        packages.run_tool(["/bin/sh", "-c", f"{said}exit 3"])
    assert failed.value.why == told
