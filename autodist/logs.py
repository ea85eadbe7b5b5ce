"""Logging: ``AUTODIST_LOGS`` sets the level ("debug", "info", "warning", "error"; default "info").

Messages go to stderr; those that concern all ranks alike are logged by the first rank alone.
"""

from __future__ import annotations

import logging
import os
import sys

_LEVELS = ("debug", "info", "warning", "error")
log = logging.getLogger("autodist")


class _Stderr(logging.Handler):
    """To wherever stderr goes when the message is written: notebooks and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def configure() -> None:
    """Set the level from the environment; an unknown level is an error that names the legal ones."""
    level = os.environ.get("AUTODIST_LOGS", "info").lower()
    if level not in _LEVELS:
        raise ValueError(f"AUTODIST_LOGS must be one of {', '.join(_LEVELS)}; got {level!r}")
    if not log.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("autodist: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(level.upper())
