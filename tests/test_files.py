"""Writing aside and renaming: whatever fails in the middle, a name stands for what is whole."""

import subprocess
import sys
from pathlib import Path

import pytest

from dflash_scale import files
from tests.support.command import ROOT


class Full(OSError):
    """The disk, half way."""


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    for text in ("step-000010", "step-000020\nä"):
        files.write_file(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "totals.json"
    path.write_text("old")

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise Full

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(Full):
        files.write_file(path, "new and longer")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_appears_when_it_is_whole_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "drafter"
    with files.new_folder(path) as aside:
        (aside / "config.json").write_text("{}")
        assert not path.exists() and aside.parent == path.parent
    assert [each.name for each in path.iterdir()] == ["config.json"]
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_fails_half_way_leaves_the_old_one_and_nothing_beside(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "drafter"
    if replace:
        path.mkdir()
        (path / "old").touch()

    def fail() -> None:
        with files.new_folder(path, replace=replace) as aside:
            (aside / "half").touch()
            raise Full

    with pytest.raises(Full):
        fail()
    assert [each.relative_to(tmp_path) for each in tmp_path.rglob("*")] == [Path("drafter"), Path("drafter/old")][
        : 2 * replace
    ]


def test_an_older_folder_is_replaced_where_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "drafter"
    for name, replace in (("first", False), ("second", True)):
        with files.new_folder(path, replace=replace) as aside:
            (aside / name).touch()
    with pytest.raises(OSError, match="not empty"), files.new_folder(path):
        pass
    assert [each.relative_to(tmp_path) for each in tmp_path.rglob("*")] == [Path("drafter"), Path("drafter/second")]


def test_what_a_killed_process_left_is_known_by_its_name(tmp_path: Path) -> None:
    for name in ("latest", "step-000010"):
        (tmp_path / name).mkdir()
    for name in ("step-000020", "step-000030"):
        killed = """
import os, sys; from pathlib import Path; from dflash_scale import files
with files.new_folder(Path(sys.argv[1])) as aside:
    (aside / "weights").touch()
    os._exit(9)
"""
        subprocess.run([sys.executable, "-c", killed, str(tmp_path / name)], cwd=ROOT, check=False)
    (tmp_path / f"step-000040{files.PARTIAL}").touch()
    assert len([*tmp_path.iterdir()]) == 5
    files.remove_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step-000010"}


def test_a_folder_that_is_removed_is_never_seen_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-000010"
    path.mkdir()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        files.remove_folder(path)
    left = [each.name for each in tmp_path.iterdir()]
    assert len(left) == 1 and files.PARTIAL in left[0]
