"""Peak tensor memory of an optimiser: what its model, state, mini-batch and temporaries take at once."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors alive at one time that `run` allocated.

    On CUDA the allocator's own peak. On the CPU, where none is kept, every allocation and release is recorded by
    PyTorch's profiler and added up in order, temporaries inside operators included: exact, and too slow to be done
    during a race.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _without_native_messages():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = run()  # kept alive until the end: its release is not part of the run
        del result
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    if results is None:
        raise RuntimeError("PyTorch's profiler recorded nothing")
    # nbytes is missing from PyTorch's stubs: negative for a release.
    changes = [
        (event.start_ns(), event.nbytes())  # pyrefly: ignore[missing-attribute]
        for event in results.events()
        if event.name() == "[memory]"
    ]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        peak = max(peak, alive)
    return peak


@contextlib.contextmanager
def _without_native_messages() -> Iterator[None]:
    """Hide what the profiler's C++ side prints to the error stream (a warning for each older tensor released)."""
    try:
        stream = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
        sys.stderr.flush()
        kept = os.dup(stream)
    except (OSError, ValueError):  # no such stream
        yield
        return
    try:
        with open(os.devnull, "w", encoding="utf-8") as null:
            os.dup2(null.fileno(), stream)
        yield
    finally:
        os.dup2(kept, stream)
        os.close(kept)
