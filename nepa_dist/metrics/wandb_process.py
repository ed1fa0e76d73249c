"""The process that talks to Weights & Biases for a run; started by :class:`nepa_dist.metrics.trackers.WandbSink`.

Reads one JSON object a line: first what ``wandb.init`` is to be called with, then steps with their values, at last an empty
one. Answers each with a line: empty, or what went wrong. Imports nothing of the project.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

END_SECONDS = 60
"""How long it may go on after the trainer is gone."""


def main() -> None:
    """Serve the trainer until it says that this is the end, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the trainer decides when it is over
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the library prints is no answer
    run: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if run is None:
                run = _begin(message)
            elif message:
                run.log(message["values"], step=message["step"])
            else:
                run.finish()
        except Exception as error:
            answers.write(" ".join(f"{type(error).__name__}: {error}".split()) + "\n")
            if run is None:
                return
        else:
            answers.write("\n")
        if not message:
            return
    signal.alarm(END_SECONDS)  # ends this process
    if run is not None:
        run.finish(exit_code=1)


def _begin(arguments: dict[str, Any]) -> Any:
    import wandb

    # It leaves the terminal alone and asks nobody for a key.
    settings = wandb.Settings(console="off", silent=True, login_timeout=5, init_timeout=300)
    return wandb.init(resume="allow", settings=settings, **arguments)


if __name__ == "__main__":
    main()
