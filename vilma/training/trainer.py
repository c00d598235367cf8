"""The one training loop: policies and backbones, exact resume, any number of processes through Accelerate.

A model is called as ``loss, logs = model(batch)``. Killed at any moment and started again, a run on a CPU
with a fixed number of threads ends with the same bits: the sample order and the random draws of an update are
pure functions of the seed and the update's number (`sampling`), and a checkpoint holds everything else.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vilma.config import encode

from . import distributed
from .average import check_untied, update_average
from .checkpoint import CheckpointError, Checkpoints, load_weights, save_weights
from .diagnosis import NonFiniteError, describe_idle, describe_nonfinite
from .interrupt import deferred_interrupt
from .ledger import Clock, Ledger, read_state
from .metrics import Display, MetricsFile, TensorBoard, WeightsAndBiases
from .optim import OptimConfig, build_optimizer
from .rundir import check_config, locked, write_config
from .sampling import STEP, SampleStream, derive_seed, make_loader, sample_seeds, seed_all
from .schedule import EmaConfig, Schedule, ScheduleConfig, ema_decay

__all__ = ["MAY_CHANGE", "Trained", "Trainer", "TrainerConfig", "find_trained"]

# What may differ between two starts of one run: it moves no weight, or by rounding only. So may the number of
# processes. What a model draws other than from ``batch["seed"]`` is then drawn anew, as under inductor.
MAY_CHANGE = tuple(
    f"train.{name}"
    for name in (
        *("log_every", "checkpoint_every", "keep", "num_workers", "threads", "tensorboard", "wandb"),
        *("sharding", "sync_batchnorm", "compile", "channels_last"),
    )
)


@dataclass(frozen=True)
class TrainerConfig:
    """The loop.

    Args:
        steps: optimiser updates.
        batch_size: samples of one update, over all processes and accumulated micro-batches.
        accumulate: micro-batches of one update.
        precision: ``bf16`` runs the forward pass under autocast; weights, gradients and averages stay fp32.
        grad_clip: largest gradient norm; none leaves gradients alone.
        num_workers: loader processes; 0 loads in the training process.
        threads: torch threads; none leaves torch's setting.
        log_every, checkpoint_every: updates between two lines of metrics, two checkpoints.
        keep: newest checkpoints to keep, besides the best.
        sharding: with several processes, ``none`` keeps the whole model in each (DDP), ``fsdp2`` shards
            weights, gradients, moments and the average over them (`distributed.distribute`).
        sync_batchnorm: with several processes on accelerators, batch norms see the samples of all of them.
        wandb: project of Weights & Biases to log to as well; none does not.
        compile: backend of torch.compile (``inductor``), none to run eagerly; shards compile block by block.
        channels_last: weights of convolutions have their channels innermost, as tensor cores read them.
    """

    steps: int = 10_000
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    grad_clip: float | None = 1.0
    num_workers: int = 0
    threads: int | None = None
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    tensorboard: bool = True
    wandb: str | None = None
    sharding: Literal["none", "fsdp2"] = "none"
    sync_batchnorm: bool = True
    compile: str | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} is {value}, wanted at least 1")
        if self.num_workers < 0 or not 0 <= self.seed < 2**63:
            raise ValueError(
                f"train.num_workers and train.seed are {self.num_workers} and {self.seed}, wanted 0 or more"
            )
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"train.grad_clip is {self.grad_clip}, wanted more than 0, or none")
        if self.compile is not None and self.compile not in torch.compiler.list_backends(exclude_tags=()):
            known = ", ".join(torch.compiler.list_backends())
            raise ValueError(
                f"train.compile is {self.compile!r}, wanted a backend of torch ({known}), or none"
            )
        if self.channels_last and self.sharding != "none":
            raise ValueError(
                "train.channels_last does nothing for shards, which are contiguous: drop one of both"
            )


@dataclass(frozen=True)
class Trained:
    """What `Trainer.fit` did: the last checkpoint, its step, where it began, seconds of training in all."""

    checkpoint: Path
    step: int
    resumed_from: int
    seconds: float


def find_trained(
    run_dir: str | Path, steps: int, describe: Any, may_change: Collection[str] = ()
) -> Trained | None:
    """The result of a run that reached ``steps``, found without its data or model; none where work is left.

    Raises:
        ValueError: the directory belongs to another configuration (see `Trainer`).
    """
    run_dir = Path(run_dir)
    check_config(run_dir, _plain_values(describe), (*MAY_CHANGE, *may_change))
    checkpoints = Checkpoints(run_dir / "checkpoints")
    step = checkpoints.linked("last")
    if step is None or step < steps:
        return None
    folder = checkpoints.path(step)
    try:
        checkpoints.verify(folder)
        state = read_state(folder)
    except CheckpointError:
        return None  # `Trainer.fit` names it and goes on from the one before
    return Trained(folder, step, step, state["seconds"])


class Trainer:
    """Trains ``model`` on ``dataset`` in ``run_dir``, from where an earlier call in that directory stopped.

    Args:
        config: the loop; ``optim``, ``schedule``, ``ema`` are its other sections.
        model: ``model(batch) -> (loss, logs)`` with logs a mapping of names to scalars. Its weights are
            written by ``save``, else by its ``save_pretrained(folder)``, else as ``model.safetensors`` alone.
            A batch that is a dictionary also has ``seed`` (B,) int64 on the CPU, one for each sample and
            update: what a model draws from these alone does not depend on the number of processes, while
            torch's generator is seeded for each process and micro-batch.
        dataset: map-style; ``__getitems__`` is used where it exists.
        collate: samples (or what ``__getitems__`` returned) -> batch.
        save: ``save(model, folder)``; the model is the averaged one if EMA is on, here and in ``score``.
        score: ``score(model, step)`` before each checkpoint; ``checkpoints/best`` has the highest. It may
            return a mapping with ``score`` in it, which is logged. Without it, best has the lowest training
            loss, averaged from one checkpoint to the next.
        on_step: called with (finished updates, values of the update).
        describe: the whole configuration, a dataclass or plain values: ``config.yaml``, compared on resume.
        may_change: dotted fields of ``describe`` that may differ on resume, besides `MAY_CHANGE`.
    """

    def __init__(
        self,
        config: TrainerConfig,
        model: nn.Module,
        dataset: Dataset,
        run_dir: str | Path,
        *,
        optim: OptimConfig | None = None,
        schedule: ScheduleConfig | None = None,
        ema: EmaConfig | None = None,
        collate: Callable[[Any], Any] | None = None,
        save: Callable[[nn.Module, Path], None] | None = None,
        score: Callable[[nn.Module, int], float | Mapping[str, float]] | None = None,
        on_step: Callable[[int, Mapping[str, float]], None] | None = None,
        describe: Any = None,
        may_change: Collection[str] = (),
    ):
        self.config, self.model, self.dataset, self.run_dir = config, model, dataset, Path(run_dir)
        self.optim = optim or OptimConfig()
        self.schedule = schedule or ScheduleConfig()
        self.ema = ema or EmaConfig()
        self.collate, self.score, self.on_step = collate, score, on_step
        self.save = save or save_weights
        if describe is None:
            sections = {"optim": self.optim, "schedule": self.schedule, "ema": self.ema, "train": config}
            describe = {name: encode(section) for name, section in sections.items()}
        self.description = _plain_values(describe)
        self.may_change = (*MAY_CHANGE, *may_change)
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", config.keep)
        self._averaged: nn.Module | None = None

    @property
    def final_model(self) -> nn.Module:
        """The weights that checkpoints hold: the moving average if there is one.

        It and ``model`` are never sharded: with shards they have the values of the last checkpoint.
        """
        return self.model if self._averaged is None else self._averaged

    def fit(self) -> Trained:
        """Train to the last step and return the last checkpoint.

        Raises:
            ValueError: the run directory belongs to another configuration, data set or architecture, or
                another process holds it.
            NonFiniteError: a loss or gradient was not finite; the last checkpoint is from before.
            CheckpointError: a checkpoint could not be written (a full disk) or none can be read.
            KeyboardInterrupt: after SIGINT or SIGTERM to any of the processes, once a checkpoint is written.
        """
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        accelerator = distributed.open_accelerator()
        with contextlib.ExitStack() as stack:
            if accelerator.is_main_process:
                stack.enter_context(locked(self.run_dir))
            # The others look only after the main process has renamed, linked and removed what it has to.
            with accelerator.main_process_first():
                check_config(self.run_dir, self.description, self.may_change)
                folder, state, damage = self.checkpoints.newest(read_state) or (None, None, [])
                done = state["step"] if state else 0
                display = Display(self.config.steps, done, quiet=not accelerator.is_main_process)
                for problem in damage:
                    display.say(f"{problem}; set aside, going on from {folder}")
                if state:
                    self._check_samples(state)
                if accelerator.is_main_process:
                    self._tidy(state)
            if done >= self.config.steps:
                display.say(f"{self.run_dir} is already trained to step {done}")
                return Trained(folder, done, done, state["seconds"])
            return self._train(accelerator, display, state)

    def _tidy(self, state: Mapping[str, Any] | None) -> None:
        """What a killed process may have left undone in the run directory; one process does this."""
        self.checkpoints.clean()
        if state and state["best"]["step"] in self.checkpoints.steps():
            self.checkpoints.link("best", state["best"]["step"])
        self.checkpoints.prune()
        write_config(self.run_dir, self.description)

    def _check_samples(self, state: Mapping[str, Any]) -> None:
        if state["samples"] != len(self.dataset):
            raise ValueError(
                f"the data set holds {len(self.dataset)} samples, but {self.run_dir} was trained on "
                f"{state['samples']}; give it the same data, or use another run directory"
            )

    def _prepare(self, accelerator: Any, display: Display, state: dict[str, Any] | None) -> "_Run":
        """Everything that a run needs, with everything restored that ``state`` holds."""
        config = self.config
        bare, average = self._place(accelerator, display, state)
        optimizer = build_optimizer(self.optim, bare)
        schedule = Schedule(self.schedule, optimizer, config.steps)
        if state is not None:
            optimizer.load_state_dict(distributed.shard_optimizer_state(state["optimizer"], optimizer))
        ledger = Ledger.restore(state)
        if state is not None:
            state.clear()  # everything is copied; at full size this is several times the model
        stream = SampleStream(
            len(self.dataset),
            config.batch_size,
            config.seed,
            start=ledger.step,
            stop=config.steps,
            accumulate=config.accumulate,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        loader = make_loader(
            self.dataset,
            stream,
            collate=self.collate,
            num_workers=config.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        return _Run(
            accelerator=accelerator,
            bare=bare,
            average=average,
            trainable=[p for p in bare.parameters() if p.requires_grad],
            model=bare if self._shards(accelerator) else accelerator.prepare_model(bare),
            optimizer=optimizer,
            schedule=schedule,
            stream=stream,
            loader=loader,
            ledger=ledger,
        )

    def _shards(self, accelerator: Any) -> bool:
        return self.config.sharding == "fsdp2" and accelerator.num_processes > 1

    def _place(
        self, accelerator: Any, display: Display, state: Mapping[str, Any] | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """Model and average as they are trained: the trainer's own on the device, or sharded copies."""
        config, shards = self.config, self._shards(accelerator)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if not shards:
            self.model.to(accelerator.device)
        if state is not None:
            load_weights(self.model, state["model"], self.checkpoints.path(state["step"]))
        distributed.broadcast(self.model.state_dict().values(), accelerator)
        average = None
        if self.ema.enabled:
            check_untied(self.model)
            average = self._averaged = copy.deepcopy(self.model).eval()
            if state is not None:
                load_weights(average, state["ema"], self.checkpoints.path(state["step"]))
        bare = self.model
        if config.sync_batchnorm:
            bare, warning = distributed.sync_batch_norms(bare, accelerator)
            if warning:
                display.say(warning)
        if shards:
            bare = distributed.distribute(bare, accelerator)
            average = None if average is None else distributed.distribute(average, accelerator)
        if config.compile is not None:
            for module in distributed.sharding_blocks(bare) if shards else [bare]:
                module.compile(backend=config.compile)
        return bare, average

    def _train(self, accelerator: Any, display: Display, state: dict[str, Any] | None) -> Trained:
        config = self.config
        run = self._prepare(accelerator, display, state)
        ledger = run.ledger
        begun = ledger.step
        if begun:
            display.say(f"{self.run_dir}: going on from step {begun} of {config.steps}")
        with contextlib.ExitStack() as stack:
            sinks = stack.enter_context(self._sinks(run, display))
            interrupted = stack.enter_context(deferred_interrupt())
            stack.enter_context(display)
            clock = Clock(ledger.seconds)
            batches = iter(run.loader)
            run.model.train()
            while ledger.step < config.steps:
                values = self._update(run, batches, clock, interrupted)
                agreed = values.pop("interrupted") > 0
                if ledger.step == begun + 1 and (idle := describe_idle(run.bare)):
                    display.say(idle)
                run.optimizer.zero_grad(set_to_none=True)
                step, last = ledger.step, ledger.step == config.steps
                record = None
                if step % config.log_every == 0 or last:
                    record = {"step": step, **ledger.window.means(), "lr": values["lr"]}
                    record |= clock.lap() | {"seconds": clock.total()}
                    ledger.window.clear()
                    for sink in sinks:
                        sink.write(record)
                display.step(step, record)
                if self.on_step is not None:
                    self.on_step(step, values)
                stops = agreed if accelerator.num_processes > 1 else interrupted()
                regular = step % config.checkpoint_every == 0 or last
                if regular or stops:
                    self._checkpoint(run, sinks, clock, regular)
                if stops and not last:
                    display.say(f"interrupted at step {step} of {config.steps}, which is saved")
                    raise KeyboardInterrupt
        return Trained(self.checkpoints.path(ledger.step), ledger.step, begun, clock.total())

    @contextlib.contextmanager
    def _sinks(self, run: "_Run", display: Display) -> Iterator[list[Any]]:
        """Where lines of metrics go: nowhere except from the main process."""
        sinks: list[Any] = []
        if run.accelerator.is_main_process:
            sinks.append(MetricsFile(self.run_dir / "metrics.jsonl", run.ledger.step))
            if self.config.tensorboard:
                sinks.append(TensorBoard(self.run_dir / "tb", run.ledger.step, display.say))
            if self.config.wandb:
                sinks.append(WeightsAndBiases(self.config.wandb, self.run_dir, self.description, display.say))
        try:
            yield sinks
        finally:
            for sink in sinks:
                sink.close()

    def _update(
        self, run: "_Run", batches: Iterator[Any], clock: Clock, interrupted: Callable[[], bool]
    ) -> dict[str, float]:
        """One optimiser update; returns its values, averaged over micro-batches and processes.

        Among them is ``interrupted``, so that all processes stop together.
        """
        config, accelerator, step = self.config, run.accelerator, run.ledger.step
        lr = run.schedule.set(step)
        bf16 = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        outputs = []
        for micro in range(config.accumulate):
            with clock.waiting():
                batch = distributed.to_device(next(batches), accelerator.device)
            if isinstance(batch, MutableMapping):
                batch["seed"] = sample_seeds(config.seed, run.stream.places(step, micro))
            seed_all(
                derive_seed(config.seed, STEP, step, micro, accelerator.process_index), accelerator.device
            )
            partial = micro < config.accumulate - 1
            with distributed.unsynchronized(run.model) if partial else contextlib.nullcontext():
                with bf16:
                    loss, logs = run.model(batch)
                (loss / config.accumulate).backward()
            outputs.append({**_detached(logs), "loss": loss.detach()})
        parameters = [p for p in run.trainable if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])

        # Read once a step: the update must not happen if the loss or a gradient is not finite.
        losses = [float(output["loss"]) for output in outputs]
        values = {"loss": sum(losses) / len(losses)}
        for name in outputs[0]:
            if name != "loss":
                values[name] = sum(float(output[name]) for output in outputs) / len(outputs)
        values["grad_norm"] = float(distributed.full(norm))
        values = distributed.agree(values | {"interrupted": float(interrupted())}, accelerator)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            bad = [micro for micro, loss in enumerate(losses) if not math.isfinite(loss)]
            raise NonFiniteError(self._explain(run, values, bad[0] if bad else 0))
        if config.grad_clip is not None:  # only now: a norm that is not finite would spread to every gradient
            nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        run.optimizer.step()
        run.ledger.add({name: value for name, value in values.items() if name != "interrupted"})
        clock.samples += config.batch_size
        if run.average is not None:
            update_average(run.average, run.bare, ema_decay(self.ema, run.ledger.step))
        return values | {"lr": lr}

    def _explain(self, run: "_Run", values: Mapping[str, float], micro: int) -> str:
        step = run.ledger.step
        places = run.stream.places(step, micro)
        # Fetched again, with the same draws: they are seeded by position.
        batch = run.loader.collate_fn(run.loader.dataset.__getitems__(places))
        steps = self.checkpoints.steps()
        last = self.checkpoints.path(steps[-1]) if steps else "none"
        indices = ", ".join(str(place.index) for place in places[:8]) + (", ..." if len(places) > 8 else "")
        return (
            f"stopped at step {step + 1}: {', '.join(f'{k} {v:.4g}' for k, v in values.items())}\n"
            f"{describe_nonfinite(batch, run.bare)}\n  samples: {indices}\n"
            f"The update was not made; last checkpoint: {last}. "
            "Look at the inputs named, or use a lower learning rate, a longer warm-up or gradient clipping"
        )

    def _checkpoint(self, run: "_Run", sinks: list[Any], clock: Clock, regular: bool) -> None:
        """Write a checkpoint; only ``regular`` ones compete for best, so an interrupt changes nothing."""
        ledger, accelerator = run.ledger, run.accelerator
        main = accelerator.is_main_process
        state = {
            "model": distributed.full_tree(run.bare.state_dict()),
            "ema": None if run.average is None else distributed.full_tree(run.average.state_dict()),
            "optimizer": distributed.full_tree(run.optimizer.state_dict(), keep=main),
        }
        if self._shards(accelerator):  # the trainer's own then have the values of the last checkpoint
            self.model.load_state_dict(state["model"])
            if self._averaged is not None:
                self._averaged.load_state_dict(state["ema"])
        improved = False
        if regular:
            score = -ledger.interval.means()["loss"]
            if self.score is not None:
                record = self._score(accelerator, ledger.step)
                run.model.train()
                score = record["score"]
                for sink in sinks if len(record) > 1 else ():
                    sink.write({"step": ledger.step, **record})
            improved = score > ledger.best["score"]
            if improved:
                ledger.best = {"step": ledger.step, "score": score}
            ledger.interval.clear()
        if main:
            for sink in sinks:
                sink.sync()
            ledger.seconds = clock.total()
            state |= {"samples": len(self.dataset), **ledger.state()}

            def write(folder: Path) -> None:
                self.save(self.final_model, folder)
                with open(folder / "trainer.pt", "wb") as file:
                    torch.save(state, file)

            self.checkpoints.save(ledger.step, write, best=improved)
        accelerator.wait_for_everyone()

    def _score(self, accelerator: Any, step: int) -> dict[str, float]:
        """``score`` and what comes with it of the final model, in evaluation mode; every process calls it."""
        model = self.final_model
        home = next(model.parameters()).device
        # Parameters agree already; batch statistics may be those of each process.
        distributed.broadcast(model.buffers(), accelerator)
        score = self.score(model.to(accelerator.device).eval(), step)
        model.to(home)
        return dict(score) if isinstance(score, Mapping) else {"score": float(score)}


@dataclass
class _Run:
    """The live objects of one call of `Trainer.fit`.

    ``bare`` is the model without any wrapper: the trainer's own, or a sharded copy; ``average`` likewise.
    """

    accelerator: Any
    bare: nn.Module
    average: nn.Module | None
    trainable: list[nn.Parameter]
    model: nn.Module
    optimizer: Any
    schedule: Schedule
    stream: SampleStream
    loader: DataLoader
    ledger: Ledger


def _plain_values(describe: Any) -> dict[str, Any]:
    return encode(describe) if is_dataclass(describe) else dict(describe)


def _detached(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in logs.items()}
