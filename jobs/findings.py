"""What a check looks at, and what it says."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from nepa_dist.config import Config
from nepa_dist.plan import Plan, make_plan


class Finding(NamedTuple):
    """One sentence of one check."""

    kind: Literal["good", "skipped", "note", "problem"]
    """A problem stops the submission, a note does not."""
    text: str
    check: str = ""
    """Name of the check."""


@dataclass(frozen=True)
class Context:
    """A stage whose settings are in order by themselves."""

    args: argparse.Namespace
    config: Config
    num_samples: int | None
    """Training images; None if they are not known."""
    parents: Sequence[Path] = ()
    """Run folders that earlier stages make."""

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.config.run_dir

    @property
    def plan(self) -> Plan:
        """What follows from the settings; the steps are right where the number of images is known."""
        return make_plan(self.config, self.num_samples or self.config.data.expected_num_samples or 1_000_000)

    @property
    def describing(self) -> bool:
        """Whether nothing will be started."""
        return bool(self.args.dry_run or self.args.print or self.args.check)

    @property
    def is_slurm(self) -> bool:
        """Whether the run is to be a job."""
        return self.config.cluster.launcher == "slurm"


Check = Callable[[Context], Iterator[Finding]]


def good(text: str) -> Finding:
    """It is as it should be."""
    return Finding("good", text)


def skipped(text: str) -> Finding:
    """It could not be looked at; the text says why."""
    return Finding("skipped", text)


def note(text: str) -> Finding:
    """The user should know, but may go on."""
    return Finding("note", text)


def problem(text: str) -> Finding:
    """What is wrong; what to do."""
    return Finding("problem", text)


def run_checks(checks: dict[str, Check], context: Context) -> list[Finding]:
    """What the checks say, each with its name; ``--skip-check`` turns those it names into skipped ones."""
    findings: list[Finding] = []
    for name, check in checks.items():
        if name in context.args.skip_check:
            findings.append(Finding("skipped", f"--skip-check {name}", name))
        else:
            findings += [finding._replace(check=name) for finding in check(context)]
    return findings


def counted(number: int) -> str:
    """``no problems``, ``1 problem``, ``2 problems``."""
    return "1 problem" if number == 1 else f"{number or 'no'} problems"


def table(findings: Sequence[Finding]) -> list[str]:
    """One line per finding."""
    marks = {"good": "ok", "skipped": "skipped", "note": "note", "problem": "WRONG"}
    width = max((len(finding.check) for finding in findings), default=0)
    return [f"{marks[finding.kind]:<8} {finding.check:<{width}}  {finding.text}" for finding in findings]
