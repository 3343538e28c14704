"""What a tree or a kernel is made of, without asking an archive or making one."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import pytest

from lab.guests import trees
from lab.guests.packages import (
    Apt,
    CacheError,
    Package,
    cached_kernel,
    give_one_layout,
    kernel_parts,
)

MIRROR = "http://archive.invalid/debian"
SPLIT_IMAGE = (
    "Package: linux-image-9.8+deb14-amd64\n"
    "Depends: dracut | initramfs-tools (>= 0.120), linux-base-9.8+deb14-amd64 (= 1), "
    "linux-binary-9.8+deb14-amd64 (= 1), linux-modules-9.8+deb14-amd64 (= 1), kmod\n"
)


class TestKernelPackages:
    def test_an_image_leads_to_every_package_of_its_release_and_no_other(self) -> None:
        assert kernel_parts("linux-image-9.8+deb14-amd64", SPLIT_IMAGE) == [
            "linux-base-9.8+deb14-amd64",
            "linux-binary-9.8+deb14-amd64",
            "linux-modules-9.8+deb14-amd64",
        ]

    def test_an_image_that_holds_everything_leads_nowhere(self) -> None:
        record = "Depends: kmod, linux-base (>= 4.3~), initramfs-tools | linux-initramfs-tool\n"
        assert kernel_parts("linux-image-9.8-amd64", record) == []

    def test_an_image_beside_its_modules_is_found_where_older_packages_have_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        tree = tmp_path / "tcpstuck-trace" / "guest" / "kernel-x"
        modules = tree / "usr" / "lib" / "modules" / "9.8"
        modules.mkdir(parents=True)
        (modules / "vmlinuz").write_text("image")
        give_one_layout(tree)
        image = cached_kernel("kernel-x")
        assert image.name == "vmlinuz-9.8"
        assert image.read_text() == "image"
        assert (image.parent.parent / "lib" / "modules" / "9.8").samefile(modules)

    def test_an_older_layout_is_left_as_it_is(self, tmp_path: Path) -> None:
        for place in ("lib/modules/9.8", "usr/lib/linux-image-9.8", "bin"):
            (tmp_path / place).mkdir(parents=True)
        before = sorted(tmp_path.rglob("*"))
        give_one_layout(tmp_path)
        assert sorted(tmp_path.rglob("*")) == before


class TestRows:
    def test_a_backported_kernel_runs_over_the_tree_it_is_backported_to(self) -> None:
        backported = [row for row in trees.ROWS if row.suite != row.tree_suite]
        assert {row.tree_suite for row in backported} < {row.suite for row in trees.ROWS}
        assert all(row.suite.startswith(row.tree_suite) for row in backported)

    def test_every_row_can_be_named_and_nothing_else(self) -> None:
        assert [trees.row_named(row.suite) for row in trees.ROWS] == list(trees.ROWS)
        with pytest.raises(argparse.ArgumentTypeError, match="potato"):
            trees.row_named("potato")


class TestNames:
    PACKAGES = (Package("a", "1"), Package("b", "2"))

    def test_a_tree_is_the_same_in_whatever_order_its_packages_are_named(self) -> None:
        there, back = self.PACKAGES, self.PACKAGES[::-1]
        assert trees.tree_name("x", there) == trees.tree_name("x", back)

    @pytest.mark.parametrize(
        "packages",
        [
            (Package("a", "1"), Package("b", "2.1")),
            (Package("a", "1"),),
            (Package("a", "1"), Package("c", "2")),
        ],
    )
    def test_a_tree_is_stale_with_any_package_or_version_changed(
        self, packages: tuple[Package, ...]
    ) -> None:
        assert trees.tree_name("x", packages) != trees.tree_name("x", self.PACKAGES)

    def test_a_tree_is_stale_with_the_recipe_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = trees.tree_name("x", self.PACKAGES)
        monkeypatch.setattr(trees, "RECIPE", (*trees.RECIPE, "--one-more"))
        assert trees.tree_name("x", self.PACKAGES) != before

    @pytest.mark.parametrize(
        ("known", "newest"),
        [
            ({"core-10.5", "core"}, "core"),
            ({"core-9.11", "core-10.5", "core-10.11", "core-doc", "score"}, "core-10.11"),
            ({"core-doc", "score-1"}, None),
        ],
    )
    def test_the_name_without_a_version_wins_or_else_the_highest(
        self, known: set[str], newest: str | None
    ) -> None:
        assert trees.newest_of("core", known) == newest


class TestApt:
    def test_a_tree_gets_what_its_suite_has_under_the_name_it_has_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        optional = trees.PACKAGES_OF_SOME_SUITES
        names = [*trees.PACKAGES, *(f"{name}-10.5" for name in trees.VERSIONED_PACKAGES)]

        def tell(_apt: Apt, *words: str) -> str:
            if words[1] == "pkgnames":
                return "\n".join(names)
            asked = words[words.index("--no-all-versions") + 1 :]
            return "\n\n".join(f"Package: {name}\nVersion: 1\n" for name in asked)

        monkeypatch.setattr(Apt, "run", tell)
        assert [one.name for one in trees.tree_packages(Apt())] == names
        names += optional
        assert [one.name for one in trees.tree_packages(Apt())] == names

    def test_another_suite_sees_nothing_of_this_machines_sources_and_packages(
        self, tmp_path: Path
    ) -> None:
        """By apt itself, if it is here."""
        (tmp_path / "sources.list").write_text(trees.source_line(MIRROR, "potato") + "\n")
        settings = tmp_path / "apt.conf"
        settings.write_text(trees.configuration(tmp_path))
        wanted = subprocess.run(
            ["apt-get", "update", "--print-uris"],
            env={**os.environ, "APT_CONFIG": str(settings)},
            capture_output=True,
            text=True,
            check=True,
        )
        addresses = [line.split()[0].strip("'") for line in wanted.stdout.splitlines()]
        assert addresses
        assert all(one.startswith(f"{MIRROR}/dists/potato/") for one in addresses)
        assert wanted.stderr == ""
        policy = Apt(settings).run("apt-cache", "policy")
        assert "dpkg/status" not in policy

    def test_no_debian_archive_is_told_with_a_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Apt, "run", lambda *_words, **_named: "")
        with pytest.raises(CacheError, match="no Debian archive"):
            trees.debian_mirror()


class TestTree:
    MIRROR_APT = Apt()

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "tcpstuck-trace" / "guest" / "trees"

    @staticmethod
    def made(tree: Path, status: str, *places: str) -> None:
        (tree / "var" / "lib" / "dpkg").mkdir(parents=True)
        (tree / "var" / "lib" / "dpkg" / "status").write_text(status)
        for place in places:
            (tree / place).mkdir(parents=True)

    @pytest.mark.parametrize(
        ("status", "places"),
        [
            ("Package: linux-headers-amd64\n", ()),
            ("Package: linux-headers-9.8-common\n", ()),
            ("Package: linux-libc-dev\n", ()),
            ("Package: bash\n", ("usr/include/linux",)),
            ("Package: bash\n", ("usr/src/linux-headers-9.8",)),
            ("Package: bash\n", ("lib/modules/9.8/build",)),
        ],
    )
    def test_kernel_headers_are_found(
        self, status: str, places: tuple[str, ...], tmp_path: Path
    ) -> None:
        self.made(tmp_path, status, *places)
        assert len(trees.headers_in(tmp_path)) == 1

    def test_other_headers_are_none(self, tmp_path: Path) -> None:
        self.made(tmp_path, "Package: bash\nDepends: linux-headers-amd64\n", "usr/include/iproute2")
        assert trees.headers_in(tmp_path) == []

    def test_a_tree_is_made_once_and_anew_when_stale_and_the_stale_one_goes(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version = "1"

        def tool(words: list[str], **_options: object) -> str:
            if "mmdebstrap" in words:
                self.made(Path(words[-2]), "Package: bash\n")
            return "amd64\n"

        monkeypatch.setattr(trees, "run_tool", tool)
        monkeypatch.setattr(trees, "tree_packages", lambda _apt: [Package("a", version)])
        (cache / "other_1").mkdir(parents=True)
        first, made = trees.current_tree("x", self.MIRROR_APT, MIRROR)
        assert made
        assert trees.current_tree("x", self.MIRROR_APT, MIRROR) == (first, False)
        version = "2"
        second, made = trees.current_tree("x", self.MIRROR_APT, MIRROR)
        assert made
        assert sorted(cache.iterdir()) == sorted([cache / "other_1", second])

    def test_nothing_is_left_of_a_tree_that_fails(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def tool(words: list[str], **_options: object) -> str:
            if "mmdebstrap" in words:
                self.made(Path(words[-2]), "Package: linux-headers-amd64\n")
            return "amd64\n"

        monkeypatch.setattr(trees, "run_tool", tool)
        monkeypatch.setattr(trees, "tree_packages", lambda _apt: [Package("a", "1")])
        with pytest.raises(CacheError) as refused:
            trees.current_tree("x", self.MIRROR_APT, MIRROR)
        assert "linux-headers-amd64" in refused.value.why
        assert list(cache.iterdir()) == []
