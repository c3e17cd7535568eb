"""Two processes that are killed and told to leave end as two that nothing stopped."""

import shutil
import signal

import pytest

from support.ranks import Stop, output, train_together
from support.resuming import curves, differences, last_checkpoint
from support.runs import flags, run

# Of 32 samples, two at a time in each process: four steps an epoch with accumulation.
VARIANTS = {
    "pgs, adaptive, accumulation, workers": {
        "masking": "pgs",
        "mask_ratio": 0.5,
        "mask_ratio_min": 0.2,
        "accum_freq": 2,
        "workers": 1,
        "epochs": 3,
    },
    "attentive, a teacher, accumulation, then eight steps of unmasked tuning": {
        "masking": "attentive",
        "text_masking": "random",
        "text_tokens": 6,
        "accum_freq": 2,
        "epochs": 1,
        "unmasked_epochs": 1,
        "unmasked_accum_freq": 1,
    },
}


@pytest.mark.slow
def test_three_processes_go_on_bit_by_bit_too(tmp_path, world):
    options = {"train_data": world.train_data, "batch_size": 2, "masking": "random", "epochs": 1}
    whole = flags(tmp_path, name="whole", **options)
    assert train_together(tmp_path, whole, num_processes=3) == [0, 0, 0], output(tmp_path)
    argv = flags(tmp_path, resume="latest", **options)
    asked = Stop(rank=1, step=2, number=signal.SIGUSR1)
    codes = train_together(tmp_path, argv, num_processes=3, trouble=asked)
    assert codes == [85, 85, 85], output(tmp_path)
    assert train_together(tmp_path, argv, num_processes=3) == [0, 0, 0], output(tmp_path)
    folders = [tmp_path / "logs" / name for name in ("run", "whole")]
    assert differences(*map(last_checkpoint, folders)) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_kills_and_signals_change_no_bit(tmp_path, world, variant):
    options = {"train_data": world.train_data, "batch_size": 2, "log_every_n_steps": 3}
    options |= VARIANTS[variant]
    whole = flags(tmp_path, name="whole", **options)
    assert train_together(tmp_path, whole) == [0, 0], output(tmp_path)

    argv = flags(tmp_path, resume="latest", save_every_steps=2, **options)
    killed = Stop(rank=1, step=3, number=signal.SIGKILL)
    assert train_together(tmp_path, argv, trouble=killed) == 2 * [-signal.SIGKILL]
    # All leave, whichever of them was asked to.
    asked = Stop(rank=1, step=5, number=signal.SIGUSR1)
    assert train_together(tmp_path, argv, trouble=asked) == [85, 85], output(tmp_path)
    killed = Stop(rank=0, step=9, number=signal.SIGKILL)
    assert train_together(tmp_path, argv, trouble=killed) == 2 * [-signal.SIGKILL]
    assert train_together(tmp_path, argv) == [0, 0], output(tmp_path)

    folders = [tmp_path / "logs" / name for name in ("run", "whole")]
    assert differences(*map(last_checkpoint, folders)) == []
    assert curves(folders[0]) == curves(folders[1])


@pytest.mark.slow
def test_a_gradient_over_twice_the_processes_is_half_as_large_and_that_is_told(tmp_path, world):
    options = {"train_data": world.train_data, "masking": "random"}
    begun = run(tmp_path, epochs=1, **options)
    options |= {"resume": "latest", "epochs": 2}
    shutil.copytree(begun, begun.with_name("alone"))
    alone = curves(run(tmp_path, name="alone", **options))[4]
    for name, gathers in (("apart", False), ("together", True)):
        folder = shutil.copytree(begun, begun.with_name(name))
        argv = flags(tmp_path, name=name, batch_size=4, gather_with_grad=gathers, **options)
        assert train_together(tmp_path, argv) == [0, 0], output(tmp_path)
        line = curves(folder)[4]
        assert line["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        factor = 1 if gathers else 0.5
        assert line["grad_norm"] == pytest.approx(factor * alone["grad_norm"], rel=1e-3)
        said = (folder / "out.log").read_text()
        assert "in the order that they had, in the same steps" in said
        sentence = "gradients of the contrastive loss are 0.5 times as large from here on"
        assert (sentence in said) != gathers
