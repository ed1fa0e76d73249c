"""The engine: how a task is placed on devices, stepped and saved. The loop knows only these eight members.

An engine holds no schedule, no logging, no data and no files. What requires no gradient when it is built is
frozen: it is placed and saved like the rest, but is in no group, norm or average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass

ParameterState = Mapping[str, Tensor]
"""State of one parameter: ``weight``, ``exp_avg``, ``exp_avg_sq``, ``step``, and ``ema`` where one is kept; ``weight`` alone of
one that is frozen. Full tensors in fp32."""


class StepResult(NamedTuple):
    """What one optimizer update did; all of it stays on the device."""

    grad_norm: Tensor
    """Global L2 norm before clipping, 0-d fp32."""
    applied: Tensor
    """1 if the weights moved, 0 if the step was skipped because the norm was not finite; 0-d fp32."""
    gauges: Mapping[str, Tensor] = {}
    """Of an observed step, by metric name; see :class:`nepa_dist.engines.census.Census`."""


class NamedStateSource(Protocol):
    """Where a checkpoint's tensors are read from."""

    def names(self) -> list[str]:
        """Names of all parameters."""
        ...

    def read(self, name: str) -> dict[str, Tensor]:
        """Full state of one parameter."""
        ...


class Engine(Protocol):
    """Places and steps one task."""

    @property
    def model(self) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
        """Callable root: a micro-batch in, the loss and logs out, in the run's precision."""
        ...

    @property
    def param_groups(self) -> Sequence[dict[str, Any]]:
        """Groups whose ``lr`` the loop sets, for their ``layer``; see :func:`nepa_dist.optim.param_groups`."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss / grad_accum_steps``; at the last micro-batch, average it over the ranks."""
        ...

    def step(self, *, observe: bool = False) -> StepResult:
        """Clip, update weights and averages unless the norm is not finite, clear the gradients.

        Args:
            observe: take the gauges of the step as well.
        """
        ...

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """Full state of every parameter, one at a time. A collective: all ranks iterate to the end."""
        ...

    def load_named_state(self, source: NamedStateSource, *, keep_average: bool = False) -> None:
        """Set every parameter's state. A collective.

        Args:
            source: the state.
            keep_average: the averages go on from what is loaded also where no update is counted yet; otherwise they begin
                as a copy of the weights after the first one.

        Raises:
            StateMismatchError: names differ (all are listed, nothing has changed), or the shape of one parameter.
        """
        ...

    def weights(self, *, ema: bool) -> AbstractContextManager[None]:
        """Within the context, the model holds its averaged weights (``ema``) or its own."""
        ...

    def close(self) -> None:
        """Let go of the model and of whatever the engine holds."""
        ...


class StateMismatchError(ValueError):
    """A checkpoint that does not fit the model."""


def check_state(expected: Mapping[str, Sequence[int]], source: NamedStateSource) -> None:
    """Compare names before anything is changed.

    Args:
        expected: parameter name to shape.
        source: the checkpoint.

    Raises:
        StateMismatchError: a parameter is missing or unknown.
    """
    given = set(source.names())
    problems = [f"missing in the checkpoint: {name} {list(shape)}" for name, shape in expected.items() if name not in given]
    problems += [f"unknown to the model: {name}" for name in sorted(given - set(expected))]
    if problems:
        raise StateMismatchError("\n".join(["the checkpoint does not fit the model:", *(f"  - {p}" for p in problems)]))


def check_fields(name: str, expected: Mapping[str, Sequence[int]], state: ParameterState) -> None:
    """Compare one parameter's state with what the model has.

    Args:
        name: of the parameter.
        expected: field to shape of the full tensor.
        state: from the checkpoint.

    Raises:
        StateMismatchError: a field is missing, left over or of another shape.
    """
    if set(expected) != set(state):
        needs = f"{name}: the checkpoint holds {sorted(state)}, this run needs {sorted(expected)}"
        raise StateMismatchError(f"{needs}; {_advice(set(expected), set(state))}")
    for field, shape in expected.items():
        if list(shape) != list(state[field].shape):
            raise StateMismatchError(
                f"{name}: {field} is {list(state[field].shape)} in the checkpoint and {list(shape)} in the model"
            )


def _advice(needed: set[str], stored: set[str]) -> str:
    weights = "begin a new run with its weights (--init, --load weights)"
    if needed == {"weight"}:
        return f"it is frozen here and was not there: freeze what was frozen, or {weights}"
    if stored == {"weight"}:
        return f"it was frozen there and is not here: freeze what was frozen, or {weights}"
    return weights if "exp_avg" not in stored else "set optim.ema_decay as it was"


def copy_state(name: str, into: Mapping[str, Tensor], state: ParameterState) -> None:
    """Copy one parameter's state in place.

    Raises:
        StateMismatchError: see :func:`check_fields`.
    """
    check_fields(name, {field: tensor.shape for field, tensor in into.items()}, state)
    with torch.no_grad():
        for field, tensor in into.items():
            tensor.copy_(state[field])


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Global L2 norm of the gradients, 0-d fp32."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).float()
