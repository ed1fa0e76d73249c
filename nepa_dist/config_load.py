"""Build a configuration from layers: defaults < YAML files in the order given < ``--set key=value``. Imports no torch.

An unknown key is an error with the nearest known one. All problems are reported together as one :class:`ConfigError`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from nepa_dist.config import Config, ConfigError, nearest
from nepa_dist.plan import cross_field_problems
from nepa_dist.presets import PRESETS

NOT_OFFERED = {
    "engine.offload": "state is not moved to the host: the moving average is optimizer state that updates beside the weights, "
    "and sharding (fsdp2, zero3) frees more at less cost",
}
"""Keys that people look for, and why they are not there."""


def load_config(
    files: Sequence[str | Path] = (), overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Build a configuration from layers: defaults < base < files in order < overrides.

    Args:
        files: YAML files, each a mapping that holds only what it changes.
        overrides: ``a.b=value`` strings; the value is read as YAML.
        base: values below the files (used by the command line for its own options).

    Raises:
        ConfigError: all problems that were found: unreadable files, unknown keys, wrong values, fields that do not fit.
    """
    problems: list[str] = []
    merged: dict[str, Any] = {}
    layers = [("the command line", base or {})]
    for file in files:
        try:
            layers.append((str(file), read_yaml(Path(file))))
        except ConfigError as error:
            problems += error.problems
    for override in overrides:
        try:
            layers.append((f"--set {override}", _parse_override(override)))
        except ConfigError as error:
            problems += error.problems
    for origin, layer in layers:
        problems += _unknown_keys(layer, Config, origin)
        known = _known(layer, Config)
        _forget_preset(merged.get("model", {}), known.get("model", {}).get("preset"))
        _merge(merged, known)
    config: Config | None = None
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        problems += [_explain(item) for item in error.errors()]
    if config:
        problems += [*cross_field_problems(config), *_allow_problems(config)]
    if config is None or problems:
        raise ConfigError(problems)
    return config


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads 1e-4 and 1e3 as numbers (YAML 1.1 would want 1.0e-4)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the SafeLoader reports it
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: 2024-02-30, or a number of 5000 digits


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; empty for an empty file.

    Raises:
        ConfigError: the file cannot be read, is no YAML, gives a key twice, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path} is not a text file in UTF-8"]) from None
    try:
        values = yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader
    except _YAML_ERRORS as error:
        raise ConfigError([f"{path} is not valid YAML: {' '.join(str(error).split())}"]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"{path} must hold a mapping of keys to values, not {type(values).__name__}"])
    return values


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError([f"--set {text}: expected key=value, for example --set optim.base_lr=1e-4"])
    try:
        parsed: Any = yaml.load(value, _StrictLoader)  # noqa: S506 - a SafeLoader
    except _YAML_ERRORS:
        raise ConfigError([f"--set {text}: {value!r} is not a YAML value"]) from None
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def _known(layer: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """A copy of a layer without what _unknown_keys complains about, so that the rest can be checked beside it."""
    known: dict[str, Any] = {}
    for key, value in layer.items():
        field = section.model_fields.get(key)
        if field is None:
            continue
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            known[key] = value
        elif isinstance(value, Mapping):
            known[key] = _known(value, kind)
    return known


def _forget_preset(model: dict[str, Any], preset: Any) -> None:
    """Drop the sizes of earlier layers (a resolved configuration spells them out) when a later one names another preset."""
    if preset is not None and preset != model.get("preset"):
        for name in {key for sizes in PRESETS.values() for key in sizes}:
            model.pop(name, None)


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _unknown_keys(layer: Mapping[str, Any], section: type[BaseModel], origin: str, prefix: str = "") -> list[str]:
    problems = []
    for key, value in layer.items():
        path = f"{prefix}{key}"
        if key not in section.model_fields:
            hint = f": {NOT_OFFERED[path]}" if path in NOT_OFFERED else _nearest_key(str(key), section, prefix)
            problems.append(f"{origin}: unknown key {path!r}{hint}")
            continue
        kind = section.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if isinstance(value, Mapping):
                problems += _unknown_keys(value, kind, origin, f"{path}.")
            else:
                problems.append(f"{origin}: {path} is a section with keys of its own, not a value")
    return problems


def _nearest_key(key: str, section: type[BaseModel], prefix: str) -> str:
    here = nearest(key, section.model_fields, prefix)
    if here:
        return here
    elsewhere = {path.rpartition(".")[2]: path for path in _all_keys(Config)}
    match = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.75) or [k for k in elsewhere if k.endswith(f"_{key}")]
    return f"; did you mean {elsewhere[match[0]]!r}?" if match else ""


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _allow_problems(config: Config) -> list[str]:
    """Sentences about names in ``checkpoint.allow`` that are no setting, or that can never differ."""
    known = {*_all_keys(Config), "data.source"}
    problems = [f"--allow {key}: no such setting{nearest(key, known)}" for key in config.checkpoint.allow if key not in known]
    if "global_batch_size" in config.checkpoint.allow:
        reason = "the place in the data is counted in global batches; start a new run with --init"
        problems.append(f"--allow global_batch_size: {reason}")
    return problems


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    given = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    return f"{where}: {message}{given}" if where else message + given
