"""Where weights come from: which of a run's weights, of which step, of which data. Travels in the header of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nepa_dist import __version__
from nepa_dist.checkpoint.manifest import Manifest
from nepa_dist.metrics.sinks import read_curve

Kind = Literal["ema", "raw", "unknown"]
KINDS: dict[Kind, str] = {"ema": "averaged weights", "raw": "raw weights", "unknown": "weights as published"}
"""In words: the moving average, what the optimizer updates, or weights of which nobody says."""

_MARK = "nepa_dist"
"""Key of the version that wrote a header; headers of others have no facts for us."""
_QUALITY = {"loss", "eval_loss", "top1", "top5", "miou", "macc", "aacc", "knn_top1"}


class Result(NamedTuple):
    """One measurement of a run."""

    what: str
    value: float
    step: int


@dataclass(frozen=True)
class Provenance:
    """Facts about weights; None where nobody has recorded it."""

    weights: Kind
    name: str
    """Of the run, or of the folder of published weights."""
    step: int | None = None
    samples_seen: int | None = None
    config_digest: str | None = None
    data_fingerprint: str | None = None
    """Digest of the list of training images."""
    versions: Mapping[str, str] | None = None
    """Packages of the run."""
    results: tuple[Result, ...] = ()

    @property
    def origin(self) -> str:
        """For people: ``step 300, averaged weights``."""
        return ("" if self.step is None else f"step {self.step}, ") + KINDS[self.weights]

    @classmethod
    def of_checkpoint(cls, folder: Path, manifest: Manifest, weights: Kind) -> Provenance:
        """What a checkpoint's manifest says, and the results in the folder of its run."""
        meta = manifest.meta
        run_dir = folder.resolve().parent.parent
        state, config = (meta[key] if isinstance(meta.get(key), dict) else {} for key in ("state", "config"))
        return cls(
            weights,
            str(config.get("name", folder.name)),
            manifest.step,
            state.get("samples_seen"),
            meta.get("config_digest"),
            meta.get("data_fingerprint"),
            meta.get("versions"),
            read_results(run_dir, manifest.step) if folder.resolve().parent.name == "checkpoints" else (),
        )

    def to_metadata(self) -> dict[str, str]:
        """As strings by name, for the header of a safetensors file: texts as they are, the rest as JSON."""
        facts = {key: value for key, value in asdict(self).items() if value is not None and value != ()}
        return {_MARK: __version__} | {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], name: str) -> Provenance:
        """What :meth:`to_metadata` wrote; a header of others says nothing of where the weights come from.

        Args:
            metadata: of the file.
            name: where the header gives none.

        Raises:
            ValueError: a fact is malformed.
        """
        if _MARK not in metadata:
            return cls("unknown", name)
        weights: Any = metadata.get("weights", "unknown")
        if weights not in KINDS:
            raise ValueError(f"weights {weights!r} is none of {', '.join(KINDS)}")
        facts: dict[str, Any] = {key: metadata.get(key) for key in ("config_digest", "data_fingerprint")}
        for key in ("step", "samples_seen", "versions"):
            facts[key] = json.loads(metadata[key]) if key in metadata else None
        facts["results"] = tuple(Result(*row) for row in json.loads(metadata.get("results", "[]")))
        return cls(weights, metadata.get("name", name), **facts)


def read_results(run_dir: Path, step: int) -> tuple[Result, ...]:
    """What is measured in the folder of a run: the last values up to a step in ``metrics.jsonl``, and ``evaluation.json``.

    A file that is not there or cannot be read gives no results; weights can be used without.
    """
    results: list[Result] = []
    try:
        latest: dict[str, Result] = {}
        for row in read_curve(run_dir / "metrics.jsonl"):
            if row["step"] <= step:
                found = [key for key in row if key.partition(".")[0] in _QUALITY]
                latest |= {key: Result(_logged(key), row[key], int(row["step"])) for key in found}
        results += latest.values()
    except (OSError, ValueError):
        pass
    try:
        evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
        results += _evaluation_results(evaluation)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return tuple(results)


def _logged(key: str) -> str:
    return "training loss" if key == "loss" else f"{key}, validation during training"


def _evaluation_results(evaluation: Mapping[str, Any]) -> list[Result]:
    step, kind = int(evaluation["step"]), evaluation["weights"]
    where = f"({kind} weights, held-out images)"
    scores = {**(evaluation.get("objective") or {}), **{key: evaluation[key] for key in _QUALITY & evaluation.keys()}}
    results = [Result(f"{key} {where}", float(value), step) for key, value in scores.items()]
    rows = evaluation.get("trained", [])
    for probe in rows[-1]["top1"] if rows else ():
        best, last = max(rows, key=lambda row: row["top1"][probe]), rows[-1]
        chosen = [last] if best["top1"][probe] == last["top1"][probe] else [best, last]
        name = f"k-NN (k = {probe[4:]})" if probe.startswith("knn_") else f"{probe} probe"
        results += [Result(f"{name} top-1, layer {row['layer']} {where}", float(row["top1"][probe]), step) for row in chosen]
    return results
