import pytest

from clip_pgs.integrations.open_clip.model_config import usable_device


@pytest.mark.parametrize("name", ["meta", "warp", "cuda:99", "cpu:1"])
def test_a_device_that_is_not_there_or_computes_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"^--device {name} is not available"):
        usable_device(name)
    assert usable_device("cpu").type == "cpu"
