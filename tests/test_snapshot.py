"""The code of a job: what is taken, that it cannot change, and that nothing secret is in it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from jobs import snapshot
from jobs.cluster import REPO_ROOT
from jobs.snapshot import SnapshotError, read_tree, secrets_in, verify_snapshot, write_snapshot
from nepa_dist.run_folder import git_state


def git(root: Path, *words: str) -> None:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True, env=environment)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with a package, a tool, an ignored file and one that nobody tracks."""
    root = tmp_path / "project"
    (root / "jobs").mkdir(parents=True)
    (root / "jobs" / "run.py").write_text("print(1)\n")
    (root / "tool.sh").write_text("#!/bin/sh\n")
    (root / "tool.sh").chmod(0o755)
    (root / "naïve name.txt").write_text("x")
    (root / ".gitignore").write_text("*.log\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "x")
    (root / "a.log").write_text("ignored")
    (root / "notes.txt").write_text("not tracked")
    return root


def test_it_takes_what_git_tracks_as_it_lies_there_and_new_code(project: Path) -> None:
    (project / "jobs" / "run.py").write_text("print(2)\n")
    (project / "jobs" / "new.py").write_text("")
    (project / "tool.sh").unlink()
    tree = read_tree(root=project)
    assert sorted(tree.files) == [".gitignore", "jobs/new.py", "jobs/run.py", "naïve name.txt"]
    assert tree.files["jobs/run.py"] == b"print(2)\n"
    assert "notes.txt" in read_tree(["*.txt"], root=project).files


def test_the_digest_is_of_names_contents_and_modes(project: Path) -> None:
    first = read_tree(root=project).digest
    assert read_tree(root=project).digest == first
    assert read_tree(["notes.txt"], root=project).digest != first
    (project / "jobs" / "run.py").chmod(0o755)
    executable = read_tree(root=project).digest
    assert executable != first
    (project / "jobs" / "run.py").write_text("print(3)\n")
    assert read_tree(root=project).digest not in (first, executable)


def test_it_is_written_once_read_only_and_described(project: Path, tmp_path: Path) -> None:
    (project / "jobs" / "run.py").write_text("print(2)\n")
    tree = read_tree(root=project)
    place = write_snapshot(tree, tmp_path / "run")
    assert place == tmp_path / "run" / "code" / tree.digest[:12]
    assert write_snapshot(tree, tmp_path / "run") == place
    assert {path.name for path in (tmp_path / "run" / "code").iterdir()} == {place.name}
    assert (place / "jobs" / "run.py").read_text() == "print(2)\n"
    assert (place / "jobs" / "run.py").stat().st_mode & 0o777 == 0o400
    assert (place / "tool.sh").stat().st_mode & 0o777 == 0o500
    assert "+print(2)" in (place / "SNAPSHOT.diff").read_text()
    assert "torch==" in (place / "packages.txt").read_text()
    state = git_state(place)
    assert state["snapshot"] == tree.digest
    assert len(state["commit"]) == 40
    assert any("jobs/run.py" in line for line in state["changed_files"])
    verify_snapshot(place, tree.digest)


@pytest.mark.parametrize("what", ["changed", "gone", "mode", "list", "other"])
def test_a_snapshot_that_is_not_what_was_submitted_is_refused(project: Path, tmp_path: Path, what: str) -> None:
    tree = read_tree(root=project)
    place = write_snapshot(tree, tmp_path)
    file, description = place / "jobs" / "run.py", place / "SNAPSHOT.json"
    for path in (file, description):
        path.chmod(0o600)
    values = json.loads(description.read_text())
    if what == "changed":
        file.write_text("print(3)\n")
    elif what == "gone":
        file.unlink()
    elif what == "mode":
        values["executable"].append("jobs/run.py")
    elif what == "list":
        del values["files"]["jobs/run.py"]
    description.write_text(json.dumps(values))
    with pytest.raises(SnapshotError, match="is not what was submitted"):
        verify_snapshot(place, "0" * 64 if what == "other" else tree.digest)


@pytest.mark.parametrize(
    ("pattern", "words"), [("*.nothing", "no such file"), ("/etc/hostname", "name files below"), ("../x", "name files below")]
)
def test_what_cannot_be_included_is_refused(project: Path, pattern: str, words: str) -> None:
    with pytest.raises(SnapshotError, match=words):
        read_tree([pattern], root=project)


def test_a_link_that_leads_outside_is_refused(project: Path) -> None:
    (project / "jobs" / "link.py").symlink_to("/etc/hostname")
    with pytest.raises(SnapshotError, match="outside of the project"):
        read_tree(root=project)


def test_more_than_code_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_BYTES", 10)
    with pytest.raises(SnapshotError, match="what git tracks must be code"):
        read_tree(root=project)


def test_without_git_the_packages_are_taken(project: Path) -> None:
    (project / ".git").rename(project.parent / "away")
    assert sorted(read_tree(root=project).files) == ["jobs/run.py"]


def test_keys_of_many_kinds_are_found() -> None:
    keys = ["-----BEGIN RSA " + "PRIVATE KEY-----", "AKIA" + "A" * 16, "ghp_" + "a" * 36, "hf_" + "b" * 34, "sk-" + "c" * 40]
    for key in keys:
        tree = snapshot.Snapshot(Path(), {"x.py": f"key = '{key}'".encode()}, frozenset())
        assert "looks like a key" in secrets_in(tree, {})[0]


def test_this_project_holds_no_secrets_and_its_snapshot_runs(tmp_path: Path) -> None:
    tree = read_tree()
    assert secrets_in(tree, {"MY_TOKEN": "a-value-that-is-nowhere-" + "9" * 8}) == []
    place = write_snapshot(tree, tmp_path)
    code = "import jobs.runner, nepa_dist.config; print(jobs.runner.__file__, nepa_dist.config.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(place)}
    import sys

    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=REPO_ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(place)) for path in done.stdout.split())
