"""An observed step reads no more from the device than a plain one: nothing that it measures waits for a number."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nepa_dist.config import Config
from nepa_dist.engines.build import build_engine
from nepa_dist.plan import make_plan
from nepa_dist.tasks.inspection import inspect
from nepa_dist.tasks.pretrain import PretrainTask

WAITING = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default", "aten.linalg_eigh.default"}
"""What a device must be asked for and waited for: item(), float(), bool(), sizes that depend on values, eigenvalues."""


class Reads(TorchDispatchMode):
    """Notes the operations that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in WAITING or "eig" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_gauges_of_a_step_wait_for_nothing():
    model = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    config = Config.model_validate({"model": model, "global_batch_size": 4, "micro_batch_size": 4, "steps": 10})
    plan = make_plan(config, 100)
    task = PretrainTask(config.model, config.objective)
    engine = build_engine(task, config, plan, torch.device("cpu"))
    inputs = {"images": torch.randn(4, 3, 32, 32)}

    def reads_of(number, *, observe):
        with Reads() as reads:
            task.begin_step(number, observe=observe)
            loss, _ = engine.model(inputs)
            engine.backward(loss, last=True)
            engine.step(observe=observe)
            if observe:
                health = task.health(audit_seed=number)
                gauges = health.gauges | inspect(task, engine.model, inputs, lambda x: x, audit=True)
                assert len(gauges) > 20
                assert health.spectra
        return sorted(reads.found)

    reads_of(0, observe=True)  # the optimizer makes its state
    assert reads_of(1, observe=True) == reads_of(2, observe=False)


def test_a_read_would_be_seen():
    with Reads() as reads:
        float(torch.ones(2).sum())
        torch.linalg.eigvalsh(torch.eye(2))
    assert len(reads.found) == 2
