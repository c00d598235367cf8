"""Simulators in processes of their own: one gymnasium ``AsyncVectorEnv`` each, safe to end at any time.

A simulator that crashes or hangs takes nothing but its own episode with it, and the process that holds the
policy never builds one (no OpenGL beside the policy's device). Episodes start by an explicit seeded reset,
never by gymnasium's automatic one, so no observation crosses an episode.

Importing this module imports gymnasium; ``vilma.evaluation`` does so when an evaluation starts.
"""

import contextlib
import functools
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

# Workers are forked from a small clean server: a fork of the policy's own process would copy its threads and
# its OpenGL or CUDA state, which do not survive that.
CONTEXT = "forkserver"


class SimulatorError(RuntimeError):
    """An exception inside a simulator; the message is its traceback."""


class SimulatorFailure(RuntimeError):
    """A simulator that is gone. ``kind``: "crash" or "timeout"; ``details``: its traceback, or empty."""

    def __init__(self, kind: str, message: str, details: str = ""):
        super().__init__(message)
        self.kind, self.details = kind, details


class AsItIs(gymnasium.Space):
    """The space of anything: observations travel as the dictionaries they are, strings and all.

    A simulator's own spaces are known only once it is built, which costs seconds and happens in its process.
    """

    def contains(self, x: Any) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsItIs)


class HostedEnv(gymnasium.Env):
    """The worker's side: builds the simulator on demand and reports what goes wrong inside it.

    An action is a pair: the simulator's action, and whether the observation it leads to will be looked at.
    """

    observation_space = action_space = AsItIs()

    def __init__(self, make_env: Callable[[], gymnasium.Env]):
        self.make_env = make_env

    def build(self) -> gymnasium.Space:
        # Ctrl-C reaches the whole process group; only the policy's side answers it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with _reported():
            self.env = self.make_env()
            return self.env.action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        with _reported():
            self.env.unwrapped.render_cameras = True
            return self.env.reset(seed=seed)

    def step(self, action: tuple[np.ndarray, bool]):
        values, looked_at = action
        with _reported():
            self.env.unwrapped.render_cameras = looked_at
            return self.env.step(values)

    def dismiss(self) -> None:
        with _reported():
            self.env.close()


@contextlib.contextmanager
def _reported():
    """Turns an exception into one that survives the way to the other process, whatever its class needs."""
    try:
        yield
    except Exception:
        raise SimulatorError(traceback.format_exc()) from None


class Simulator:
    """The policy's side of one simulator process.

    Every wait has a time-out; whatever goes wrong ends the process and raises :class:`SimulatorFailure`.
    ``start`` begins (or begins again) in the background, ``ready`` waits for it.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env]):
        self.make_env = make_env
        self._envs: AsyncVectorEnv | None = None
        self.action_space: gymnasium.Space | None = None

    def start(self) -> None:
        multiprocessing.get_context(CONTEXT).set_forkserver_preload([__name__])
        try:
            self._envs = AsyncVectorEnv(
                [functools.partial(HostedEnv, self.make_env)],
                shared_memory=False,
                copy=False,
                context=CONTEXT,
                autoreset_mode=AutoresetMode.DISABLED,
            )
        except (EOFError, OSError) as error:
            raise SimulatorFailure("crash", f"the worker process did not come up: {error!r}") from error
        self.action_space = None
        self._send(self._envs.call_async, "build")

    @property
    def is_running(self) -> bool:
        return self._envs is not None

    def ready(self, timeout_s: float) -> None:
        """Wait until the simulator is built. Returns at once when it is."""
        if self.action_space is None:
            self.action_space = self._wait("call", timeout_s, "being built")[0]

    def reset_async(self, seed: int) -> None:
        self._send(self._envs.reset_async, seed=[seed])

    def reset_wait(self, timeout_s: float) -> dict[str, Any]:
        """The first observation of the episode."""
        return self._wait("reset", timeout_s, "resetting")[0][0]

    def step_async(self, action: np.ndarray, looked_at: bool) -> None:
        self._send(self._envs.step_async, ((action, looked_at),))

    def step_wait(self, timeout_s: float) -> tuple[dict[str, Any], float, bool, bool, bool]:
        """Observation, reward, terminated, truncated, success."""
        observations, reward, terminated, truncated, info = self._wait("step", timeout_s, "stepping")
        success = bool(info["success"][0]) if "success" in info else False
        return observations[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), success

    def close(self, timeout_s: float = 5.0) -> None:
        """Let the simulator tidy up, then end its process."""
        if self._envs is not None and self.action_space is not None:
            try:
                self._send(self._envs.call_async, "dismiss")
                self._wait("call", timeout_s, "closing")
            except (SimulatorFailure, gymnasium.error.AlreadyPendingCallError):
                pass  # it is being ended anyway
        self.kill()

    def kill(self) -> None:
        """End the process now, whatever it is doing."""
        if self._envs is None:
            return
        envs, self._envs = self._envs, None
        for process in envs.processes:
            process.kill()
            process.join()
        for pipe in envs.parent_pipes:
            if pipe is not None:
                pipe.close()
        envs.closed = True

    def _send(self, send: Callable, *args: Any, **kwargs: Any) -> None:
        try:
            send(*args, **kwargs)
        except OSError:
            self._fail("crash", f"the process {self._ending()}")

    def _wait(self, what: str, timeout_s: float, doing: str) -> Any:
        try:
            # gymnasium also prints what it raises, in the middle of a progress bar.
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                return getattr(self._envs, f"{what}_wait")(timeout_s)
        except multiprocessing.TimeoutError:
            self._fail("timeout", f"no answer within {timeout_s:g} s while {doing}")
        except SimulatorError as error:
            lines = str(error).strip().splitlines()
            self._fail("crash", lines[-1], str(error))
        except (EOFError, OSError):
            self._fail("crash", f"the process {self._ending()} while {doing}")

    def _ending(self) -> str:
        """How the process ended, in words."""
        process = self._envs.processes[0]
        process.join(1.0)
        code = process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return "ended" if code is None else f"ended with exit code {code}"

    def _fail(self, kind: str, message: str, details: str = "") -> None:
        self.kill()
        raise SimulatorFailure(kind, message, details) from None
