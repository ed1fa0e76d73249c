"""Files of a run's folder."""

import os
import shutil
from pathlib import Path

import pytest

from nepa_dist.run_folder import write_bytes, write_linked_folder

NAMES = ("model.safetensors", "config.json", "results.json")


def files(text):
    return {name: f"{text} {name}".encode() for name in NAMES}


def content(folder):
    """What all files in a folder say; None if there is none."""
    if not folder.exists():
        return None
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    said = {text.removesuffix(name).strip() for name, text in texts.items()}
    assert (set(texts), len(said)) == (set(NAMES), 1), texts
    return said.pop()


def killed(call_number, link, text):
    """Replace the files in a process that ends without warning before the n-th change of a disk; returns whether it did end."""
    child = os.fork()
    if child == 0:
        left = call_number

        def counted(function):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        for name in ("mkdir", "fsync", "rename", "replace", "symlink", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        write_linked_folder(link, files(text))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_point_leaves_all_old_or_all_new_files(tmp_path):
    link, seen = tmp_path / "best", []
    write_linked_folder(link, files("old"))
    number = 1
    while killed(number, link, "new"):
        seen.append(content(link))
        write_linked_folder(link, files("old"))
        assert content(link) == "old"
        assert len(list(tmp_path.iterdir())) == 2, "the link and its folder, no leftovers"
        number += 1
    assert content(link) == "new"
    first = seen.index("new")
    assert seen == ["old"] * first + ["new"] * (len(seen) - first)
    assert len(seen) > 10
    assert len(list(tmp_path.iterdir())) == 2


def test_a_copy_without_links_goes_on(tmp_path):
    write_linked_folder(tmp_path / "run-best", files("old"))
    link, number = tmp_path / "copy" / "best", 1
    while True:
        shutil.copytree(tmp_path / "run-best", link)
        more = killed(number, link, "new")
        assert content(link) in ("old", "new", None)
        write_linked_folder(link, files("newer"))
        assert content(link) == "newer"
        assert len(list(link.parent.iterdir())) == 2
        shutil.rmtree(link.parent)
        number += 1
        if not more:
            return


def test_links_of_a_user_and_folders_of_other_names_stay(tmp_path):
    link = tmp_path / "best"
    write_linked_folder(link, files("first"))
    os.symlink(Path(os.readlink(link)).name, tmp_path / "good")
    (tmp_path / "best-of-all").mkdir()
    for text in ("second", "third"):
        write_linked_folder(link, files(text))
    assert (content(link), content(tmp_path / "good")) == ("third", "first")
    assert (tmp_path / "best-of-all").exists()


def test_a_full_disk_leaves_the_old_folder_and_no_part(tmp_path, monkeypatch):
    write_linked_folder(tmp_path / "best", files("old"))

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_linked_folder(tmp_path / "best", files("new"))
    assert content(tmp_path / "best") == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_could_not_be_written_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    write_bytes(tmp_path / "weights", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "weights", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert (tmp_path / "weights").read_bytes() == b"old"
