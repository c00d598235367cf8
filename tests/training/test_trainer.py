"""The loop: averages, accumulation, precision, logs, and clear errors for what cannot go on."""

import copy
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vilma.training import CheckpointError, EmaConfig, NonFiniteError, OptimConfig, ScheduleConfig, ema_decay


def test_ema_averages_weights_and_buffers(toy, tmp_path):
    """Against the recurrence e <- d e + (1 - d) m, in float64 from the raw weights of every step."""
    torch.manual_seed(0)
    model = toy.ToyModel()
    config = EmaConfig(decay=0.9, schedule="ratio")
    expected = {k: v.double().clone() for k, v in model.state_dict().items()}

    def follow(step, values):
        decay = ema_decay(config, step)
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()

    toy.build(tmp_path, model=model, steps=9, ema=config, on_step=follow).fit()
    saved = load_file(tmp_path / "checkpoints" / "last" / "model.safetensors")
    for name in ("inner.weight", "outer.bias", "norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(saved[name].double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(saved[name], model.state_dict()[name])


def test_without_ema_the_raw_weights_are_saved(toy, tmp_path):
    trainer = toy.build(tmp_path, steps=4, ema=EmaConfig(enabled=False))
    trainer.fit()
    saved = load_file(tmp_path / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in trainer.model.state_dict().items())
    assert trainer.final_model is trainer.model


class Plain(nn.Module):
    """No draws, no buffers, no save_pretrained: what a float64 re-computation can follow."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 2)

    def forward(self, batch):
        return ((self.line(batch["x"]) - batch["y"]) ** 2).mean(), {}


class PlainData(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(20, 3, generator=generator), torch.randn(20, 2, generator=generator)

    def __len__(self):
        return 20

    def __getitems__(self, indices):
        return {"x": self.x[indices], "y": self.y[indices]}


def plain(toy, run_dir, **options):
    torch.manual_seed(3)
    model = Plain()
    return toy.build(run_dir, model=model, data=PlainData(), ema=EmaConfig(enabled=False), **options), model


def test_updates_against_float64_by_hand(toy, tmp_path):
    """AdamW with decoupled decay, clipping by global norm and the schedule, written out."""
    trainer, model = plain(toy, tmp_path, steps=12, grad_clip=0.3)
    w, b = model.line.weight.detach().double().clone(), model.line.bias.detach().double().clone()
    moments = {"w": [torch.zeros_like(w)] * 2, "b": [torch.zeros_like(b)] * 2}
    trainer.fit()
    from vilma.training.sampling import SampleStream

    stream = SampleStream(20, 8, 0, stop=12)
    lrs = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for step in range(12):
        rows = [place.index for place in stream.places(step, 0)]
        x, y = trainer.dataset.x[rows].double(), trainer.dataset.y[rows].double()
        residual = 2 * (x @ w.T + b - y) / (8 * 2)
        grads = {"w": residual.T @ x, "b": residual.sum(0)}
        norm = sum((g**2).sum() for g in grads.values()).sqrt()
        grads = {k: g * min(1.0, 0.3 / (float(norm) + 1e-6)) for k, g in grads.items()}
        # warm-up of 3 updates from a tenth, then half a cosine to 2 %
        t = torch.tensor(float(step), dtype=torch.float64)
        shape = (
            0.1 + 0.3 * step
            if step < 3
            else 0.02 + 0.98 * 0.5 * (1 + float(torch.cos(torch.pi * (t - 3) / 9)))
        )
        lr = 1e-2 * shape
        if step % 2:
            assert lrs[step // 2] == pytest.approx(lr, rel=1e-9)
        for name, value in (("w", w), ("b", b)):
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * grads[name], 0.95 * second + 0.05 * grads[name] ** 2
            moments[name] = [first, second]
            if name == "w":
                value *= 1 - lr * 0.02
            value -= (
                lr * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            )
    torch.testing.assert_close(model.line.weight.double(), w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.line.bias.double(), b, rtol=1e-5, atol=1e-6)


def test_accumulation_sees_the_same_update(toy, tmp_path):
    (whole, a), (cut, b) = plain(toy, tmp_path / "a"), plain(toy, tmp_path / "b", accumulate=4)
    whole.fit(), cut.fit()
    torch.testing.assert_close(a.line.weight, b.line.weight, rtol=1e-5, atol=1e-6)
    curves = [
        [json.loads(s)["loss"] for s in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "ab"
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_workers_change_nothing(toy, tmp_path):
    one, two = toy.build(tmp_path / "a", steps=8), toy.build(tmp_path / "b", steps=8, num_workers=1)
    one.fit(), two.fit()
    assert all(torch.equal(v, two.model.state_dict()[k]) for k, v in one.model.state_dict().items())


def test_bf16_is_close_and_leaves_the_model_as_it_was(toy, tmp_path):
    (full, a), (half, b) = plain(toy, tmp_path / "a"), plain(toy, tmp_path / "b", precision="bf16")
    full.fit(), half.fit()
    assert b.line.weight.dtype == torch.float32 and "forward" not in vars(b)
    assert not torch.equal(a.line.weight, b.line.weight)
    torch.testing.assert_close(a.line.weight, b.line.weight, rtol=0, atol=0.02)
    copy.deepcopy(b)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"compile": "aot_eager"}])
def test_exact_resume_in_bf16_and_compiled(toy, tmp_path, options):
    options |= {"schedule": ScheduleConfig(warmup=3, length=12), "describe": {}}
    whole = toy.build(tmp_path / "a", steps=12, **options)
    whole.fit()
    toy.build(tmp_path / "b", steps=5, **options).fit()
    cut = toy.build(tmp_path / "b", steps=12, **options)
    assert cut.fit().resumed_from == 5
    for name in ("model", "final_model"):
        a, b = (getattr(run, name).state_dict() for run in (whole, cut))
        assert all(torch.equal(a[key], b[key]) for key in a) and a["inner.weight"].dtype == torch.float32
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]


def test_compiled_is_eager_and_leaves_no_trace(toy, tmp_path):
    (eager, a), (compiled, b) = plain(toy, tmp_path / "a"), plain(toy, tmp_path / "b", compile="aot_eager")
    eager.fit(), compiled.fit()
    torch.testing.assert_close(a.line.weight, b.line.weight, rtol=1e-6, atol=1e-7)
    assert b._compiled_call_impl is not None and list(b.state_dict()) == list(a.state_dict())
    copy.deepcopy(b)


def test_channels_last(toy, tmp_path):
    class Picture(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, batch):
            picture = batch["x"].repeat(1, 6).reshape(-1, 3, 4, 4)
            return (self.conv(picture).mean((1, 2, 3)) - batch["y"][:, 0]).square().mean(), {}

    runs = []
    for name, options in (("a", {}), ("b", {"channels_last": True}), ("b", {"channels_last": True})):
        torch.manual_seed(0)
        steps = 6 if len(runs) == 1 else 12
        options |= {"steps": steps, "describe": {}, "schedule": ScheduleConfig(length=12)}
        runs.append(toy.build(tmp_path / name, model=Picture(), **options))
        runs[-1].fit()
    assert runs[2].model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert runs[0].model.conv.weight.is_contiguous()
    for trained in (runs[2].model, runs[2].final_model):
        assert next(trained.parameters()).shape == (4, 3, 3, 3)
    torch.testing.assert_close(runs[0].model.conv.weight, runs[2].model.conv.weight.contiguous())


def test_each_sample_of_an_update_has_a_seed_of_its_own(toy, tmp_path):
    seen = []

    class Looking(Plain):
        def forward(self, batch):
            seen.append(batch["seed"])
            return super().forward({"x": batch["x"][:, :3], "y": batch["y"].repeat(1, 2)})

    toy.build(tmp_path, model=Looking(), steps=6, accumulate=2).fit()
    seeds = torch.cat(seen)
    assert seeds.shape == (48,) and seeds.dtype == torch.int64 and len(seeds.unique()) == 48
    assert int(seeds.min()) >= 0 and seeds.device.type == "cpu"


def test_a_finished_run_says_so(toy, tmp_path, capsys):
    first = toy.build(tmp_path, steps=6).fit()
    modified = first.checkpoint.stat().st_mtime_ns
    capsys.readouterr()
    again = toy.build(tmp_path, steps=6).fit()
    assert "already trained to step 6" in capsys.readouterr().out
    assert again.step == again.resumed_from == 6 and first.checkpoint.stat().st_mtime_ns == modified


def test_another_configuration_is_refused_field_by_field(toy, tmp_path):
    toy.build(tmp_path, steps=6).fit()
    before = (tmp_path / "config.yaml").read_text()
    other = toy.build(tmp_path, steps=6, seed=4, optim=OptimConfig(lr=0.5, weight_decay=0.02))
    with pytest.raises(ValueError, match="another configuration") as error:
        other.fit()
    assert "optim.lr: 0.01 in the run, 0.5 asked for" in str(error.value)
    assert "train.seed: 0 in the run, 4 asked for" in str(error.value)
    assert str(error.value).count("asked for") == 2
    assert (tmp_path / "config.yaml").read_text() == before


def test_fields_that_move_no_weight_may_change(toy, tmp_path):
    toy.build(tmp_path, steps=6).fit()
    toy.build(tmp_path, steps=6, log_every=3, keep=1, checkpoint_every=100).fit()
    assert "log_every: 3" in (tmp_path / "config.yaml").read_text()
    describe = {"data": {"path": "/somewhere"}, "train": {"steps": 6}}
    toy.build(tmp_path / "b", steps=6, describe=describe).fit()
    describe = {"data": {"path": "/elsewhere"}, "train": {"steps": 6}}
    with pytest.raises(ValueError, match=r"data\.path"):
        toy.build(tmp_path / "b", steps=6, describe=describe).fit()
    toy.build(tmp_path / "b", steps=6, describe=describe, may_change=("data.path",)).fit()


def test_other_data_and_another_architecture_are_refused(toy, tmp_path):
    describe = {"name": "toy"}
    build = lambda **options: toy.build(tmp_path, describe=describe, **options)  # noqa: E731
    build(steps=5).fit()
    with pytest.raises(ValueError, match=r"holds 36 samples.* trained on 37"):
        build(steps=10, data=toy.ToyData(36)).fit()
    with pytest.raises(ValueError, match="step-00000005 is a checkpoint of another architecture"):
        build(steps=10, model=toy.ToyModel(width=12)).fit()


def test_a_nan_input_stops_before_the_update(toy, tmp_path):
    trainer = toy.build(tmp_path, data=toy.ToyData(37, nan_at=20), checkpoint_every=1)
    with pytest.raises(NonFiniteError, match=r"stopped at step [1-5]: loss nan") as error:
        trainer.fit()
    assert (
        "non-finite inputs (1): x: 1 of 64" in str(error.value)
        and "20" in str(error.value).split("samples:")[1]
    )
    assert "non-finite weights: none" in str(error.value)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    step = int(str(error.value).split("step ")[1].split(":")[0])
    assert trainer.checkpoints.linked("last") == (step - 1 or None)


class Exploding(Plain):
    """A finite loss whose gradient is not."""

    def forward(self, batch):
        loss, logs = super().forward(batch)
        return loss + 0 * (self.line.bias - self.line.bias).abs().sqrt().sum(), logs


def test_a_non_finite_gradient_is_named(toy, tmp_path):
    trainer = toy.build(tmp_path, model=Exploding(), data=PlainData())
    with pytest.raises(NonFiniteError) as error:
        trainer.fit()
    assert "non-finite gradients (1 of 2): line.bias" in str(error.value)
    assert "non-finite inputs: none" in str(error.value) and "last checkpoint: none" in str(error.value)


def test_best_follows_the_score_and_survives_pruning(toy, tmp_path):
    scores = {5: 1.0, 10: 3.0, 15: 2.0, 20: 2.5, 25: -1.0}

    def score(model, step):
        assert not model.training
        return scores[step]

    trainer = toy.build(tmp_path, steps=25, keep=1, score=score)
    trainer.fit()
    assert trainer.checkpoints.linked("best") == 10 and trainer.checkpoints.linked("last") == 25
    assert trainer.checkpoints.steps() == [10, 25]


def test_best_without_a_score_is_the_lowest_training_loss(toy, tmp_path):
    losses = []
    trainer = toy.build(tmp_path, steps=20, keep=9, on_step=lambda s, v: losses.append(v["loss"]))
    trainer.fit()
    means = [sum(losses[k : k + 5]) / 5 for k in range(0, 20, 5)]
    assert trainer.checkpoints.linked("best") == 5 * (means.index(min(means)) + 1)


def test_an_interrupt_does_not_move_the_best(toy, tmp_path):
    """The mean loss between two checkpoints goes over an interrupt in between."""

    def interrupt(step, values):
        if step == 28:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)  # a shell may have set it aside for a job in the background
    whole, cut = (toy.build(tmp_path / name, checkpoint_every=15) for name in ("whole", "cut"))
    whole.fit()
    cut.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    assert cut.checkpoints.linked("last") == 28 and cut.checkpoints.linked("best") == 15
    assert signal.getsignal(signal.SIGINT) is handler
    toy.build(tmp_path / "cut", checkpoint_every=15).fit()
    files = (run.checkpoints.path(30) / "trainer.pt" for run in (whole, cut))
    a, b = (torch.load(file, weights_only=True)["best"] for file in files)
    assert a == b and a["step"] == 30


def test_metrics_and_tensorboard(toy, tmp_path):
    values = []
    trainer = toy.build(
        tmp_path, steps=7, log_every=3, tensorboard=True, on_step=lambda s, v: values.append(v)
    )
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert lines[0]["loss"] == pytest.approx(sum(v["loss"] for v in values[:3]) / 3)
    assert lines[0]["mae"] == pytest.approx(sum(v["mae"] for v in values[:3]) / 3)
    assert lines[1]["lr"] == values[5]["lr"] and lines[2]["grad_norm"] == values[6]["grad_norm"]
    assert {"seconds", "samples_per_s", "data_wait"} <= set(lines[0])
    assert lines[0]["seconds"] < lines[2]["seconds"] and 0 <= lines[0]["data_wait"] <= 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]


def test_tensorboard_may_be_absent(toy, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    toy.build(tmp_path, steps=4, tensorboard=True).fit()
    assert capsys.readouterr().out.count("no TensorBoard log") == 1
    assert (tmp_path / "metrics.jsonl").stat().st_size and not (tmp_path / "tb").exists()


def test_lines_beyond_the_restored_step_are_dropped(tmp_path):
    from vilma.training.metrics import MetricsFile

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 6, "lo')
    metrics = MetricsFile(path, restored=3)
    metrics.write({"step": 4, "loss": 0.5})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 2, "loss": 1},
        {"step": 4, "loss": 0.5},
    ]


def test_what_the_loss_does_not_reach_is_named(toy, tmp_path, capsys):
    model = Plain()
    model.idle = nn.Linear(2, 2)
    toy.build(tmp_path, model=model, data=PlainData(), steps=4).fit()
    assert "does not reach 2 trainable parameters: idle.weight, idle.bias" in capsys.readouterr().out


def test_tied_weights_are_refused_by_the_average(toy, tmp_path):
    model = Plain()
    model.twin = nn.Linear(3, 2, bias=False)
    model.twin.weight = model.line.weight
    with pytest.raises(ValueError, match=r"line\.weight and twin\.weight share memory"):
        toy.build(tmp_path, model=model, data=PlainData(), steps=4).fit()


def test_a_failing_save_keeps_the_last_good_checkpoint(toy, tmp_path):
    def save(model, folder):
        toy.ToyModel.save_pretrained(model, folder)
        if (tmp_path / "checkpoints" / "last").exists():
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 10 .*the disk is full.*step-00000005.*Free some space"):
        toy.build(tmp_path, save=save).fit()
    toy.build(tmp_path).fit()


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"steps": 0},
            {"batch_size": 0},
            {"seed": -1},
            {"grad_clip": 0.0},
            {"num_workers": -1},
            {"keep": 0},
        ),
        *({"compile": "inductr"}, {"channels_last": True, "sharding": "fsdp2"}),
    ],
)
def test_impossible_values_are_errors(toy, tmp_path, options):
    with pytest.raises(ValueError, match=f"train.*{next(iter(options))}"):
        toy.build(tmp_path, **options)


def test_a_warm_up_longer_than_the_run_is_an_error(toy, tmp_path):
    with pytest.raises(ValueError, match="warmup is 40"):
        toy.build(tmp_path, schedule=ScheduleConfig(warmup=40)).fit()
