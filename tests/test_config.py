"""The configuration as a user meets it: layers, presets, mistakes in words, what follows from it, and what identifies a run."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nepa_dist.config import Config, ConfigError, changed_keys
from nepa_dist.config_load import load_config
from nepa_dist.plan import make_plan
from nepa_dist.presets import PRESETS

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a YAML file and return its path."""

    def run(text: str, name: str = "layer.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return run


def problems(*overrides: str, files: tuple[Path, ...] = (), base: dict[str, Any] | None = None) -> list[str]:
    """What is wrong with these settings."""
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides, base)
    assert caught.value.problems
    assert all(text in str(caught.value) for text in caught.value.problems)
    return caught.value.problems


# Layers


def test_no_layer_gives_the_defaults() -> None:
    assert load_config() == Config()


def test_later_layers_win_field_by_field(write: Write) -> None:
    base = {"epochs": 1, "seed": 1, "optim": {"eps": 0.1, "weight_decay": 0.1, "base_lr": 0.1}}
    first = write("seed: 2\noptim: {weight_decay: 0.2, base_lr: 0.2}", "first.yaml")
    second = write("seed: 3\noptim: {base_lr: 0.3}", "second.yaml")
    config = load_config([first, second], ["optim.base_lr=0.4", "optim.base_lr=0.5"], base)
    assert (config.epochs, config.seed) == (1, 3)
    assert (config.optim.eps, config.optim.weight_decay, config.optim.base_lr) == (0.1, 0.2, 0.5)


def test_loading_leaves_the_callers_values_alone(write: Write) -> None:
    base = {"data": {"augment": {"flip": 0.1}}, "optim": {"eps": 0.1}}
    before = copy.deepcopy(base)
    config = load_config([write("data: {augment: {flip: 0.9}}\noptim: {eps: 0.2}")], base=base)
    assert (config.data.augment.flip, config.optim.eps) == (0.9, 0.2)
    assert base == before


def test_an_empty_file_changes_nothing(write: Write) -> None:
    assert load_config([write("# only a comment\n")]) == load_config()


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", " 1E-04"])
def test_numbers_may_be_written_in_any_usual_way(text: str, write: Write) -> None:
    assert load_config(overrides=[f"optim.base_lr={text}"]).optim.base_lr == 1e-4
    assert load_config([write(f"optim:\n  base_lr: {text}")]).optim.base_lr == 1e-4


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    assert load_config(overrides=["steps=1e3"]).steps == 1000


def test_null_takes_an_option_back() -> None:
    config = load_config(overrides=["steps=5", "steps=null", "optim.ema_decay=null"])
    assert config.steps is None
    assert config.optim.ema_decay is None


def test_the_configuration_does_not_change_after_loading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().seed = 3  # type: ignore[misc]


def test_a_preset_fills_the_size_and_given_fields_win(write: Write) -> None:
    config = load_config([write("model: {preset: vit_l}")], ["model.depth=3", "model.gated_mlp=false"])
    assert (config.model.embed_dim, config.model.num_heads, config.model.depth) == (1024, 16, 3)
    assert not config.model.gated_mlp
    assert config.model.preset == "vit_l"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_survives_a_round_trip(name: str, write: Write) -> None:
    config = load_config(overrides=[f"model.preset={name}", "model.qk_norm=false"])
    again = load_config([write(config.to_yaml())])
    assert again == config
    assert again.digest() == config.digest()


@settings(deadline=None)
@given(
    steps=st.none() | st.integers(1, 10**9),
    lr=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    source=st.none() | st.text(min_size=1).filter(lambda text: text.isprintable()),
    flip=st.floats(0, 1),
)
def test_yaml_round_trip_of_any_values(
    steps: int | None, lr: float, betas: tuple[float, float], source: str | None, flip: float
) -> None:
    base = {"steps": steps, "optim": {"base_lr": lr, "betas": betas}, "data": {"source": source, "augment": {"flip": flip}}}
    config = load_config(base=base)
    assert load_config(base=yaml.safe_load(config.to_yaml())) == config


# Mistakes


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("sead", "seed"),
        ("optim.base_lrr", "optim.base_lr"),
        ("optim.lr", "optim.base_lr"),
        ("prefetch_batches", "data.prefetch_batches"),
        ("model.rope_thetha", "model.rope_theta"),
        ("data.augment.flipp", "data.augment.flip"),
        ("optimizer.base_lr", "optim"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(key: str, suggestion: str, write: Write) -> None:
    (problem,) = problems(f"{key}=1")
    assert f"did you mean {suggestion!r}" in problem
    head, _, tail = key.rpartition(".")
    nested = {tail: 1}
    for part in reversed(head.split(".") if head else []):
        nested = {part: nested}  # type: ignore[dict-item]
    (problem,) = problems(files=(write(yaml.safe_dump(nested), "mine.yaml"),))
    assert "mine.yaml" in problem
    assert f"did you mean {suggestion!r}" in problem


WRONG_VALUES = [
    ("steps=0", "steps"),
    ("steps=-1", "steps"),
    ("steps=1.5", "steps"),
    ("steps=[1]", "steps"),
    ("seed=-1", "seed"),
    ("seed=true", "seed"),
    ("epochs=yes", "epochs"),
    ("epochs=.inf", "epochs"),
    ("epochs=1e308", "epochs"),
    ("optim.base_lr=.nan", "optim.base_lr"),
    ("optim.base_lr=fast", "optim.base_lr"),
    ("optim.ema_decay=1", "optim.ema_decay"),
    ("optim.ema_decay=false", "optim.ema_decay"),
    ("optim.clip_grad_norm=0", "optim.clip_grad_norm"),
    ("optim.betas=[0.9, 1.0]", "optim.betas"),
    ("optim.betas=[-0.1, 0.9]", "optim.betas"),
    ("optim.betas=[0.9]", "optim.betas"),
    ("optim.betas=0.9", "optim.betas"),
    ("optim.min_lr=1", "optim.min_lr"),
    ("optim=3", "optim"),
    ("optim.eps.x=1", "optim.eps"),
    ("data.std=[0, 1, 1]", "data.std"),
    ("data.mean=[0.5, 0.5]", "data.mean"),
    ("data.source=''", "data.source"),
    ("data.source=5", "data.source"),
    ("data.augment.scale=[0.5, 0.2]", "scale"),
    ("data.augment.scale=[0, 1]", "scale"),
    ("data.augment.scale=[0.5, 1.5]", "scale"),
    ("data.augment.ratio=[2, 1]", "ratio"),
    ("data.augment.flip=1.1", "data.augment.flip"),
    ("data.augment.crop=middle", "data.augment.crop"),
    ("objective.shift=2", "objective.shift"),
    ("objective.mask_ratio=1", "objective.mask_ratio"),
    ("objective.mask_ratio=0.001", "none of the 256 patches"),
    ("objective.mask_ratio=0.999", "all of the 256 patches"),
    ("engine.precision=fp16", "engine.precision"),
    ("name=a/b", "name"),
    ("name=../up", "name"),
    ("name=''", "name"),
    ("name=no", "name"),
    ("name=2024-13-45", "2024-13-45"),
    ("task=dance", "task"),
    ("model.preset=vit_xl", "vit_xl"),
    ("model.preset=5", "preset"),
    ("model.preset=[vit_b]", "preset"),
    ("model.num_heads=0", "model.num_heads"),
    ("model.num_heads=5", "multiple of num_heads 5"),
    ("model.embed_dim=18", "head width"),
    ("model.patch_size=0", "model.patch_size"),
    ("model.image_size=225", "nearest: 224 or 238"),
    ("model.image_size=7", "nearest: 14"),
    ("model.in_channels=1", "model.in_channels"),
    ("model.drop_path=1", "model.drop_path"),
    ("model={gated_mlp: false, mlp_ratio: 0.0001}", "mlp_ratio"),
    ("optim={eps: 0.1, eps: 0.2}", "optim"),
    ("steps=" + "9" * 5000, "steps"),
    ("steps=" + "[" * 5000, "steps"),
    ("steps=!!python/object/apply:os.getpid []", "steps"),
    ("steps", "key=value"),
    ("=3", "key=value"),
    ("", "key=value"),
    (".=3", "unknown key"),
    ("optim.=3", "unknown key"),
]


@pytest.mark.parametrize(("override", "words"), WRONG_VALUES, ids=[text[:40] for text, _ in WRONG_VALUES])
def test_a_wrong_value_is_one_problem_that_names_it(override: str, words: str) -> None:
    (problem,) = problems(override)
    assert words in problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "mapping"),
        ("just text", "mapping"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("optim:\n  eps: 1\n  eps: 2", "'eps' is given twice"),
        ("optim:\n\teps: 1", "not valid YAML"),
        ("seed: [1", "not valid YAML"),
        ("seed: 1\n---\nseed: 2", "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("name: 2024-02-30", "not valid YAML"),
        ("seed: !!python/object/apply:os.getpid []", "not valid YAML"),
        ("optim:\n", "optim is a section"),
        ("optim: 3", "optim is a section"),
        ("1: 2", "unknown key '1'"),
        ("seed: 2024-01-01", "seed"),
    ],
)
def test_a_wrong_file_is_one_problem(text: str, words: str, write: Write) -> None:
    (problem,) = problems(files=(write(text),))
    assert words in problem


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    found = problems(files=(tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"))
    assert len(found) == 3
    for problem, words in zip(found, ("No such file", "directory", "UTF-8"), strict=True):
        assert words in problem


def test_all_problems_are_reported_together(tmp_path: Path, write: Write) -> None:
    found = problems(
        "foo=1",
        "steps=-1",
        "data.augment.scale=[2, 3]",
        "data.augment.ratio=[3, 2]",
        "model.image_size=225",
        "bad",
        files=(tmp_path / "none.yaml", write("optim: {wrong: 1, eps: 0}")),
    )
    for words in ("foo", "steps", "scale", "ratio", "225", "--set bad", "none.yaml", "optim.wrong", "optim.eps"):
        assert any(words in problem for problem in found), words


def test_problems_between_fields_are_reported_beside_an_unknown_key() -> None:
    found = problems("foo=1", "cluster.nodes=3", "optim.warmup_steps=9", "steps=8")
    for words in ("foo", "global_batch_size 4096", "optim.warmup_steps 9"):
        assert any(words in problem for problem in found), words


@given(
    key=st.sampled_from(["steps", "name", "optim", "optim.eps", "model.preset", "data.mean", "x", "seed"]),
    value=st.text(max_size=20),
)
def test_any_text_is_a_value_or_a_config_error(key: str, value: str) -> None:
    with contextlib.suppress(ConfigError):  # any other exception fails the test
        load_config(overrides=[f"{key}={value}"])


# What follows: batch, steps, learning rate


@given(
    share=st.integers(1, 500),
    nodes=st.integers(1, 16),
    gpus=st.integers(1, 8),
    samples=st.integers(1, 10**7),
)
def test_the_plan_uses_each_image_of_the_global_batch_once(share: int, nodes: int, gpus: int, samples: int) -> None:
    world = nodes * gpus
    config = load_config(base={"global_batch_size": share * world, "cluster": {"nodes": nodes, "gpus_per_node": gpus}})
    plan = make_plan(config, samples)
    assert plan.micro_batch_size * plan.grad_accum_steps * world == config.global_batch_size
    assert plan.micro_batch_size <= 128
    assert plan.steps >= 1
    assert 0 <= plan.warmup_steps <= plan.steps


def test_the_plan_of_the_paper() -> None:
    plan = make_plan(load_config(overrides=["epochs=1600", "cluster.nodes=8", "cluster.gpus_per_node=8"]), 1_281_167)
    assert (plan.steps, plan.micro_batch_size, plan.grad_accum_steps, plan.num_tokens) == (500_456, 64, 1, 256)
    assert plan.peak_lr == pytest.approx(4.8e-3)
    assert plan.warmup_steps == 12_511


def test_given_numbers_win_over_ratios() -> None:
    plan = make_plan(load_config(overrides=["steps=10", "optim.warmup_steps=4", "micro_batch_size=32"]), 50)
    assert (plan.steps, plan.warmup_steps, plan.micro_batch_size, plan.grad_accum_steps) == (10, 4, 32, 128)


def test_a_warm_up_longer_than_the_run_is_an_error() -> None:
    config = load_config(overrides=["epochs=1", "global_batch_size=10", "optim.warmup_steps=11"])
    assert make_plan(config, 110).warmup_steps == 11
    with pytest.raises(ConfigError, match=r"warmup_steps 11 .* 10 steps"):
        make_plan(config, 100)


def test_no_images_are_an_error() -> None:
    with pytest.raises(ConfigError, match="no images"):
        make_plan(load_config(), 0)


@pytest.mark.parametrize(
    ("overrides", "near"),
    [
        (["cluster.nodes=3", "cluster.gpus_per_node=8"], ["4080", "4104"]),
        (["cluster.nodes=8", "cluster.gpus_per_node=8", "micro_batch_size=128"], ["8192", "micro_batch_size: 32 or 64"]),
        (["global_batch_size=4", "cluster.gpus_per_node=8"], ["8"]),
        (["global_batch_size=96", "micro_batch_size=64"], ["64 or 128", "micro_batch_size: 32 or 48"]),
    ],
)
def test_a_batch_that_does_not_divide_names_values_that_do(overrides: list[str], near: list[str]) -> None:
    (problem,) = problems(*overrides)
    for words in near:
        assert words in problem


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ([], 256),
        (["objective.shift=false"], 257),
        (["objective.causal=false"], 257),
        (["objective.drop_last_token=false"], 257),
    ],
)
def test_the_last_token_is_left_out_only_where_nothing_sees_it(overrides: list[str], tokens: int) -> None:
    assert make_plan(load_config(overrides=overrides), 10).num_tokens == tokens


# What identifies a run


PLACE_AND_REPORTING = """name=other run_root=elsewhere cluster.nodes=2 checkpoint.every=7 metrics.every=7 micro_batch_size=32
    data.source=/moved data.num_workers=3 data.expected_num_samples=5 engine.timeout_seconds=5 engine.device=cpu"""


@pytest.mark.parametrize("override", PLACE_AND_REPORTING.split())
def test_settings_of_place_and_reporting_do_not_identify_a_run(override: str) -> None:
    changed = load_config(overrides=[override])
    assert changed != load_config()
    assert changed.digest() == load_config().digest()
    assert changed_keys(load_config().model_dump(mode="json"), changed) == []


NUMBERS = """seed=1 steps=5 global_batch_size=8 model.depth=3 objective.shift=false data.augment.flip=0.1 data.mean=[0,0,0]
    optim.base_lr=1 engine.precision=fp32 engine.reduce_dtype=bf16 engine.fp8=rowwise"""


@pytest.mark.parametrize("override", NUMBERS.split())
def test_settings_that_shape_the_numbers_identify_a_run(override: str) -> None:
    changed = load_config(overrides=[override])
    assert changed.digest() != load_config().digest()
    ((name, old, new),) = changed_keys(load_config().model_dump(mode="json"), changed)
    assert name == override.split("=")[0]
    assert old != new


def test_the_digest_depends_on_values_not_on_how_they_were_given(write: Write) -> None:
    assert load_config([write("epochs: 3")]).digest() == load_config(overrides=["epochs=3.0"]).digest()


def test_keys_that_one_side_lacks_are_told() -> None:
    saved = load_config().model_dump(mode="json")
    del saved["optim"]["eps"]
    saved["optim"]["old_option"] = 5
    assert sorted(changed_keys(saved, load_config())) == [("optim.eps", None, 1e-8), ("optim.old_option", 5, None)]
