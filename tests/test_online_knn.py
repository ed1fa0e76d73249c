"""k-NN beside training: the numbers of the weights that were given, without disturbing the trainer, whatever goes wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from images import image_folder
from nepa_dist.config import Config
from nepa_dist.data.device import to_device
from nepa_dist.data.loader import EvalLoader
from nepa_dist.data.open import open_container
from nepa_dist.metrics.registry import lookup
from nepa_dist.online_knn import OnlineKnn, online_knn_problems
from nepa_dist.tasks.features import extract_features
from nepa_dist.tasks.pretrain import PretrainTask
from nepa_dist.tasks.probe import knn_accuracy

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MODEL = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
CONFIG = Config.model_validate({"model": MODEL, "data": {"source": "digits"}})
COUNTS = {"num_train": 80, "num_test": 40}
WAIT = 120.0


def weights(seed=0):
    """A whole task's parameters, as an engine gives them, far from their small initial values."""
    task = PretrainTask(CONFIG.model, CONFIG.objective, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in task.named_parameters()}


def expected(state, layer):
    """Top-1 of the whole model by the public probe, on the images that are documented."""
    task = PretrainTask(CONFIG.model, CONFIG.objective)
    task.load_state_dict(state)
    data = []
    for split, count in (("train", 80), ("val", 40)):
        container = open_container("digits", split, image_size=32)
        indices = [i * len(container) // count for i in range(count)]
        loader = EvalLoader(container, CONFIG.data, image_size=32, batch_size=80, indices=indices, num_workers=0)
        batches = (to_device(batch, CPU, CONFIG.data.mean, CONFIG.data.std) for batch in loader)
        features, labels = extract_features(task.backbone, batches, layers=[layer])
        data += [features[layer], labels]
    return knn_accuracy(*data, ks=(8,))[8]  # 80 images of 10 classes: no more neighbours than a class has images


def processes():
    """Processes of this one that measure, by id."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"nepa_dist.online_probe" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, IndexError, ValueError):
            continue
    return found


@pytest.fixture
def knn():
    made = []

    def make(config=CONFIG, **options):
        made.append(OnlineKnn(config, CPU, **COUNTS | options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("in_process", [False, True])
def test_it_measures_the_weights_as_they_were_and_nothing_else(knn, in_process):
    probe = knn(in_process=in_process)
    for step in (10, 20):
        state = weights(step)
        accuracy = expected(state, 1)
        consumed = []
        before = torch.get_rng_state()
        assert probe.start(step, ((name, consumed.append(name) or tensor) for name, tensor in state.items()))
        assert len(consumed) == len(state)
        for tensor in state.values():
            tensor.zero_()  # as training goes on
        result = probe.poll(WAIT)
        assert torch.equal(torch.get_rng_state(), before), "the trainer's random numbers are its own"
        assert (result.step, result.problem) == (step, None)
        assert result.values["knn_top1"] == accuracy
        assert (result.values["knn_step"], result.values["knn_failures_total"]) == (step, 0)
        assert all(lookup(key) for key in result.values)
        assert probe.poll() is None, "a result is given once"


def test_layers_by_number(knn):
    state = weights()
    found = []
    for layer in (0, -1):
        probe = knn(in_process=True, layer=layer)
        probe.start(1, state.items())
        found.append(probe.poll(WAIT).values["knn_top1"])
    assert found == [expected(state, 0), expected(state, 2)]
    with pytest.raises(ValueError, match="layer 3 is not a block: the model has 3"):
        knn(layer=3)


def test_it_takes_no_second_measurement_while_one_runs(knn):
    probe = knn()
    state = weights()
    assert probe.poll() is None
    assert probe.start(1, state.items())
    consumed = []
    assert not probe.start(2, ((name, consumed.append(name) or tensor) for name, tensor in state.items()))
    assert len(consumed) == len(state), "other ranks take part in making them"
    result = probe.poll(WAIT)
    assert result.step == 1
    assert result.values["knn_skipped_total"] == 1, "one that fell due meanwhile is not lost without a word"


def test_failures_are_told_and_counted_and_do_not_last(knn):
    probe = knn()
    state = weights()
    probe.start(1, [(name, tensor * float("nan")) for name, tensor in state.items()])
    result = probe.poll(WAIT)
    assert result.problem == "80 of 80 training features are not finite"
    assert result.values == {"knn_failures_total": 1, "knn_skipped_total": 0}
    (process,) = processes()
    assert os.getpriority(os.PRIO_PROCESS, process) == 19
    os.kill(process, signal.SIGKILL)
    probe.start(2, state.items())
    again = probe.poll(WAIT)
    if again.problem is None:  # it was seen dead before it was asked
        assert again.values["knn_failures_total"] == 1
    else:
        assert again.problem == "its process was killed (exit code -9)"
        assert again.values == {"knn_failures_total": 2, "knn_skipped_total": 0}
    probe.start(3, state.items())
    assert probe.poll(WAIT).problem is None
    probe.start(4, [("backbone.cls_token", state["backbone.cls_token"])])
    assert "Error(s) in loading state_dict" in probe.poll(WAIT).problem


def test_closing_does_not_wait_for_the_result(knn):
    for in_process in (True, False):
        probe = knn(in_process=in_process, num_train=20_000)
        probe.start(1, weights().items())
        time.sleep(0.2)
        probe.close()
        probe.close()
        assert processes() == []
        assert probe.poll() is None


def test_the_process_ends_with_a_trainer_that_is_killed(tmp_path):
    code = f"""
import sys, time, torch
sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(ROOT / "tests")!r})
from test_online_knn import CONFIG, CPU, OnlineKnn, processes, weights
probe = OnlineKnn(CONFIG, CPU, num_train=20_000, num_test=2000)
probe.start(1, weights().items())
while not processes():
    time.sleep(0.05)
print(processes()[0], flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path)
    process = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + WAIT
    while Path(f"/proc/{process}").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the process outlives its trainer"
        time.sleep(0.1)


def folder(tmp_path, *, classes=2, val=True, loose=False):
    root = tmp_path / f"data-{classes}-{val}"
    image_folder(root / "train", num_classes=classes, per_class=3, size=(40, 40))
    if val:
        image_folder(root / "val", num_classes=classes, per_class=2, size=(40, 40))
    if loose:
        (root / "train" / "a-loose-one.jpg").write_bytes(next((root / "train").rglob("*.jpg")).read_bytes())
        next((root / "val").rglob("*.jpg")).write_bytes(b"broken")
    return CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"source": str(root)})})


def test_images_without_label_and_broken_ones_are_left_out(knn, tmp_path):
    config = folder(tmp_path, loose=True)
    assert online_knn_problems(config) == []
    probe = knn(config, in_process=True, num_train=100, num_test=100)
    probe.start(1, weights().items())
    result = probe.poll(WAIT)
    assert result.problem is None
    assert result.values["knn_top1"] * 3 == pytest.approx(round(result.values["knn_top1"] * 3)), "three of four can be read"


def test_what_cannot_be_measured_is_said_before(tmp_path):
    assert online_knn_problems(CONFIG) == []
    flat = tmp_path / "flat"
    flat.mkdir()
    source = next((Path(folder(tmp_path).data.source) / "train").rglob("*.jpg"))
    (flat / "x.jpg").write_bytes(source.read_bytes())
    for config, message in (
        (folder(tmp_path, val=False), "has train/ but no val/"),
        (CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"source": str(flat)})}), "no validation split"),
        (folder(tmp_path, classes=1), "the train split of .* has 1"),
        (CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"source": None})}), "data.source is not set"),
    ):
        (problem,) = online_knn_problems(config)
        assert problem.startswith("metrics.knn_every needs")
        assert "\n" not in problem
        assert re.search(message, problem)


def test_the_module_answers_without_torch():
    code = "import sys, nepa_dist.online_knn; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
