"""What command lines share. Imports no torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence


def joined(argv: Sequence[str] | None) -> list[str]:
    """Join options to values that begin with a negative number: ``--layers -1,final`` becomes ``--layers=-1,final``.

    :mod:`argparse` would take such a value for an option.

    Args:
        argv: words of the command line; default: those of this process.
    """
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if words and re.match(r"-\d", word) and re.fullmatch(r"--\w[\w-]*", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words
