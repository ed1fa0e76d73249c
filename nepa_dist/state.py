"""All of a run's state that is not a tensor. It rides in the checkpoint's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Where a run stands. The order of the data, the augmentation and the schedules follow from ``step`` alone."""

    step: int = 0
    """Finished optimizer updates, skipped ones included."""
    samples_seen: int = 0
    """Images that went through those updates, over all ranks."""
    skipped_steps: int = 0
    """Updates that were skipped because the gradient was not finite."""
    consecutive_skips: int = 0
    """Skipped updates since the last applied one."""
    restarts: int = 0
    """How often the run was started again."""
    checkpoint_failures: int = 0
    """Checkpoints that could not be written."""
    consecutive_checkpoint_failures: int = 0
    """The same, since the last one that was written."""
    preemptions: int = 0
    """How often a signal stopped the run."""
    productive_seconds: float = 0.0
    """Time of the steps up to this one, without waits for checkpoints and validations."""
    initial_ranks: dict[str, float] = field(default_factory=dict)
    """Effective rank of the embeddings at the run's first step, by label."""
    evaluated_step: int = 0
    """Step of the newest validation."""
    best_score: float | None = None
    """Highest score of a validation so far, of those that can be compared with the ones to come."""
    best_step: int = 0
    """Step of the weights in the run's ``best`` folder."""
    bad_samples: dict[str, str] = field(default_factory=dict)
    """Unreadable images by name, with the reason."""

    def advance(self, num_samples: int) -> None:
        """Count one update over ``num_samples`` images."""
        self.step += 1
        self.samples_seen += num_samples

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """Back from :meth:`to_dict`.

        Raises:
            TypeError: a field is unknown.
        """
        return cls(**values)
