"""What every policy shares: the action queue of each row, its own files, and the checks at both doors.

B rows (environments), To observation steps, H chunk length, A action size. Keys are those of the house:
``observation.images.<cam>`` and so on, ``task``, ``action``, ``action_is_pad``.
"""

import importlib
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from vilma import config as configs

WEIGHTS, CONFIG, STATISTICS = "model.safetensors", "config.yaml", "stats.json"

# The axes of one observation, by the start of its key.
_AXES = {
    "observation.images.": ("3", "H", "W"),
    "observation.depth.": ("H", "W"),
    "observation.intrinsics.": ("3", "3"),
    "observation.pose.": ("4", "4"),
    "observation.state": ("S",),
}

# Policy type (the `type` of its config) -> where its class is.
_POLICIES = {"pointmap": ("pointmap_policy", "PointMapPolicy")}


class Policy(nn.Module):
    """Base of the policies.

    A subclass names its ``config_class`` (a frozen dataclass with the fields ``type``, ``obs_horizon``,
    ``execute``, ``reference_frame``, ``action_kind`` and ``cameras``), lists ``observation_keys`` and gives
    ``forward``, ``predict_chunk`` and ``set_statistics``.
    """

    config_class: ClassVar[type]

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.statistics: dict[str, Any] = {}
        self._rows: dict[int, _Row] = {}
        self._num_rows: int | None = None
        self._seeds: torch.Generator | None = None

    # What a subclass gives

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """Array keys that ``predict_chunk`` reads (``task`` comes besides)."""
        raise NotImplementedError

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and detached values for the log, of a batch with keys (B, To, ...)."""
        raise NotImplementedError

    def predict_chunk(
        self, obs: Mapping[str, Any], generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """The next actions (B, H, A) in their own units; observations (B, To, ...) on the module's device.

        ``generators``: one a row, for the noise; None takes torch's global one.
        """
        raise NotImplementedError

    def set_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Take a data set's statistics (``{"action": {"mean": [...], ...}, ...}``) for the normalisation."""
        raise NotImplementedError

    # Acting

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.inference_mode()
    def select_action(self, obs: Mapping[str, Any]) -> Tensor:
        """One action a row, (B, A) float32 on the CPU, for observations (B, ...) as a vectorised environment
        gives them (arrays or tensors; ``task``: B strings or one for all).

        A single environment's observation, without the batch axis, gets its action (A,). Observations
        (B, To, ...) with a time axis, as in a batch of data, stand in place of what the rows remember.

        Rows whose queue is empty predict a chunk together and execute the first ``config.execute`` actions of
        it; the observations of other rows are not looked at (see ``needs_observation``). Runs in evaluation
        mode; every submodule's own mode is put back.
        """
        obs, axes = self._arrays(obs)
        rows = self._take_rows(len(obs["task"]))
        for index, row in enumerate(rows):
            if len(row.actions) < self.config.obs_horizon:
                if axes == "B, To":
                    row.history.clear()
                row.history.extend(_row_steps(obs, index))
        due = [row for row in rows if not row.actions]
        if due:
            with evaluating(self):
                chunks = self.predict_chunk(self._histories(due), [row.generator for row in due])
            for row, chunk in zip(due, chunks[:, : self.config.execute].float().cpu()):
                row.actions.extend(chunk)
        actions = torch.stack([row.actions.popleft() for row in rows])
        return actions if axes else actions[0]

    def needs_observation(self, num_rows: int) -> list[bool]:
        """Which rows look at the observation of the next ``select_action``; the others' need no rendering."""
        rows = (self._rows.get(index) for index in range(num_rows))
        return [row is None or len(row.actions) < self.config.obs_horizon for row in rows]

    def reset(self, rows: Sequence[bool] | Sequence[int] | None = None) -> None:
        """Forget queued actions and past observations: of all rows, or of ``rows`` (a mask or indices)."""
        if rows is None:
            self._rows, self._num_rows = {}, None
            return
        for index in _row_indices(rows):
            if index in self._rows:
                self._rows[index].actions.clear()
                self._rows[index].history.clear()

    def seed_rows(self, rows: Sequence[bool] | Sequence[int], seeds: Sequence[int]) -> None:
        """Restart the noise of ``rows`` (a mask or indices), one seed for each.

        An episode then does not depend on which row plays it, nor on what the other rows do.
        """
        indices = _row_indices(rows)
        if len(seeds) != len(indices):
            raise ValueError(f"got {len(seeds)} seeds for {len(indices)} rows; give one for each")
        for index, seed in zip(indices, seeds):
            self._row(index).generator.manual_seed(int(seed))

    def seed(self, seed: int) -> None:
        """Make the noise of the following rollouts reproducible; forgets all rows."""
        self._seeds = torch.Generator().manual_seed(int(seed))
        self.reset()

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors, config.yaml and stats.json; each file appears whole or not at all."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        _write(
            folder / STATISTICS, lambda path: path.write_text(json.dumps(self.statistics, indent=1) + "\n")
        )
        _write(folder / CONFIG, lambda path: configs.dump({"policy": configs.encode(self.config)}, path))
        _write(folder / WEIGHTS, lambda path: save_file(weights, path, metadata={"format": "pt"}))

    @classmethod
    def from_config(
        cls, config: Any, stats: Mapping[str, Any] | None = None, *, pretrained: bool = False
    ) -> Self:
        """A fresh policy.

        config: the path of a YAML file, a mapping, or a config. File and mapping may be a complete training
        configuration (its ``policy`` section is taken) or the bare policy. stats: ``dataset.statistics()``;
        without it a policy that normalises cannot run until ``set_statistics``. pretrained: load the
        pretrained weights that the config asks for, as ``vilma train-policy`` does, which needs them here or
        the network; otherwise all weights are random, and a warning says so where some were asked for.
        Called on ``Policy`` itself, the class follows from the ``type``.
        """
        chosen, config = _decode(cls, config)
        if getattr(config, "rgb_pretrained", False) and not pretrained:
            warnings.warn(
                "the config asks for pretrained RGB encoders; this policy starts from random weights: give "
                "from_config pretrained=True to load them",
                stacklevel=2,
            )
        return chosen(config, stats, pretrained=pretrained)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """The policy saved in ``folder`` by ``save_pretrained``, in evaluation mode.

        Raises FileNotFoundError naming what is missing, and ValueError for a policy of another type, for
        unreadable files, and for weights of another architecture (listing how they differ).
        """
        folder = Path(folder)
        missing = [name for name in (WEIGHTS, CONFIG, STATISTICS) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"no saved policy in {folder}: {', '.join(missing)} missing")
        chosen, config = _decode(cls, configs.read(folder / CONFIG), where=str(folder / CONFIG))
        try:
            statistics = json.loads((folder / STATISTICS).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{folder / STATISTICS} is not valid JSON ({error}); the file is damaged"
            ) from error
        policy = chosen(config, statistics, pretrained=False)
        policy.load_weights(folder / WEIGHTS)
        return policy.to(device).eval()

    def load_weights(self, file: str | Path) -> None:
        """Load a safetensors file; ValueError when it is damaged or belongs to another architecture."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}); the file is damaged or incomplete") from error
        own = self.state_dict()
        differences = {
            "missing": [name for name in own if name not in weights],
            "unexpected": [name for name in weights if name not in own],
            "of another shape": [
                f"{name} {tuple(weights[name].shape)}, wanted {tuple(own[name].shape)}"
                for name in own
                if name in weights and weights[name].shape != own[name].shape
            ],
        }
        found = [f"{len(names)} {kind}: {_first(names)}" for kind, names in differences.items() if names]
        if found:
            raise ValueError(
                f"{file} is a checkpoint of another architecture than its {self.config.type!r} config "
                f"describes ({'; '.join(found)}). Load it with the config.yaml that was saved beside it"
            )
        self.load_state_dict(weights)

    def check_compatible(self, source: Mapping[str, Any], name: str = "the data") -> None:
        """Raise ValueError unless a data set or environment speaks of the same things as this policy.

        source: its metadata; of ``reference_frame``, ``action_kind``, ``action_dim``, ``state_dim`` and
        ``cameras`` those present are compared. Mixing frames or action kinds would fail silently.
        """
        problems = []
        for field in ("reference_frame", "action_kind", "action_dim", "state_dim"):
            got, wanted = source.get(field), getattr(self.config, field, None)
            if field == "reference_frame" and wanted == "camera":
                continue  # points stay in the camera's frame: the pose is not used
            if field == "state_dim" and not getattr(self.config, "use_state", True):
                continue
            if got is not None and wanted is not None and got != wanted:
                problems.append(f"{field} is {got!r}, the policy's is {wanted!r}")
        if source.get("cameras") is not None:
            absent = [camera for camera in self.config.cameras if camera not in source["cameras"]]
            if absent:
                problems.append(
                    f"cameras {', '.join(absent)} are missing (it has {', '.join(source['cameras'])})"
                )
        if problems:
            raise ValueError(f"{name} does not fit the policy: {'; '.join(problems)}")

    # Inside

    def _arrays(self, obs: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """The keys this policy reads as (B, To, ...), all of one batch size, and the leading axes they came
        with: "", "B" or "B, To"."""
        absent = [key for key in self.observation_keys if key not in obs]
        if absent or "task" not in obs:
            absent += [] if "task" in obs else ["task"]
            raise ValueError(f"the observation lacks {', '.join(absent)}; it has {', '.join(sorted(obs))}")
        taken = {key: obs[key] for key in self.observation_keys}
        taken = {key: v if isinstance(v, Tensor) else np.asarray(v) for key, v in taken.items()}
        axes = _leading_axes({key: tuple(value.shape) for key, value in taken.items()})
        new = {"": (None, None), "B": (slice(None), None), "B, To": ()}[axes]
        taken = {key: value[new] for key, value in taken.items()}
        counts = {key: len(value) for key, value in taken.items()}
        task = obs["task"]
        if not isinstance(task, str):
            task = [str(text) for text in task]
            counts["task"] = len(task)
        if len(set(counts.values())) > 1:
            raise ValueError(f"the observation's keys differ in their number of rows: {counts}")
        steps = {key: value.shape[1] for key, value in taken.items()}
        if len(set(steps.values())) > 1:
            raise ValueError(f"the observation's keys differ in their number of time steps: {steps}")
        count = next(iter(counts.values()))
        return {**taken, "task": [task] * count if isinstance(task, str) else task}, axes

    def _histories(self, rows: Sequence["_Row"]) -> dict[str, Any]:
        """Stack the rows' last To observations to (B, To, ...); a young row repeats its oldest one."""
        horizon = self.config.obs_horizon
        windows = []
        for row in rows:
            past = list(row.history)
            windows.append([past[0]] * (horizon - len(past)) + past)
        stacked: dict[str, Any] = {"task": [window[-1]["task"] for window in windows]}
        for key in self.observation_keys:
            values = torch.stack([torch.stack([step[key] for step in window]) for window in windows])
            stacked[key] = values.to(self.device)
        return stacked

    def _take_rows(self, count: int) -> list["_Row"]:
        if self._num_rows is None:
            self._num_rows = count
        if self._num_rows != count:
            raise ValueError(
                f"the policy acts for {self._num_rows} rows, got {count}: call reset() before changing that"
            )
        return [self._row(index) for index in range(count)]

    def _row(self, index: int) -> "_Row":
        if index not in self._rows:
            seed = int(torch.randint(2**62, (), generator=self._seeds))
            self._rows[index] = _Row(self.config.obs_horizon, torch.Generator().manual_seed(seed))
        return self._rows[index]


class _Row:
    """One environment's queue of actions, its last observations and its source of noise."""

    def __init__(self, obs_horizon: int, generator: torch.Generator):
        self.actions: deque[Tensor] = deque()
        self.history: deque[dict[str, Any]] = deque(maxlen=obs_horizon)
        self.generator = generator


def load_policy(path: str | Path, device: str | torch.device = "cpu") -> Policy:
    """The policy in a saved folder, in a checkpoint, or the last checkpoint of a run directory."""
    return Policy.from_pretrained(find_checkpoint(path), device)


def find_checkpoint(path: str | Path) -> Path:
    """The folder with the weights that ``path`` means: itself, or ``checkpoints/last`` of a run directory."""
    path = Path(path)
    for folder in (path, path / "checkpoints" / "last", path / "last"):
        if (folder / WEIGHTS).is_file():
            return folder
    reason = f"holds no {WEIGHTS}, nor does checkpoints/last in it" if path.is_dir() else "is not a directory"
    raise FileNotFoundError(
        f"no policy at {path}: it {reason}; give a run directory, a checkpoint or a saved policy"
    )


def policy_class(type_name: str) -> type[Policy]:
    """The class of a policy ``type``; ValueError for an unknown one."""
    if type_name not in _POLICIES:
        raise ValueError(f"unknown policy type {type_name!r}; known: {', '.join(_POLICIES)}")
    module, name = _POLICIES[type_name]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def _decode(cls: type[Policy], config: Any, where: str = "") -> tuple[type[Policy], Any]:
    """The class and the config object that ``config`` (path, mapping or config) means for ``cls``."""
    if isinstance(config, str | Path):
        where, config = str(config), configs.read(config)
    values = config
    if isinstance(config, Mapping):
        values = dict(config.get("policy", config))
        if "type" not in values and cls is not Policy:
            values["type"] = cls.config_class.type
        type_name = values.get("type")
    else:
        type_name = getattr(config, "type", None)
    if not isinstance(type_name, str):
        raise ValueError(
            f"{where or 'the config'} names no policy type; wanted type: {' or '.join(_POLICIES)}"
        )
    chosen = policy_class(type_name)
    if not issubclass(chosen, cls):
        raise ValueError(
            f"{where or 'the config'} describes a {type_name!r} policy; {cls.__name__} cannot load it"
        )
    if isinstance(values, dict):
        values = configs.decode(chosen.config_class, values, where=where or "policy")
    if not isinstance(values, chosen.config_class):
        raise ValueError(
            f"wanted a path, a mapping or a {chosen.config_class.__name__}, got {type(values).__name__}"
        )
    return chosen, values


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode is put back."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _leading_axes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What most observations have before their own axes, "", "B" or "B, To"; ValueError for the others."""
    own = {
        key: next((axes for start, axes in _AXES.items() if key.startswith(start)), None) for key in shapes
    }
    extra = {key: len(shapes[key]) - len(axes) for key, axes in own.items() if axes is not None}
    usual = Counter(extra.values()).most_common(1)[0][0] if extra else 1
    leading = {0: "", 1: "B", 2: "B, To"}.get(usual, "B")
    for key in extra:
        if len(shapes[key]) != len(own[key]) + len(leading.split()):
            wanted = ", ".join([leading, *own[key]] if leading else own[key])
            raise ValueError(
                f"{key} has shape {shapes[key]}, wanted ({wanted}): all observations come from one "
                "environment, from B (B, ...), or with time steps (B, To, ...)"
            )
    return leading


def _row_steps(obs: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    """The time steps of row ``index`` of observations (B, To, ...), copied: an environment may write the next
    one into its memory."""
    task = obs["task"][index]
    arrays = {key: _copied(value[index]) for key, value in obs.items() if key != "task"}
    count = len(next(iter(arrays.values())))
    return [{**{key: value[step] for key, value in arrays.items()}, "task": task} for step in range(count)]


def _copied(row: Any) -> Tensor:
    row = row.clone() if isinstance(row, Tensor) else torch.from_numpy(np.array(row))
    return row.float() if row.dtype == torch.float64 else row


def _row_indices(rows: Sequence[bool] | Sequence[int]) -> list[int]:
    rows = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
    return [int(i) for i in (np.flatnonzero(rows) if rows.dtype == bool else rows.reshape(-1))]


def _first(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path``, then rename: a kill or a full disk leaves the old file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
