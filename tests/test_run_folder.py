"""Files of a run's folder."""

import os

import pytest

from nepa_dist.run_folder import write_bytes


def test_what_could_not_be_written_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    write_bytes(tmp_path / "weights", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "weights", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert (tmp_path / "weights").read_bytes() == b"old"
