"""Prometheus finds running runs by files that appear whole, are renewed, go with the run, and are removed when nobody does."""

import json
import os
import threading
import time

import pytest

from nepa_dist.metrics import discovery
from nepa_dist.metrics.__main__ import main
from nepa_dist.metrics.discovery import FOLDER, LEASE_SECONDS, Target, prune


def age(path, seconds):
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def test_a_target_is_a_file_sd_entry_with_the_run_as_label(tmp_path):
    target = Target(tmp_path, "big", "node7:4711", {"task": "pretrain", "__scheme__": "https"})
    expected = [{"targets": ["node7:4711"], "labels": {"task": "pretrain", "__scheme__": "https", "run": "big"}}]
    assert json.loads((tmp_path / FOLDER / "big.json").read_text()) == expected
    target.close()
    assert os.listdir(tmp_path / FOLDER) == []


def test_a_restart_elsewhere_replaces_it_and_the_old_process_does_not_take_it_away(tmp_path):
    old = Target(tmp_path, "big", "node7:4711", {})
    new = Target(tmp_path, "big", "node8:1234", {})
    old.close()
    assert json.loads(new.path.read_text())[0]["targets"] == ["node8:1234"]
    new.close()


def test_a_lease_is_renewed_and_others_stale_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "RENEW_SECONDS", 0.05)
    target = Target(tmp_path, "alive", "a:1", {})
    stale = tmp_path / FOLDER / "dead.json"
    stale.write_text("[]")
    age(target.path, 10 * LEASE_SECONDS)
    age(stale, LEASE_SECONDS + 5)
    deadline = time.monotonic() + 10
    while stale.exists() or time.time() - target.path.stat().st_mtime > LEASE_SECONDS:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    target.close()


def test_prune_removes_what_is_stale_and_nothing_else(tmp_path, capsys):
    folder = tmp_path / FOLDER
    folder.mkdir()
    for name, seconds in (("dead.json", LEASE_SECONDS + 5), ("alive.json", 5), (".dead.json.node.7", 300)):
        (folder / name).write_text("[]")
        age(folder / name, seconds)
    assert main(["targets", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("dead: ")
    assert os.listdir(folder) == ["alive.json"]
    (folder / "config.yaml").write_text("of somebody else")
    age(folder / "config.yaml", 10 * LEASE_SECONDS)
    assert prune(tmp_path) == []
    assert sorted(os.listdir(folder)) == ["alive.json", "config.yaml"]
    assert prune(tmp_path / "nothing") == []
    assert main(["targets", str(tmp_path / "nothing")]) != 0
    assert "is not a folder" in capsys.readouterr().err


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "RENEW_SECONDS", 0.001)
    target = Target(tmp_path, "big", "node7:4711", {"task": "x" * 20000})
    stop = threading.Event()
    broken = []

    def read():
        while not stop.is_set():
            try:
                json.loads(target.path.read_text())
            except ValueError as error:
                broken.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.5)
    stop.set()
    thread.join()
    target.close()
    assert not broken


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(OSError, match=FOLDER):
        Target(tmp_path, "big", "a:1", {})
