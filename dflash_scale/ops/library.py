"""The compiled operators, torch.ops.dflash_scale.*: loaded once, by the first module that needs one."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_kernels.so"


def _load_library() -> str | None:
    """Loads the operators; returns why that was not possible, or None."""
    if not LIBRARY.is_file():
        return f"{LIBRARY.name} has not been built"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded ({error})"
    return None


MISSING = _load_library()
# Devices with compiled operators: none without the library, and no GPU where it was built without nvcc.
COMPILED = {
    device.lower(): not MISSING and torch._C._dispatch_has_kernel_for_dispatch_key("dflash_scale::build_plan", device)
    for device in ("CPU", "CUDA")
}


def why_not_compiled(device: str) -> str | None:
    """Why a device type has no compiled operators, or None if it has them."""
    if MISSING:
        return f"{MISSING} (run `pip install -e .` in the repository)"
    return None if COMPILED[device] else f"{LIBRARY.name} was built without nvcc"
