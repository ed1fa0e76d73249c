"""The pages of the dashboards beside the overview, which the HTML report shares (:mod:`nepa_dist.metrics.panels`)."""

from __future__ import annotations

from monitoring.throughput import THROUGHPUT, quantile
from nepa_dist.metrics.panels import GOODPUT, GRAD_NORM, LOSS, OVERVIEW, RUN, SKILL, Dashboard, Panel

SCORES = Panel("Validation scores", ("top1", "top5", "miou", "macc", "aacc", "best_score"), when="fine-tuning and segmentation")
DASHBOARDS = (
    OVERVIEW,
    Dashboard(
        "nepa-optimisation",
        "NEPA: optimisation",
        (
            ("Loss", (LOSS, Panel("Loss of the worst rank", ("loss_max",)), Panel("Spikes", ("spike_ratio",)))),
            ("Gradients", (GRAD_NORM, Panel("Gradient norm by group", ("group_grad_norm",), log=True, unit="sci"))),
            (
                "Gradients",
                (
                    Panel("Steps clipped", ("grad_clipped_ratio",)),
                    Panel(
                        "Skipped and not finite",
                        queries=(
                            (f"nepa_skipped_steps_total{RUN}", "{{run}} skipped"),
                            (f"nepa_nonfinite_steps_total{RUN}", "{{run}} {{reason}}"),
                        ),
                        unit="short",
                    ),
                ),
            ),
            (
                "Weights",
                (Panel("Update / weights", ("update_ratio",), log=True), Panel("Norm of the weights", ("param_norm",))),
            ),
            (
                "Inside",
                (
                    Panel("Largest attention logit", ("attention_logit_max",)),
                    Panel(
                        "LayerScale, mean |gamma|", ("layer_scale_abs_mean",), log=True, unit="sci", when="model.layer_scale"
                    ),
                ),
            ),
            (
                "Schedule",
                (
                    Panel("Learning rate", ("lr",)),
                    Panel("Weight decay", ("weight_decay",)),
                    Panel("EMA decay", ("ema_decay",), when="optim.ema_decay"),
                ),
            ),
        ),
    ),
    Dashboard(
        "nepa-collapse",
        "NEPA: collapse",
        (
            (
                "Constant",
                (
                    Panel("Mean cosine", ("embedding_mean_cosine",), when="pretraining"),
                    Panel("Standard deviation of unit vectors", ("embedding_std_ratio",), when="pretraining"),
                    Panel("Uniformity", ("embedding_uniformity",), when="pretraining"),
                ),
            ),
            (
                "Rank",
                (
                    Panel("Effective rank", ("embedding_effective_rank",), when="pretraining"),
                    Panel(
                        "Effective rank / that of the first step",
                        queries=(
                            (
                                f"nepa_embedding_effective_rank{RUN} / nepa_embedding_effective_rank_initial{RUN}",
                                "{{run}} {{tensor}}",
                            ),
                        ),
                        unit="percentunit",
                        when="pretraining",
                    ),
                    Panel("RankMe", ("embedding_rankme",), when="pretraining"),
                ),
            ),
            (
                "Prediction",
                (
                    SKILL,
                    Panel(
                        "Cosine with the target, and with another image's",
                        ("prediction_cosine", "cross_image_cosine"),
                        when="pretraining",
                    ),
                    Panel("Variance of predictions / of targets", ("prediction_variance_ratio",), when="pretraining"),
                ),
            ),
            (
                "Audit",
                (
                    Panel("Future leak", ("future_leak_ratio",), when="pretraining"),
                    Panel("SIGReg statistic", ("embedding_sigreg",), log=True, when="pretraining"),
                    Panel("Root mean square", ("embedding_rms",), when="pretraining"),
                ),
            ),
        ),
    ),
    THROUGHPUT,
    Dashboard(
        "nepa-data",
        "NEPA: data",
        (
            (
                "Waiting",
                (
                    Panel("Wait for a batch per step", ("data_wait_seconds",)),
                    Panel(
                        "Share of the time that waits for data",
                        queries=((f"run:nepa_data_wait:ratio{RUN}", "{{run}}"),),
                        unit="percentunit",
                    ),
                    Panel(
                        "Copies to the device",
                        queries=(
                            (
                                'rate(nepa_time_seconds_total{phase="host_to_device", run=~"$run"}[$__rate_interval])',
                                "{{run}}",
                            ),
                        ),
                        unit="percentunit",
                    ),
                ),
            ),
            (
                "Seen",
                (
                    Panel("Epochs", ("epoch",)),
                    Panel("Images seen", ("samples_seen",)),
                    Panel("Images drawn per second", ("samples_total",)),
                    Panel("Tokens per second", ("tokens_total",)),
                ),
            ),
            (
                "Trouble",
                (
                    Panel("Images that cannot be read", queries=((f"nepa_bad_samples_total{RUN}", "{{run}}"),), unit="short"),
                    Panel("Digest of the data", ("data_digest",)),
                ),
            ),
        ),
    ),
    Dashboard(
        "nepa-checkpoints",
        "NEPA: checkpoints and goodput",
        (
            (
                "Goodput",
                (
                    GOODPUT,
                    Panel(
                        "Restarts and preemptions",
                        queries=(
                            (f"nepa_restarts_total{RUN}", "{{run}} restarts"),
                            (f"nepa_preemptions_total{RUN}", "{{run}} preemptions"),
                        ),
                        unit="short",
                    ),
                    Panel("Steps lost", queries=((f"nepa_lost_steps_total{RUN}", "{{run}}"),), unit="short"),
                    Panel("Productive time per second", ("productive_seconds_total",)),
                ),
            ),
            (
                "Checkpoints",
                (
                    Panel(
                        "Age of the newest checkpoint",
                        queries=(
                            (f"time() - nepa_checkpoint_last_success_timestamp_seconds{RUN}", "{{run}} age"),
                            (f"nepa_checkpoint_interval_seconds{RUN}", "{{run}} interval"),
                        ),
                        unit="s",
                    ),
                    Panel("Time to write", ("checkpoint_seconds",)),
                    Panel("Standing still", ("checkpoint_stall_seconds",)),
                    Panel("Size", ("checkpoint_bytes",)),
                    Panel(
                        "Time to write, 95 %",
                        queries=(
                            (
                                quantile(0.95, "checkpoint_duration_seconds", "increase", "1h"),
                                "{{run}}",
                            ),
                        ),
                        unit="s",
                    ),
                    Panel(
                        "Written and failed",
                        queries=(
                            (f"nepa_checkpoints_total{RUN}", "{{run}} written"),
                            (f"nepa_checkpoint_failures_total{RUN}", "{{run}} failed"),
                        ),
                        unit="short",
                    ),
                    Panel("Newest checkpoint", ("checkpoint_step", "step")),
                ),
            ),
            (
                "Disks",
                (
                    Panel("Free space", ("storage_free_bytes",)),
                    Panel("Size of the file systems", ("storage_size_bytes",)),
                    Panel("Free inodes", ("storage_free_inodes",)),
                ),
            ),
            (
                "Monitoring itself",
                (
                    Panel(
                        "Failed writes to sinks",
                        queries=((f"nepa_sink_failures_total{RUN}", "{{run}} {{sink}}"),),
                        unit="short",
                    ),
                    Panel(
                        "Time to answer a scrape, 99 %",
                        queries=(
                            (
                                quantile(0.99, "scrape_seconds"),
                                "{{run}}",
                            ),
                        ),
                        unit="s",
                    ),
                    Panel(
                        "Requests refused", queries=((f"nepa_scrapes_refused_total{RUN}", "{{run}} {{reason}}"),), unit="short"
                    ),
                ),
            ),
        ),
    ),
    Dashboard(
        "nepa-pipeline",
        "NEPA: pipeline",
        (
            (
                "Stages",
                (
                    Panel(
                        "Progress by stage",
                        queries=(
                            (
                                f"nepa_step{RUN} / nepa_planned_steps{RUN} * on (run) group_left (task, model) nepa_run_info",
                                "{{run}} {{task}} {{model}}",
                            ),
                        ),
                        unit="percentunit",
                    ),
                    Panel("Time to the end", ("eta_seconds",)),
                    Panel(
                        "Time since the first start",
                        queries=((f"time() - nepa_first_start_timestamp_seconds{RUN}", "{{run}}"),),
                        unit="s",
                    ),
                    Panel(
                        "Time since this start", queries=((f"time() - nepa_start_timestamp_seconds{RUN}", "{{run}}"),), unit="s"
                    ),
                    Panel(
                        "Time since the last step",
                        queries=((f"time() - nepa_last_step_timestamp_seconds{RUN}", "{{run}}"),),
                        unit="s",
                    ),
                    Panel("Steps per second", ("steps_total",)),
                ),
            ),
            (
                "Results",
                (
                    LOSS,
                    SCORES,
                    Panel("Validation loss", ("eval_loss",), when="fine-tuning"),
                    Panel("Time of a validation", ("eval_seconds",), when="fine-tuning and segmentation"),
                    Panel("Loss of the auxiliary head", ("aux_loss",), when="segmentation"),
                    Panel("k-NN accuracy", ("knn_top1",), when="metrics.knn_every"),
                    Panel("Regulariser", ("anti_collapse_loss",), when="objective.anti_collapse"),
                ),
            ),
            (
                "Versions",
                (
                    Panel(
                        "Starts",
                        queries=(
                            (f"nepa_run_info{RUN}", "{{run}} {{task}} restart {{restart}} git {{git}} job {{slurm_job_id}}"),
                        ),
                        unit="short",
                    ),
                    Panel(
                        "Versions",
                        queries=((f"nepa_build_info{RUN}", "{{run}} nepa-dist {{version}} torch {{torch}}"),),
                        unit="short",
                    ),
                    Panel("Steps applied", ("applied",)),
                    Panel("Peak that utilisation assumes", ("peak_flops_per_second",), when="peak known"),
                ),
            ),
        ),
    ),
)
