"""Numeric precision of a run on its device."""

from __future__ import annotations

import logging

import torch

_logger = logging.getLogger(__name__)


def supported_precision(precision: str, device: torch.device) -> str:
    """Return the precision a device trains in when `precision` is asked for.

    Float16 autocast ("amp", OpenCLIP's default) is for GPUs: on a CPU it is slower than float32
    and loses range, so the CPU trains in float32 and the log says so.
    """
    if precision == "amp" and device.type == "cpu":
        _logger.warning("--precision amp needs a GPU: training in fp32 on the CPU")
        return "fp32"
    return precision


def create_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the loss scaler that float16 autocast needs, or None for any other precision."""
    return torch.amp.GradScaler(device.type) if precision == "amp" else None
