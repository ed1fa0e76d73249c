"""Names of classes in a ``config.json``, under the names that the field gives them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ID2LABEL, LABEL2ID = "id2label", "label2id"


def write_labels(names: Sequence[str]) -> dict[str, Any]:
    """The settings that keep the names of classes: ``id2label`` by number, ``label2id`` by name where no name comes twice.

    Args:
        names: in the order of the classes; none give no settings.
    """
    settings: dict[str, Any] = {ID2LABEL: {str(index): name for index, name in enumerate(names)}} if names else {}
    if len(set(names)) == len(names) > 0:
        settings[LABEL2ID] = {name: index for index, name in enumerate(names)}
    return settings


def read_labels(settings: Mapping[str, Any], num_classes: int | None) -> tuple[str, ...]:
    """The names in ``id2label``, in the order of the classes; none if it is not there.

    Raises:
        ValueError: it does not name each class.
    """
    found = settings.get(ID2LABEL)
    if found is None:
        return ()
    wanted = [str(index) for index in range(num_classes or 0)]
    if not isinstance(found, Mapping) or set(found) != set(wanted) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{ID2LABEL} must name the classes of the model, which are {len(wanted)}")
    return tuple(found[index] for index in wanted)
