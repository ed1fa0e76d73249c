"""Which metrics are shown together: the overview of the Grafana dashboards and of the HTML report. Imports nothing heavy.

A panel names keys of the registry (or whole families), so what it shows, in which unit and with which help text follows from
there. A panel whose curve must be computed gives PromQL too; the report leaves those out unless it has keys.
"""

from __future__ import annotations

from dataclasses import dataclass

RUN = '{run=~"$run"}'


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: above it.
        keys: of the registry; a family stands for all its values. Counters are shown as rates.
        log: logarithmic y axis.
        queries: PromQL and legend, in place of the keys.
        unit: of the queries, as Grafana spells it; else from the registry.
        when: why the panel may be empty.
    """

    title: str
    keys: tuple[str, ...] = ()
    log: bool = False
    queries: tuple[tuple[str, str], ...] = ()
    unit: str = ""
    when: str = ""


@dataclass(frozen=True)
class Dashboard:
    """A page of panels by row."""

    uid: str
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]


LOSS = Panel("Loss", ("loss", "loss_ema"))
GRAD_NORM = Panel("Gradient norm before clipping", ("grad_norm",), log=True)
RANK = Panel("Effective rank", ("embedding_effective_rank.target", "embedding_effective_rank.pred"), when="pretraining")
COSINE = Panel("Mean cosine", ("embedding_mean_cosine.target", "embedding_mean_cosine.pred"), when="pretraining")
SKILL = Panel("Skill of the prediction", ("prediction_skill_const", "prediction_skill_copy"), when="pretraining")
SPEED = Panel("Images per second", ("images_per_second",))
MFU = Panel("Model FLOPs utilisation", ("mfu",), when="peak known")
PHASES = Panel(
    "Where time goes",
    queries=(
        (
            f"sum by (run, phase) (rate(nepa_time_seconds_total{RUN}[$__rate_interval]))"
            f" / ignoring (phase) group_left () sum by (run) (rate(nepa_time_seconds_total{RUN}[$__rate_interval]))",
            "{{run}} {{phase}}",
        ),
    ),
    unit="percentunit",
)
GOODPUT = Panel("Goodput", ("goodput_ratio",))
PROGRESS = Panel("Progress", queries=((f"nepa_step{RUN} / nepa_planned_steps{RUN}", "{{run}}"),), unit="percentunit")
ALERTS = Panel(
    "Alerts", queries=(('ALERTS{alertname=~"Nepa.*", run=~"$run"}', "{{run}} {{alertname}} {{alertstate}}"),), when="an alert"
)
OVERVIEW = Dashboard(
    "nepa-overview",
    "NEPA: overview",
    (
        ("Learning", (LOSS, GRAD_NORM, Panel("Learning rate", ("lr",)), RANK, COSINE, SKILL)),
        ("Running", (SPEED, MFU, PHASES, GOODPUT, PROGRESS, ALERTS)),
    ),
)
