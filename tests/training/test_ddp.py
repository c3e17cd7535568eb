"""Two processes on the CPU: gradients, runs, and torchrun over two nodes."""

import socket

import pytest
import torch

from support import ddp_gradients
from support.gradients import relative_difference, step_gradients
from support.processes import torchrun
from support.ranks import output, run_together
from support.runs import COCA, flags, run, write_model, write_shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    write_model(folder)
    write_model(folder, name="tiny_coca", config=COCA)
    return folder


@pytest.fixture(scope="module")
def parallel_gradients(folder):
    assert run_together(ddp_gradients.main, folder) == [0, 0], output(folder)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("case", ddp_gradients.CASES)
def test_two_ranks_with_accumulation_equal_one_process(folder, parallel_gradients, case):
    options, model = ddp_gradients.CASES[case]
    expected, _ = step_gradients(folder / f"{model}.json", **options)
    for gradients in parallel_gradients[case].values():
        assert relative_difference(gradients, expected) <= 1e-6
        for name in {"logit_scale", "logit_bias"} & expected.keys():
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-7)


def test_static_graph_equals_one_process(folder, parallel_gradients):
    expected, _ = step_gradients(folder / "tiny.json")
    assert relative_difference(parallel_gradients["static-graph"][2], expected) <= 1e-6


def final_weights(folder, *, epoch):
    checkpoint = torch.load(folder / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)
    return checkpoint["state_dict"]


@pytest.fixture(scope="module")
def data(folder):
    return write_shards(folder / "train")


def test_a_run_goes_from_one_process_to_two_and_back(folder, data):
    options = {"train_data": data, "masking": "pgs", "warmup": 0, "name": "moved"}
    path = run(folder, epochs=1, **options)
    argv = flags(folder, epochs=2, resume="latest", batch_size=4, **options)
    # Without the `--`, torchrun takes `--logs` for its own.
    code, error = torchrun("-m", "--", "clip_pgs.training", *argv)
    assert code == 0, error
    assert "Process 0 of 2 on cpu" in error
    assert list(final_weights(path, epoch=2)) == list(final_weights(path, epoch=1))
    run(folder, epochs=3, resume="latest", **options)
    assert "visual.conv1.weight" in final_weights(path, epoch=3)


def test_two_torchrun_agents_calibrate_train_and_tune_as_two_nodes(folder, data):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = (
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=clip-pgs",
        "--local-addr=127.0.0.1",
    )
    recipe = {"masking": "cluster", "text_tokens": 6, "epochs": 1, "unmasked_epochs": 1}
    argv = flags(folder, name="nodes", device=None, train_data=data, batch_size=4, **recipe)
    arguments = ("-m", "--", "clip_pgs.training", *argv)
    agents = [
        torchrun(*arguments, num_processes=1, launcher=launcher, wait=False) for _ in range(2)
    ]
    for agent in agents:
        _, error = agent.communicate(timeout=300)
        assert agent.returncode == 0, error
    path = folder / "logs" / "nodes"
    assert '"world_size": 2' in (path / "env.json").read_text()
    assert (path / "export" / "open_clip_model.safetensors").exists()
    masked, tuned = (
        torch.load(path / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)
        for epoch in (1, 2)
    )
    assert masked["masking_state"]["strategy"]
    assert "masking_state" not in tuned
