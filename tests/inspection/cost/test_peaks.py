import pytest
import torch

from clip_pgs.inspection.cost.peaks import known_peak, measured_peak


@pytest.mark.parametrize(
    ("name", "is_half", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", True, 312),
        ("NVIDIA A100-PCIE-40GB", False, 156),
        ("NVIDIA H100 80GB HBM3", True, 989.5),
        ("NVIDIA H100 PCIe", True, 756),
        ("NVIDIA H200", True, 989.5),
        ("NVIDIA H200 NVL", True, 835.5),
    ],
)
def test_the_peak_is_that_of_dense_tensor_cores(name, is_half, teraflops):
    peak = known_peak(name, is_half=is_half)
    assert peak.flops == pytest.approx(teraflops * 1e12)
    assert "data sheet" in peak.source


def test_an_unlisted_gpu_has_no_known_peak():
    assert known_peak("NVIDIA GeForce RTX 3090", is_half=True) is None


def test_a_measured_peak_is_a_rate_this_machine_can_have():
    assert 1e8 < measured_peak(torch.device("cpu")).flops < 1e14
