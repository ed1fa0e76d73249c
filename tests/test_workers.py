"""Worker processes: they live and end as told, whatever happens to them or to their trainer."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from images import batch_digest, image_folder
from nepa_dist.config import DataConfig
from nepa_dist.data.batch import BatchShape, Filled, Pixels
from nepa_dist.data.containers import DataError, Sample
from nepa_dist.data.loader import EvalLoader, TrainLoader
from nepa_dist.data.open import open_container
from nepa_dist.data.ring import Ring
from nepa_dist.data.workers import WorkerPool

SIZE = 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in two classes."""
    return image_folder(tmp_path / "images", num_classes=2, per_class=5)


def _train(source: Path, *, num_steps: int = 6, num_workers: int = 0) -> TrainLoader:
    container = open_container(str(source), "train", image_size=SIZE)
    return TrainLoader(
        container, DataConfig(num_workers=num_workers), image_size=SIZE, seed=11, global_batch_size=4, micro_batch_size=4,
        rank=0, world_size=1, start_step=0, num_steps=num_steps,
    )  # fmt: skip


def _digests(loader: TrainLoader | EvalLoader) -> list[str]:
    return [batch_digest(batch) for batch in loader]


class _Numbers:
    """Batch k is full of k."""

    shape = BatchShape(2, 4, masks=True)

    def __init__(self, num: int, *, at: Callable[[int], None] = lambda k: None) -> None:
        self._num = num
        self._at = at

    def __len__(self) -> int:
        return self._num

    def fill(self, k: int, pixels: Pixels) -> Filled:
        self._at(k)
        assert pixels.masks is not None
        pixels.images[:], pixels.masks[:] = k, k + 1
        return Filled([k, k], [k, k], [], k, [])


def test_batches_that_are_kept_are_never_overwritten() -> None:
    pool = WorkerPool(_Numbers(40), 2, 2, pin_memory=False)
    batches = list(pool.batches())
    pool.close()
    gc.collect()
    for k, batch in enumerate(batches):
        assert batch.masks is not None
        assert (batch.images == k).all()
        assert (batch.masks == k + 1).all()
        assert (batch.ids.tolist(), batch.labels.tolist(), batch.digest) == ([k, k], [k, k], k)


def test_a_view_keeps_the_memory_of_its_batch() -> None:
    ring = Ring(1, BatchShape(2, 4, masks=False))
    slot = ring.take()
    assert slot == 0
    pixels = ring.lend(slot)
    row = torch.from_numpy(pixels.images[:1])[0, 1:]
    del pixels
    gc.collect()
    assert ring.take() is None
    del row
    gc.collect()
    assert ring.take() == 0


def test_memory_goes_back_only_after_the_copies_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done, calls = [False], []

    class Event:
        def record(self) -> None:
            calls.append("record")

        def query(self) -> bool:
            return done[0]

        def synchronize(self) -> None:
            calls.append("synchronize")

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append("register")
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            calls.append("unregister")
            return 0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    ring = Ring(2, BatchShape(2, 4, masks=False))
    ring.pin()
    for _ in range(2):
        slot = ring.take()
        assert slot is not None
        ring.lend(slot)
        gc.collect()
    assert calls == ["register", "record", "record"]
    assert ring.take() is None
    done[0] = True
    assert ring.take() == 0
    done[0] = False
    del ring
    gc.collect()
    assert calls[3:] == ["synchronize", "unregister"] or calls[3:] == ["unregister"]


def test_memory_that_cannot_be_pinned_is_copied_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Runtime:
        def cudaHostRegister(self, *_: int) -> int:
            return 801

    pending = [RuntimeError("CUDA error: operation not supported")]

    def kernel(*_: object, **__: object) -> None:
        if pending:
            raise pending.pop()  # as a GPU does with an error that nobody has asked for

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "arange", kernel)
    ring = Ring(2, BatchShape(2, 4, masks=False))
    ring.pin()
    assert not ring.pinned
    assert not pending
    assert "failed with error 801" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_reach_the_gpu_unharmed() -> None:
    pool = WorkerPool(_Numbers(100), 2, 2, pin_memory=True)
    copies = []
    for batch in pool.batches():
        assert batch.images.is_pinned()
        copies.append(batch.images.cuda(non_blocking=True))
    pool.close()
    assert [int(copy.float().mean()) for copy in copies] == list(range(100))


def _fail(error: BaseException) -> Callable[[int], None]:
    def at(k: int) -> None:
        if k == 3:
            raise error

    return at


def test_an_error_in_a_worker_ends_the_iteration_and_says_where() -> None:
    pool = WorkerPool(_Numbers(10, at=_fail(KeyError("shard 7"))), 2, 2, pin_memory=False)
    batches = pool.batches()
    assert [next(batches).digest for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"(?s)loader worker \(pid \d+\) failed.*in fill.*KeyError: 'shard 7'"):
        next(batches)
    pool.close()
    pool = WorkerPool(_Numbers(10, at=_fail(DataError("no good data"))), 2, 2, pin_memory=False)
    with pytest.raises(DataError, match=r"^no good data$"):
        list(pool.batches())
    pool.close()
    assert not _worker_pids()


def test_a_worker_that_exits_is_an_error() -> None:
    pool = WorkerPool(_Numbers(10, at=lambda k: os._exit(7) if k == 3 else None), 2, 2, pin_memory=False)
    with pytest.raises(RuntimeError, match=r"loader worker \(pid \d+\) ended with exit code 7"):
        list(pool.batches())
    pool.close()


def _worker_pids() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


def test_workers_survive_signals_meant_for_the_trainer(folder: Path) -> None:
    wanted = _digests(_train(folder, num_steps=40))
    loader = _train(folder, num_steps=40, num_workers=2)
    batches = iter(loader)
    seen = [batch_digest(next(batches))]
    workers = _worker_pids()
    assert len(workers) == 2
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    seen += [batch_digest(next(batches)) for _ in range(20)]
    assert _worker_pids() == workers
    seen += [batch_digest(batch) for batch in batches]
    assert seen == wanted


def test_a_signal_while_workers_start_reaches_the_trainer_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, fork = os.getpid(), os.fork
    got: list[int] = []

    def handler(*_: object) -> None:
        if os.getpid() != trainer:
            os._exit(3)  # a worker ran what the trainer had installed for itself
        got.append(1)

    def fork_and_signal() -> int:
        pid = fork()
        os.kill(os.getpid(), signal.SIGTERM)  # in both processes
        return pid

    loader = _train(folder, num_workers=2)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        monkeypatch.setattr(os, "fork", fork_and_signal)
        assert len(_digests(loader)) == 6
        assert got
    finally:
        loader.close()
        signal.signal(signal.SIGTERM, before)


def test_a_killed_worker_is_an_error(folder: Path) -> None:
    loader = _train(folder, num_steps=10_000, num_workers=2)
    batches = iter(loader)
    next(batches)
    os.kill(min(_worker_pids()), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"loader worker \(pid \d+\) was killed by SIGKILL; .* too little memory"):
        for _ in batches:
            pass
    loader.close()
    assert not _worker_pids()


def test_workers_end_when_the_loader_is_closed_finished_or_restarted(folder: Path) -> None:
    loader = _train(folder, num_workers=2, num_steps=50)
    loader.close()
    batches = iter(loader)
    first = batch_digest(next(batches))
    old = _worker_pids()
    assert batch_digest(next(iter(loader))) == first
    assert len(_worker_pids()) == 2
    assert not _worker_pids() & old
    assert list(batches) == []
    loader.close()
    assert not _worker_pids()
    loader.close()
    assert len(_digests(loader)) == 50
    assert not _worker_pids()


def test_a_process_that_forgets_its_loader_still_ends(folder: Path) -> None:
    code = f"""
        import multiprocessing
        from nepa_dist.config import DataConfig
        from nepa_dist.data.open import open_container
        from nepa_dist.data.loader import TrainLoader
        container = open_container({str(folder)!r}, "train", image_size=32)
        loader = TrainLoader(container, DataConfig(num_workers=2), image_size=32, seed=1, global_batch_size=4,
                             micro_batch_size=4, rank=0, world_size=1, start_step=0, num_steps=10_000)
        batches = iter(loader)
        next(batches)
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)
        raise SystemExit("something else went wrong")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "something else went wrong"
    pids = done.stdout.split()
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


class _Stuck:
    """A container on a file system that does not answer."""

    class_names: list[str]
    fingerprint = ""

    def __init__(self, sign: Path) -> None:
        self.class_names = []
        self._sign = sign

    def __len__(self) -> int:
        return 10

    def read(self, index: int) -> Sample:
        self._sign.touch()
        time.sleep(600)
        raise OSError

    def name(self, index: int) -> str:
        return str(index)


def test_a_worker_that_is_stuck_is_killed(tmp_path: Path) -> None:
    sign = tmp_path / "reading"
    loader = EvalLoader(_Stuck(sign), DataConfig(num_workers=1), image_size=SIZE, batch_size=2)
    iter(loader)
    while not sign.exists() and _worker_pids():
        time.sleep(0.01)
    assert len(_worker_pids()) == 1
    loader.close()
    assert not _worker_pids()


def test_a_trainer_that_is_killed_leaves_no_worker_and_no_file(folder: Path) -> None:
    code = f"""
        import multiprocessing, time
        from nepa_dist.config import DataConfig
        from nepa_dist.data.open import open_container
        from nepa_dist.data.loader import TrainLoader
        container = open_container({str(folder)!r}, "train", image_size=32)
        loader = TrainLoader(container, DataConfig(num_workers=2), image_size=32, seed=1, global_batch_size=4,
                             micro_batch_size=4, rank=0, world_size=1, start_step=0, num_steps=10_000)
        batches = iter(loader)
        next(batches)
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)
        time.sleep(600)
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        pids = trainer.stdout.readline().split()
        assert not any("/dev/shm" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    finally:
        trainer.kill()
        trainer.wait()
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
