"""Batches reach a device beside the computation: what is ordered how, with a device that only notes what it is given."""

import time
from contextlib import contextmanager

import pytest
import torch

from benchmarks import feed
from nepa_dist import intake, train
from nepa_dist.config import Config
from nepa_dist.data import device as data_device
from nepa_dist.data.batch import Batch
from nepa_dist.data.device import normalize, side_stream, to_device
from nepa_dist.step_report import StepReport

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)
SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


class NotedStream:
    """A side stream that notes what happens; computing itself is the CPU's."""

    def __init__(self):
        self.inside, self.notes = False, []

    @contextmanager
    def entered(self):
        self.inside = True
        yield
        self.inside = False

    def hand_over(self, tensors):
        assert not self.inside
        self.notes.append(("handed over", sorted(tuple(tensor.shape) for tensor in tensors)))


def make_batch(masks=None):
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    return Batch(images, torch.tensor([1, 2]), torch.tensor([7, 8]), (), masks)


def test_copies_and_normalisation_run_in_the_side_stream_and_all_is_handed_over(monkeypatch):
    stream = NotedStream()
    monkeypatch.setattr(data_device, "side_stream", lambda _: stream)

    def noted(*args):
        stream.notes.append(("normalised inside", stream.inside))
        return normalize(*args)

    monkeypatch.setattr(data_device, "normalize", noted)
    moved = to_device(make_batch(torch.zeros(2, 4, 4, dtype=torch.uint8)), CPU, HALF, HALF)
    assert stream.notes == [("normalised inside", True), ("handed over", [(2,), (2,), (2, 3, 4, 4), (2, 4, 4)])]
    monkeypatch.undo()
    plain = to_device(make_batch(torch.zeros(2, 4, 4, dtype=torch.uint8)), CPU, HALF, HALF)
    assert all(torch.equal(moved[name], plain[name]) for name in plain)
    assert side_stream(CPU) is None


def test_tensors_are_handed_to_the_stream_of_their_own_device(monkeypatch):
    second, notes = torch.device("cuda", 1), []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            notes.append((self.device, "waits for", other.device))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(device or torch.device("cuda", 0)))
    data_device.SideStream(second).hand_over([])
    assert notes == [(second, "waits for", second)]


def test_a_batch_is_on_its_way_before_the_step_before_it_is_waited_for(monkeypatch, tmp_path, tiny_images):
    notes = []
    upload, read, update = to_device, StepReport.read, train.update

    def noted_update(*args):
        report = update(*args)
        notes.append(("launched", report.step))
        return report

    def noted_read(report):
        notes.append(("waited for", report.step))
        return read(report)

    def noted_upload(*args):
        notes.append(("uploaded", 1 + sum(note[0] == "launched" for note in notes)))
        return upload(*args)

    monkeypatch.setattr(train, "update", noted_update)
    monkeypatch.setattr(StepReport, "read", noted_read)
    monkeypatch.setattr(intake, "to_device", noted_upload)
    settings = {
        "model": SMALL,
        "run_root": str(tmp_path),
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "steps": 4,
        "data": {"source": str(tiny_images), "num_workers": 1},
        "engine": {"device": "cpu"},
        "metrics": {"prometheus": False},
    }
    assert train.main(Config.model_validate(settings)) == 0
    for step in range(1, 4):
        # A device computes a step from its launch until it is waited for: in between the next batch is copied and launched.
        assert notes.index(("launched", step)) < notes.index(("uploaded", step + 1)) < notes.index(("waited for", step))
        assert notes.index(("launched", step + 1)) < notes.index(("waited for", step))


def test_a_synthetic_device_waits_for_slow_data_and_not_for_fast_data():
    def batches(seconds):
        for _ in range(6):
            clock.now += seconds
            yield None

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    for seconds, share in ((0.5, 0.0), (1.0, 0.0), (4.0, 0.75)):
        clock = feed.time = Clock()
        try:
            assert feed.share_waited(batches(seconds), 1.0, warmup=2) == pytest.approx(share, abs=0.15)
        finally:
            feed.time = time
