"""Beginning a new run from a part of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nepa_dist.checkpoint.portable import PartialState, StateReader
from nepa_dist.checkpoint.store import CheckpointError, CheckpointStore
from nepa_dist.config import OptimConfig
from nepa_dist.engines.base import check_state, copy_state
from nepa_dist.optim import AdamWEMA


def save(root: Path, *, without: str | None = None) -> StateReader:
    """Two parameters; ``without`` leaves out a field of the second."""
    entries: list[tuple[str, dict[str, Tensor]]] = []
    for i, name in enumerate(("backbone.a", "head.b")):
        fields = {field: torch.full((3, 2), 10.0 * i + k) for k, field in enumerate(("weight", "exp_avg", "exp_avg_sq", "ema"))}
        fields["step"] = torch.tensor(40.0)
        entries.append((name, {field: tensor for field, tensor in fields.items() if i == 0 or field != without}))
    _, reader = CheckpointStore.open(CheckpointStore(root).save(1, entries, {}))
    return reader


def test_the_reader_says_what_is_stored_for_every_parameter(tmp_path: Path) -> None:
    reader = save(tmp_path / "all")
    assert reader.common_fields() == ["weight", "exp_avg", "exp_avg_sq", "ema", "step"]
    assert reader.shape("head.b") == [3, 2]
    assert reader.shape("head.b", "step") == []
    reader = save(tmp_path / "less", without="ema")
    assert reader.common_fields() == ["weight", "exp_avg", "exp_avg_sq", "step"]
    assert "ema" in reader.fields("backbone.a")
    with pytest.raises(CheckpointError, match=r"holds no 'ema' of parameter 'head\.b'"):
        reader.shape("head.b", "ema")


@pytest.mark.parametrize(
    ("options", "weight", "ema"),
    [
        ({}, 10.0, 10.0),
        ({"mode": "weights"}, 10.0, 10.0),
        ({"mode": "weights", "use_ema": True}, 13.0, 13.0),
        ({"mode": "weights+ema"}, 10.0, 13.0),
        ({"mode": "weights+ema", "use_ema": True}, 13.0, 13.0),
        ({"mode": "weights", "keep_ema": False}, 10.0, None),
        ({"mode": "weights+ema", "keep_ema": False}, 10.0, None),
        ({"mode": "weights", "use_ema": True, "keep_ema": False}, 13.0, None),
    ],
)
def test_a_partial_state(tmp_path: Path, options: dict[str, object], weight: float, ema: float | None) -> None:
    state = PartialState(save(tmp_path), **options)  # type: ignore[arg-type]
    assert state.names() == ["backbone.a", "head.b"]
    read = state.read("head.b")
    values = {"weight": weight, "exp_avg": 0.0, "exp_avg_sq": 0.0} | ({} if ema is None else {"ema": ema})
    assert set(read) == {*values, "step"}
    assert read["step"].equal(torch.tensor(0.0))
    for field, value in values.items():
        assert read[field].equal(torch.full((3, 2), value)), field
    assert len({tensor.data_ptr() for tensor in read.values()}) == len(read), "no two fields share memory"


@pytest.mark.parametrize(
    ("without", "options", "fits"),
    [
        ("ema", {"mode": "weights"}, True),
        ("ema", {"mode": "weights+ema"}, False),
        ("ema", {"mode": "weights+ema", "keep_ema": False}, True),
        ("ema", {"mode": "weights", "use_ema": True}, False),
        ("weight", {"mode": "weights", "use_ema": True}, True),
        ("weight", {"mode": "weights"}, False),
        ("exp_avg", {"mode": "weights+ema"}, True),
    ],
)
def test_a_field_that_is_not_stored_is_named_at_once(
    tmp_path: Path, without: str, options: dict[str, object], fits: bool
) -> None:
    reader = save(tmp_path, without=without)
    if fits:
        assert PartialState(reader, **options).read("head.b")["exp_avg"].eq(0).all()  # type: ignore[arg-type]
        return
    with pytest.raises(CheckpointError, match=f"holds no '{without}' of 1 of 2 parameters, the first is 'head.b'"):
        PartialState(reader, **options)  # type: ignore[arg-type]


def save_frozen(root: Path, *fields: str) -> StateReader:
    """``backbone.a`` with the fields, each filled with a number of its own; ``backbone.frozen`` with its weight alone."""
    tensors = {"weight": 1.0, "exp_avg": 2.0, "exp_avg_sq": 3.0, "ema": 4.0}
    learned = {field: torch.tensor(40.0) if field == "step" else torch.full((3, 2), tensors[field]) for field in fields}
    entries = [("backbone.a", learned), ("backbone.frozen", {"weight": torch.full((3, 2), 7.0)})]
    return CheckpointStore.open(CheckpointStore(root).save(1, entries, {}))[1]


def test_what_was_frozen_has_no_average_but_its_weight(tmp_path: Path) -> None:
    reader = save_frozen(tmp_path, "weight", "exp_avg", "exp_avg_sq", "ema", "step")
    assert reader.frozen() == {"backbone.frozen"}
    assert reader.common_fields() == ["weight", "exp_avg", "exp_avg_sq", "ema", "step"]
    for options, weight, ema in (({"use_ema": True}, 4.0, 4.0), ({"mode": "weights+ema"}, 1.0, 4.0)):
        learned = PartialState(reader, **options).read("backbone.a")  # type: ignore[arg-type]
        assert (learned["weight"][0, 0], learned["ema"][0, 0]) == (weight, ema)
        # The new run may train it.
        state = PartialState(reader, **options).read("backbone.frozen")  # type: ignore[arg-type]
        assert set(state) == {"weight", "exp_avg", "exp_avg_sq", "step", "ema"}
        assert (state["weight"][0, 0], state["ema"][0, 0]) == (7.0, 7.0)
        assert state["weight"].data_ptr() != state["ema"].data_ptr()


@pytest.mark.parametrize(("options", "value"), [({}, 1.0), ({"use_ema": True}, 4.0), ({"mode": "weights+ema"}, 1.0)])
def test_what_the_new_run_freezes_has_its_weight_alone(tmp_path: Path, options: dict[str, object], value: float) -> None:
    reader = save_frozen(tmp_path, "weight", "ema")
    state = PartialState(reader, frozen={"backbone.a", "backbone.frozen"}, **options)  # type: ignore[arg-type]
    for name, expected in (("backbone.a", value), ("backbone.frozen", 7.0)):
        read = state.read(name)
        assert set(read) == {"weight"}
        assert read["weight"].eq(expected).all()


def test_a_run_without_averages_has_nothing_frozen_to_hide_behind(tmp_path: Path) -> None:
    reader = save_frozen(tmp_path, "weight", "exp_avg", "exp_avg_sq", "step")
    with pytest.raises(CheckpointError, match=r"holds no 'ema' of 1 of 2 parameters, the first is 'backbone\.a'"):
        PartialState(reader, mode="weights+ema")
    bare = CheckpointStore.open(CheckpointStore(tmp_path / "bare").save(1, [("a", {"weight": torch.ones(2)})], {}))[1]
    assert bare.frozen() == set()
    with pytest.raises(CheckpointError, match="holds no 'ema' of 1 of 1 parameters"):
        PartialState(bare, use_ema=True)


def test_mistakes_are_named(tmp_path: Path) -> None:
    reader = save(tmp_path)
    with pytest.raises(ValueError, match="mode 'everything' is unknown"):
        PartialState(reader, mode="everything")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no parameter 'absent'"):
        PartialState(reader).read("absent")


@pytest.mark.parametrize("ema_decay", [0.9, None])
def test_it_fits_an_optimizer_that_has_done_nothing(tmp_path: Path, ema_decay: float | None) -> None:
    state = PartialState(save(tmp_path), keep_ema=ema_decay is not None)
    parameters = {name: torch.nn.Parameter(torch.zeros(3, 2)) for name in state.names()}
    optimizer = AdamWEMA([{"params": list(parameters.values())}], OptimConfig(ema_decay=ema_decay))
    check_state({name: list(parameter.shape) for name, parameter in parameters.items()}, state)
    for name, parameter in parameters.items():
        copy_state(name, {"weight": parameter.detach(), **optimizer.state[parameter]}, state.read(name))
    assert parameters["head.b"].eq(10.0).all()
