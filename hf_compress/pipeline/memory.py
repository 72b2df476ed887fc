"""The most memory that a part of a run took."""

import sys
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Begins anew: what was taken before does not count. Without an accelerator, that is possible on Linux alone."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        # Resets the mark that VmHWM shows; see proc(5).
        _write("/proc/self/clear_refs", "5")


def peak_memory() -> int | None:
    """Most bytes taken since `reset_peak_memory`, of the accelerator or the process; `None` where nobody counts."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def _write(path: str, content: str) -> None:
    try:
        Path(path).write_text(content)
    except OSError:
        # Some containers forbid it; the peak is then that of the whole process.
        return
