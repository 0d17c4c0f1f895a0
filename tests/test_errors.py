import os
from pathlib import Path

from cifar import errors


def test_the_first_line_of_an_error_is_the_first_that_says_something():
    assert errors.first_line(ImportError("\n\nIMPORTANT: read\nmore")) == "IMPORTANT: read"
    assert errors.first_line(ValueError()) == ""


def test_a_path_is_shown_from_the_working_directory_and_whole_on_another_drive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert errors.short(tmp_path / "runs" / "one") == os.path.join("runs", "one")

    def on_another_drive(path):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", on_another_drive)
    assert errors.short(Path("one")) == "one"
