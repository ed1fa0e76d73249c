"""The section of the configuration that says where a run executes, the only one that names a site. Imports no torch.

Text of it reaches the batch script of a SLURM job: as a directive, or as a quoted word. So each field has a form, and no field
is shell code; what a site needs beyond this goes into a file of its own (``source``).
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal

from pydantic import Field, field_validator

from nepa_dist.config_base import Section

_NAME = "[A-Za-z0-9_][A-Za-z0-9_.@+-]*"
PATTERNS: dict[str, tuple[str, str]] = {
    "partition": (f"{_NAME}(,{_NAME})*", "letters, digits and _ . @ + -, several with commas"),
    "account": (_NAME, "letters, digits and _ . @ + -"),
    "qos": (_NAME, "letters, digits and _ . @ + -"),
    "constraint": (r"[A-Za-z0-9_\[(][A-Za-z0-9_.@+&|*,:()\[\]-]*", "names of features with & | , ( ) [ ]"),
    "exclude": (r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*", "names of nodes such as node[3,7-9],gpu1"),
    "time": ("([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "minutes, hours:minutes:seconds or days-hours:minutes:seconds"),
    "mem": ("[0-9]+[KMGT]?", "a number with K, M, G or T, such as 16G"),
    "gpu_type": (_NAME, "letters, digits and _ . @ + -"),
    "interface": ("[A-Za-z0-9_][A-Za-z0-9_.:,=^-]*", "names of network interfaces such as ib0"),
    "snapshot": ("[0-9a-f]{64}", "a SHA-256"),
}
"""Field -> (what its text must match as a whole, the same in words)."""
_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_LOOKS_SECRET = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE", re.IGNORECASE)


class ClusterConfig(Section):
    """Where the run executes. The only section that names a site."""

    launcher: Literal["local", "slurm"] = "local"
    nodes: int = Field(1, gt=0)
    gpus_per_node: int = Field(1, gt=0)
    """Processes per node, one per GPU."""
    cpus_per_gpu: int | None = Field(None, gt=0)
    """Cores per process; null: as many as the cluster gives."""
    mem: str | None = None
    """Memory per node, such as 500G; 0 is all of it; null: the cluster's default."""
    time: str | None = None
    """Limit of one job, such as 1-00:00:00; the run is saved before it and goes on in the next one. null: the cluster's."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that the nodes must have."""
    exclude: str | None = None
    """Nodes that must not be used."""
    gpu_type: str | None = None
    """As the cluster names it, where it has several."""
    gpu_memory_gigabytes: float | None = Field(None, gt=0)
    """Of one GPU; what a run needs is compared with it."""
    array_parallelism: int = Field(8, gt=0)
    """Runs of a sweep at a time."""
    signal_seconds: int = Field(180, ge=10, le=3600)
    """Before the time limit, when the ranks are told to save. SLURM may be a minute early."""
    max_stalled_starts: int = Field(4, gt=0)
    """Times in a row that a job comes back without a newer checkpoint; then it ends."""
    modules: tuple[str, ...] = ()
    """For ``module load`` on the node."""
    source: str | None = Field(None, min_length=1)
    """Shell file of the site that the batch script reads first."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the ranks. For secrets see below."""
    inherit: tuple[str, ...] = ()
    """Variables that a job takes from the shell that submits it, beside PATH, HOME and the like; no others come along."""
    secrets: tuple[str, ...] = ()
    """Variables that the ranks read from secrets_file on the node: their values are in no script, log or snapshot."""
    secrets_file: str = Field("~/.config/nepa-dist/secrets", min_length=1)
    """Lines NAME=VALUE, readable by its owner alone."""
    interface: str | None = None
    """Network interface for NCCL and gloo."""
    python: str | None = Field(None, min_length=1)
    """Interpreter of the ranks; null: the one that submits, or ``python`` in a container."""
    container: str | None = Field(None, min_length=1)
    """Image that the ranks run in."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    container_mounts: tuple[str, ...] = ()
    """FOLDER or FOLDER:INSIDE; that of the runs is always there."""
    shared: tuple[str, ...] = ()
    """Folders that all nodes see although their file system does not look like it."""
    snapshot: str | None = None
    """SHA-256 of the code that runs; written by the launcher."""

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.nodes * self.gpus_per_node

    @field_validator("time", "mem", mode="before")
    @classmethod
    def _say_that_it_is_text(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            raise ValueError(f"{value} is a number: quote it, because YAML reads 24:00:00 as 86400")
        return value

    @field_validator(*PATTERNS)
    @classmethod
    def _has_its_form(cls, value: str | None, info: Any) -> str | None:
        pattern, meaning = PATTERNS[info.field_name]
        if value is not None and not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"{value!r}: it must be {meaning}")
        return value

    @field_validator("source", "secrets_file", "python", "container")
    @classmethod
    def _is_plain(cls, value: str | None) -> str | None:
        if value is not None and (is_hostile(value) or value.startswith("-")):
            raise ValueError(f"{value!r} begins with -, or has a control character or a line break")
        return value

    @field_validator("modules", "container_mounts", "shared")
    @classmethod
    def _are_plain(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not value or is_hostile(value) or value.startswith("-") or "," in value:
                raise ValueError(f"{value!r} is empty, begins with -, or has a comma, a control character or a line break")
        return values

    @field_validator("inherit", "secrets")
    @classmethod
    def _are_variables(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not _VARIABLE.fullmatch(value):
                raise ValueError(f"{value!r} cannot name a variable")
        return values

    @field_validator("environment")
    @classmethod
    def _has_no_secrets(cls, values: dict[str, str]) -> dict[str, str]:
        for name, value in values.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a variable")
            if is_hostile(value):
                raise ValueError(f"the value of {name} has a control character or a line break")
            if _LOOKS_SECRET.search(name):
                raise ValueError(
                    f"{name} looks like a secret: put NAME=VALUE into secrets_file and its name into cluster.secrets"
                )
        return values


def is_hostile(text: str) -> bool:
    """Whether a text has control characters, line breaks or bytes that are no UTF-8: no script may hold them."""
    return any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)


def looks_secret(name: str) -> bool:
    """Whether a variable of this name probably holds a secret."""
    return _LOOKS_SECRET.search(name) is not None
