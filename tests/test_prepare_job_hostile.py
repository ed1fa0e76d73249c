"""Whatever a user writes reaches the jobs of the preparation as text, and is never executed."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import prepare, submit

PIECES = (
    r"""$(touch hit)|`touch hit`|;touch hit;|'|"|\|&&touch hit&&|>hit|<x|$HOME|${IFS}| |  |#|#SBATCH --wrap=x|END|*|?|{a,b}|x"""
    "|x|~|!|!!|%A|%j|%|-|--array=9|=|é|画像|(|)|\U0001f600|\u202e|\u200b|\n|\ntouch hit\n|\nEND\n|\r|\t|\x1b"
)


def _hostile(count: int) -> list[str]:
    """Texts that a shell, or sbatch, would take for more than text."""
    random_ = random.Random(5)
    pieces = [*PIECES.split("|"), "|touch hit"]
    return ["".join(random_.choices(pieces, k=random_.randint(1, 6))) for _ in range(count)]


def test_what_the_user_writes_is_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed script, run by bash with a stand-in for Python that keeps its words, calls exactly what was asked for."""
    python, calls, work = tmp_path / "py'th\"on $(touch hit)", tmp_path / "calls", tmp_path / "work"
    keep = r"""{ printf '%s\0' "$PYTHONPATH" "$@"; echo; } >> "$CALLS" """
    _executable(python, f"#!/bin/sh\n{keep}\n")
    _executable(tmp_path / "bin" / "sbatch", "#!/bin/sh\nSLURM_CPUS_PER_TASK=1 bash\necho '41;sim'\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(prepare, "REPO_ROOT", tmp_path / "re'po;touch hit")
    start = [str(tmp_path / "re'po;touch hit"), "-P", "-m", "data_prep"]
    work.mkdir()
    monkeypatch.chdir(work)
    assert submit.main(["prepare", "raw", "out", "--array", "3", "--print"]) == 0
    usual = _directives(capsys.readouterr().out)
    refused = 0
    for number, text in enumerate(_hostile(200)):
        raw, out = tmp_path / "raw" / text, tmp_path / f"out{number}" / (re.sub(r"[%\\]", "", text) or "x")
        source = [f"--val-labels={tmp_path}/{text}", f"--image-column={text}", f"--label-column=x{text}"]
        plan = [f"--name={text}", f"--skip-bad-list={tmp_path}/{text}"]
        code = submit.main(["prepare", str(raw), str(out), *source, *plan, "--array", "3", "--print"])
        printed = capsys.readouterr()
        if any(character in text for character in "\n\r\t\x1b\u202e\u200b"):
            refused += 1
            assert (code, printed.out) == (2, "")
            assert "control character" in printed.err
            continue
        assert code == 0
        assert _directives(printed.out) == usual
        calls.unlink(missing_ok=True)
        done = subprocess.run(["bash"], input=printed.out.encode(), check=True, capture_output=True, cwd=work)
        assert (done.stdout, done.stderr) == (b"41;sim\n", b"")
        assert [call.split("\0") for call in calls.read_text().split("\0\n")[:-1]] == [
            [*start, "plan", *source, *plan, str(raw), str(out)],
            [*start, "write", *source, str(raw), str(out), "--workers", "1"],
            [*start, "verify", "--level=hash", str(out), "--workers", "1"],
        ]
        assert list((out / "logs").iterdir()) == []
    assert 20 < refused < 150
    assert list(work.iterdir()) == []
    assert not list(tmp_path.rglob("hit"))


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _directives(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#SBATCH")]
