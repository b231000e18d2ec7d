"""Ctrl-C at a safe place: between two updates, never inside one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def between_updates() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the yielded function is called, between two updates; a second Ctrl-C acts at once.

    Outside the main thread, where signals cannot be handled, Ctrl-C acts as usual.
    """
    pressed = False

    def note(signum: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ignored() -> Iterator[None]:
    """Let Ctrl-C pass unnoticed for the seconds that it takes to write a report."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
