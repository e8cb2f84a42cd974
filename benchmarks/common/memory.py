"""Memory of a process and of a call, and the number of parameters of a model."""

import ctypes
import gc
import re
from pathlib import Path

import torch

MIB = 2**20


def parameters(model):
    """Number of parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def of_process(name):
    """A size of /proc/self/status in MiB, such as VmRSS."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024


def peak_of(work, device):
    """MiB that a call holds at its peak in addition to what was held before it.

    On a CPU it is read from the process (Linux), whose recorded peak is reset first and whose free
    memory is returned to the system: run `work` once before, so that lasting memory is allocated.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5\n")
    before = of_process("VmRSS")
    work()
    return of_process("VmHWM") - before
