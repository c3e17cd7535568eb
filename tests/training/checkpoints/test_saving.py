"""When a run saves."""

import pytest

from support.runs import run


@pytest.mark.parametrize(
    ("is_measured", "expected"),
    [
        (False, ["epoch_1.pt", "epoch_2.pt", "step_2.pt", "step_6.pt"]),
        # What is measured in between may take long.
        (True, ["epoch_1.pt", "epoch_2.pt", "step_4.pt", "step_6.pt", "step_8.pt"]),
    ],
)
def test_the_end_of_an_epoch_is_saved_once(tmp_path, world, is_measured, expected):
    val_data = world.val_data if is_measured else None
    options = {"save_every_steps": 2, "keep_checkpoints": 3, "val_data": val_data}
    folder = run(tmp_path, train_data=world.train_data, **options)
    saved = sorted(path.name for path in (folder / "checkpoints").glob("*.pt"))
    assert saved == expected
    text = (folder / "out.log").read_text()
    assert text.count("Saved step_4.pt") == int(is_measured)


def test_an_epoch_without_a_file_of_its_own_keeps_that_of_its_last_step(tmp_path, world):
    options = {"save_every_steps": 4, "save_frequency": 0}
    folder = run(tmp_path, train_data=world.train_data, **options)
    saved = sorted(path.name for path in (folder / "checkpoints").glob("*.pt"))
    assert saved == ["epoch_2.pt", "step_4.pt"]
