"""Two processes (gloo on the CPU), each with the whole model (DDP) or a shard of it (FSDP2), follow one."""

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vilma.training import ScheduleConfig
from vilma.training.distributed import full_tree, sharding_blocks, sync_batch_norms

SHARDINGS = ["none", "fsdp2"]
OPTIONS = {"model": "sampled", "steps": 20, "accumulate": 2, "log_every": 1, "grad_clip": 0.3}
OPTIONS |= {"schedule": {"warmup": 3, "length": 20}}


def train(run_toy, run_dir, world=1, **options):
    answer = run_toy(run_dir, world=world, options=OPTIONS | {"describe": {}} | options)
    assert answer["code"] == 0, answer["outputs"]
    return answer


def curve(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([[line[k] for k in ("step", "loss", "mae", "grad_norm", "lr")] for line in lines])


def weights(run_dir):
    """The averaged weights, the raw ones and the optimiser's moments of the last checkpoint."""
    folder = run_dir / "checkpoints" / "last"
    state = torch.load(folder / "trainer.pt", weights_only=True)
    flat = {f"ema.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    flat |= {f"model.{k}": v for k, v in state["model"].items()}
    moments = state["optimizer"]["state"]
    flat |= {f"{n}.{k}": v for n, moment in moments.items() for k, v in moment.items()}
    assert all(torch.equal(state["ema"][k], flat[f"ema.{k}"]) for k in state["ema"])
    return flat


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def one(run_toy, tmp_path_factory):
    """The run of one process, whose draws two processes must repeat."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train(run_toy, run_dir)
    return run_dir


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_equal_one(run_toy, one, tmp_path, sharding):
    """Draws of each sample, clipping, no-decay groups, the average and a resume included."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(run_toy, whole, world=2, sharding=sharding)
    assert curve(one).shape == (20, 5) and curve(one)[-1, 1] < 0.9 * curve(one)[0, 1]
    torch.testing.assert_close(curve(whole), curve(one), rtol=1e-5, atol=1e-7)
    assert_close(weights(whole), weights(one))
    # Exact resume of a distributed run: the same bits.
    train(run_toy, cut, world=2, sharding=sharding, steps=10)
    answer = train(run_toy, cut, world=2, sharding=sharding)
    assert "RESUMED 10" in answer["output"]
    assert torch.equal(curve(cut), curve(whole))
    a, b = weights(cut), weights(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("first, second", [(("fsdp2", 2), ("none", 1)), (("none", 1), ("fsdp2", 2))])
def test_the_number_of_processes_may_change(run_toy, one, tmp_path, first, second):
    for (sharding, world), steps in ((first, 10), (second, 20)):
        answer = train(run_toy, tmp_path / "run", world=world, sharding=sharding, steps=steps)
    assert "RESUMED 10" in answer["output"]
    torch.testing.assert_close(curve(tmp_path / "run"), curve(one), rtol=1e-5, atol=1e-7)
    assert_close(weights(tmp_path / "run"), weights(one))


def test_a_batch_that_the_processes_do_not_divide_is_refused(run_toy, tmp_path):
    answer = run_toy(tmp_path / "run", world=2, options=OPTIONS | {"batch_size": 6})
    assert answer["code"] == 1
    assert (
        "batch_size is 6, which 2 processes x 2 accumulated micro-batches do not divide" in answer["output"]
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "sharding": "fsdp2"},
        {"compile": "aot_eager", "sharding": "fsdp2"},
        {"compile": "aot_eager", "sharding": "none"},
    ],
)
def test_two_processes_in_bf16_and_compiled(run_toy, one, tmp_path, options):
    train(run_toy, tmp_path / "run", world=2, steps=4, **options)
    tolerance = {"rtol": 0.02, "atol": 0.02} if "precision" in options else {"rtol": 1e-5, "atol": 1e-7}
    found = curve(tmp_path / "run")
    torch.testing.assert_close(found, torch.cat([curve(one)[:4, :4], found[:, 4:]], 1), **tolerance)
    assert weights(tmp_path / "run")["model.inner.weight"].dtype == torch.float32


@pytest.mark.parametrize("sharding", ["none", pytest.param("fsdp2", marks=pytest.mark.long)])
def test_an_interrupt_of_one_process_stops_all_with_a_checkpoint(run_toy, tmp_path, sharding):
    options = OPTIONS | {"steps": 60, "sharding": sharding, "describe": {}, "checkpoint_every": 1000}
    request = {"kill_after": 0.1, "signal": signal.SIGTERM, "sleep": 0.02}
    answer = run_toy(tmp_path / "run", world=2, options=options, **request)
    assert all("KeyboardInterrupt" in output for output in answer["outputs"])
    saved = (tmp_path / "run" / "checkpoints" / "last").resolve().name
    assert 0 < int(saved.removeprefix("step-")) < 60 and "which is saved" in answer["output"]
    answer = train(run_toy, tmp_path / "run", world=2, **options)
    assert "RESUMED 0" not in answer["output"]


def test_a_score_sees_whole_models_in_every_process(run_toy, tmp_path):
    options = OPTIONS | {"steps": 15, "describe": {}}
    answers = {}
    for world in (1, 2):
        request = {"world": world, "options": options | {"sharding": "fsdp2"}, "scored": True}
        answers[world] = run_toy(tmp_path / str(world), **request)
        assert answers[world]["code"] == 0, answers[world]["outputs"]
        assert (tmp_path / str(world) / "checkpoints" / "best").resolve().name == "step-00000010"
    said = [[s for s in text.splitlines() if "SCORE" in s] for a in answers.values() for text in a["outputs"]]
    assert len(said) == 3 and len(said[0]) == 3 and said[0] == said[1] == said[2]


def test_processes_that_were_not_joined_are_refused(toy, tmp_path, monkeypatch):
    toy.build(tmp_path / "a", steps=1, schedule=ScheduleConfig()).fit()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but Accelerate joined 1"):
        toy.build(tmp_path / "b", steps=1).fit()


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_batch_norms_without_an_accelerator_are_told(run_toy, tmp_path, sharding):
    options = {"model": "toy", "sharding": sharding, "steps": 2, "schedule": {"name": "constant"}}
    answer = train(run_toy, tmp_path / "run", world=2, **options)
    assert "the statistics of 1 batch norms stay within each process" in answer["output"]
    assert "batch norms" not in answer["outputs"][1]


def test_what_is_not_finite_is_named_by_all_processes(run_toy, tmp_path):
    options = OPTIONS | {"sharding": "fsdp2", "nan_at": 20}
    answer = run_toy(tmp_path / "run", world=2, options=options)
    assert answer["code"] == 1 and all(
        "NonFiniteError: stopped at step" in text for text in answer["outputs"]
    )
    assert any("non-finite inputs (1): x: 1 of 16" in text for text in answer["outputs"])
    assert all("non-finite gradients (" in text and "weights: none" in text for text in answer["outputs"])


@pytest.mark.long
def test_shards_of_every_family_give_the_gradients_of_the_whole(request, tmp_path):
    """None of them reads a weight of a block from outside it."""
    script = request.path.with_name("shard_families.py")
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, str(script), str(rank), str(tmp_path / "meeting")] for rank in range(2)]
    pipes = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    told = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors for _, errors in told)
    found = {}
    for line in told[0][0].splitlines():
        name, blocks, error = re.fullmatch(r"(.+): (\d+) blocks, error (\S+)", line).groups()
        assert float(error) < 1e-5, line
        found[name] = int(blocks)
    assert len(found) == 7 and all(found.values())
    assert found["vil2_tiny_patch16_224"] == 2 and found["cat of FiLM-ResNets"] > 30


def test_blocks_are_the_outermost_large_layers():
    import timm

    model = timm.create_model("test_vit", num_classes=3)
    assert sharding_blocks(model) == list(model.blocks)
    net = timm.create_model("resnet18", num_classes=3)
    assert [block for block in sharding_blocks(net) if block not in [*net.layer1, *net.layer2]] == [
        *net.layer3,
        *net.layer4,
    ]
    tower = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))})
    assert sharding_blocks(tower) == list(tower["a"])

    class Own(nn.Linear):
        def sharding_blocks(self):
            return [self]

    own = Own(2, 2)
    assert sharding_blocks(own) == [own]


def test_batch_norms_are_shared_on_accelerators():
    """timm's norms with an activation inside keep it, and nothing is renamed."""
    import timm

    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    names, x = list(model.state_dict()), torch.randn(2, 3, 32, 32)
    expected = model(x)
    processes = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    shared, warning = sync_batch_norms(model, processes)
    norms = [m for m in shared.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert warning is None and norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert list(shared.state_dict()) == names
    torch.testing.assert_close(shared(x), expected)
    alone = SimpleNamespace(num_processes=1, device=torch.device("cuda"))
    plain = nn.BatchNorm1d(2)
    assert sync_batch_norms(plain, alone) == (plain, None)


def test_trees_without_shards_are_left_alone():
    tree = {"a": [torch.ones(2), 3], "b": (None, "x")}
    assert full_tree(tree, keep=False)["a"][0] is tree["a"][0] and full_tree(tree)["b"] == (None, "x")
