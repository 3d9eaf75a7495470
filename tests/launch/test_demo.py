"""The demo's orchestration, without its minutes: what it refuses to replace. The stages: tests/e2e/test_main_job.py."""

from pathlib import Path

import pytest

from launch.demo.main import replace_folder


def test_a_new_or_empty_folder_and_an_earlier_demo_are_taken(tmp_path: Path) -> None:
    replace_folder(tmp_path / "new" / "demo")
    (tmp_path / "new" / "demo" / "old.json").touch()
    replace_folder(tmp_path / "new" / "demo")
    assert [path.name for path in (tmp_path / "new" / "demo").iterdir()] == [".demo"]
    (tmp_path / "empty").mkdir()
    replace_folder(tmp_path / "empty")


def test_somebody_elses_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else than a demo"):
        replace_folder(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
