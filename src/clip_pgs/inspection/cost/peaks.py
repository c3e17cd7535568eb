"""How many floating-point operations a second a device can do at most."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch

from clip_pgs.inspection.cost.stopwatch import Stopwatch


@dataclass(frozen=True)
class Peak:
    """A device's highest rate.

    Args:
        flops: Operations per second.
        source: Where the number comes from.
    """

    flops: float
    source: str


# Tensor cores without sparsity in TFLOP/s, at 16 bits and at TF32, by what the driver calls the
# device; the first that fits. NVIDIA's data sheets give the sparse rate, which is twice as high.
_TENSOR_CORES = (
    ("H200 NVL", 835.5, 417.5, "NVIDIA H200 data sheet (NVL)"),
    ("H200", 989.5, 494.5, "NVIDIA H200 data sheet (SXM)"),
    ("H100 NVL", 835.5, 417.5, "NVIDIA H100 data sheet (NVL)"),
    ("H100 PCIe", 756.0, 378.0, "NVIDIA H100 data sheet (PCIe)"),
    ("H100", 989.5, 494.5, "NVIDIA H100 data sheet (SXM)"),
    ("A100", 312.0, 156.0, "NVIDIA A100 data sheet"),
)

_SIDE, _REPEATS = 1536, 5


def known_peak(device_name: str, *, is_half: bool) -> Peak | None:
    """Return a GPU's peak out of its data sheet, None for one that is not listed.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it.
        is_half: Whether matrix products run at 16 bits; else they count as TF32.
    """
    for name, half, tf32, source in _TENSOR_CORES:
        if name in device_name:
            return Peak(1e12 * (half if is_half else tf32), source)
    return None


def measured_peak(device: torch.device, *, dtype: torch.dtype = torch.float32) -> Peak:
    """Measure the rate of a large matrix product, with as many threads as torch uses now."""
    factor = torch.randn(_SIDE, _SIDE, device=device, dtype=dtype)
    seconds: list[float] = []
    for _ in range(_REPEATS + 1):
        stopwatch = Stopwatch(device)
        factor @ factor
        stopwatch.mark()
        seconds += stopwatch.parts()
    # The first one warms up.
    rate = 2 * _SIDE**3 / median(seconds[1:])
    return Peak(rate, f"measured, a product of {_SIDE} x {_SIDE} matrices")
