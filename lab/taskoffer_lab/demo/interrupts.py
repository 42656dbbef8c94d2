"""Ctrl-C at any moment: SIGTERM and SIGHUP count as well, and some moments cannot be interrupted."""

import contextlib
import signal
from collections.abc import Iterator

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def every_end_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP too, so that they take everything down like Ctrl-C."""
    with _handling(signal.default_int_handler):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore interrupts while things are taken down, which takes seconds.

    The handler does nothing instead of being SIG_IGN, which programs started meanwhile would inherit.
    """
    with _handling(lambda _number, _frame: None):
        yield


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Hold an interrupt back to the end of the body, so that what the body starts is never lost from sight."""
    came: list[int] = []
    with _handling(lambda number, _frame: came.append(number)):
        yield
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handling(handler: "signal._HANDLER") -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
