"""Tells Orbax's errors apart: damaged files, a disk that refuses, and all others."""

from __future__ import annotations

import logging
import re
import sys

from pspo_jax.checkpoint import damage
from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.system.buckets import Place
from pspo_jax.system.storage import StorageError, os_reason

_RAISED = (ValueError, OSError, KeyError, TypeError, RuntimeError, AttributeError)
_DECODING = re.compile("^(DATA_LOSS|OUT_OF_RANGE|FAILED_PRECONDITION|NOT_FOUND|INVALID_ARGUMENT)|Error decoding")
"""How TensorStore's messages begin where it cannot decode the bytes that it read."""


def raised() -> tuple[type[Exception], ...]:
    """Types that Orbax and TensorStore raise on files that are missing, cut off or altered, and for other reasons.

    Once a bucket is used, these include the types of its client.
    """
    if "gcsfs" not in sys.modules:
        return _RAISED
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    return (*_RAISED, HttpError, ClientError, GoogleAuthError, GoogleAPIError)


def silence_orbax() -> None:
    """Keep Orbax from printing errors of its threads: they reach the caller too.

    TensorStore also answers event loops that Orbax has closed after a first error. The RuntimeError that this raises
    reaches the hook set here, or `sys.excepthook`, which `command_line.run` sets.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("fsspec").setLevel(logging.CRITICAL)
    before = sys.unraisablehook
    if getattr(before, "__module__", None) == __name__:
        return

    def without_late_answers(event: sys.UnraisableHookArgs) -> None:
        if not (isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"):
            before(event)

    sys.unraisablehook = without_late_answers


def classified(error: Exception, path: Place) -> Exception:
    """The error to raise in place of Orbax's.

    It is a DamageError if files are damaged, a StorageError if the disk is the reason, and else the error itself.
    """
    reason, certain = damage.complaint(path)
    if reason is not None:
        return DamageError(reason)
    if os_reason(error) is not None:
        return StorageError(f"{path}: cannot be read now ({os_reason(error)}); it is left as it is")
    last: BaseException = error
    while last.__cause__ is not None:
        last = last.__cause__
    if not certain and (isinstance(last, FileNotFoundError) or _DECODING.search(str(last))):
        return DamageError(" ".join(str(last).split())[:200])
    return error
