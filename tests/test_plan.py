"""Settings that cannot work together, or would have no effect, are refused before work starts."""

import pytest

from nepa_dist.config import Config
from nepa_dist.plan import cross_field_problems


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"engine": {"name": "zero3", "activation_checkpointing": "selective"}}, "selective with engine.name zero3"),
        ({"engine": {"name": "zero3", "compile": True}}, "engine.compile with engine.name zero3"),
        ({"optim": {"head_lr": 1e-3}}, "optim.head_lr is for fine-tuning; it has no effect on pretrain"),
        ({"task": "segment", "optim": {"head_lr": 1e-3}}, "it has no effect on segment"),
    ],
)
def test_they_are_named(values, text):
    assert [problem for problem in cross_field_problems(Config.model_validate(values)) if text in problem]


def test_what_each_task_takes_passes():
    for values in ({}, {"task": "finetune", "optim": {"head_lr": 1e-3}}, {"task": "segment"}):
        assert cross_field_problems(Config.model_validate(values)) == []
