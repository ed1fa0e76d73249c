"""A step reads nothing from the device: every call that would wait for it is counted, by where it is made."""

import sys
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nepa_dist import train
from nepa_dist.config import Config

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"}
READS |= {"nonzero", "masked_select", "unique", "argwhere", "equal", "allclose", "bincount"}
"""What hands a value, or a size that depends on values, to the host."""
KERNELS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "bincount"}
ON_THE_HOST = {("nepa_dist/tasks/base.py", "begin_step")}
"""Where tensors are read that are never on a device."""
SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path": 0.1}


def caller():
    """File and function of this project that the call came from."""
    frame = sys._getframe(2)
    while frame and "nepa_dist/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return None
    return "nepa_dist/" + frame.f_code.co_filename.rpartition("nepa_dist/")[2], frame.f_code.co_name


class Reads(TorchFunctionMode):
    """Notes calls from Python."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        # By its name: a device that is a variable is the run's, which is a CPU only here.
        to_host = name == "to" and not kwargs.get("non_blocking") and any(x == "cpu" for x in args[1:] if isinstance(x, str))
        if name in READS or to_host:
            self.found.append((*(caller() or ("torch", "")), name))
        return function(*args, **kwargs)


class Kernels(TorchDispatchMode):
    """Notes operations, those that autograd and the optimizer call included."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        index = name == "index" and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name in KERNELS or index:
            self.found.append((*(caller() or ("torch", "")), name))
        return function(*args, **(kwargs or {}))


def run_steps(monkeypatch, tmp_path, images, around, steps=3, **settings):
    """A short run, each of whose updates is made within ``around(step)``."""
    done, original = [], train.update

    def update(*args):
        with around(len(done) + 1):
            report = original(*args)
        done.append(report.step)
        return report

    monkeypatch.setattr(train, "update", update)
    values = {
        "model": SMALL,
        "run_root": str(tmp_path),
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "steps": steps,
        "data": {"source": str(images), "num_workers": 1},
        "optim": {"warmup_steps": 0},
        "metrics": {"every": 1, "collapse_every": 10**6, "prometheus": False},
        **settings,
    }
    assert train.main(Config.model_validate(values)) == 0
    assert done == list(range(1, steps + 1))


def run_counted(monkeypatch, tmp_path, images, **settings):
    found = []

    @contextmanager
    def counted(step):
        with Reads() as reads, Kernels(found):
            yield
        found.extend(reads.found)

    run_steps(monkeypatch, tmp_path, images, counted, **settings)
    return {place for place in found if place[:2] not in ON_THE_HOST}


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16_params"])
def test_a_pretraining_step_reads_nothing(monkeypatch, tmp_path, tiny_images, precision):
    objective = {"mask_ratio": 0.4, "anti_collapse": "sigreg"} if precision == "fp32" else {}
    engine = {"precision": precision, "device": "cpu"}
    assert run_counted(monkeypatch, tmp_path, tiny_images, engine=engine, objective=objective) == set()


def test_a_fine_tuning_step_reads_nothing(monkeypatch, tmp_path, tiny_images):
    settings = {"task": "finetune", "finetune": {"num_classes": 3, "mixup": 0.8, "cutmix": 1.0}, "engine": {"device": "cpu"}}
    augment = {"erase_probability": 1.0}
    data = {"source": str(tiny_images), "num_workers": 1, "augment": augment}
    monkeypatch.setattr(train, "Validator", lambda *_: None)
    assert run_counted(monkeypatch, tmp_path, tiny_images, **settings, data=data) == set()


def test_a_read_is_found():
    found = []
    x = torch.arange(3)
    with Reads() as reads, Kernels(found):
        x.sum().item()
        if x.any():
            x[x > 1]
        x.to("cpu")
        x.to("cpu", non_blocking=True)
    assert [name for *_, name in reads.found] == ["item", "__bool__", "to"]
    assert [name for *_, name in found] == ["_local_scalar_dense", "_local_scalar_dense", "index"]
