"""A policy behind a socket: the server beside the weights, a thin client beside the simulator.

Old and new simulators cannot share one environment with a policy. The client needs numpy and nothing else, no
torch; the server is given its policy and imports none either. One client at a time, on the loopback device:
nothing is encrypted and nobody is asked for a password.

A message is a prefix (magic, bytes of the header, bytes of the arrays), a JSON header, and the raw arrays in
the order in which the header lists them; nothing is ever unpickled. A request names a call of
`RolloutPolicy`, a reply holds its result or an error. B is the number of rows (simulators), A the size of an
action.
"""

import json
import math
import selectors
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["PROTOCOL", "PolicyServer", "RemoteError", "RemotePolicy", "parse_address"]

PROTOCOL = 1

_PREFIX = struct.Struct("!4sIQ")
_MAGIC = b"VLMA"
_MAX_HEADER, _MAX_ARRAYS = 1 << 20, 1 << 31
_KINDS = "biuf"  # booleans and numbers: nothing that could hold an object
_STALLED_S = 30.0


class RemoteError(RuntimeError):
    """A policy server that cannot be reached, is busy, or gave up; says what to do."""


class RemotePolicy:
    """A served policy, to be used like the policy itself by ``vilma.evaluation``.

    Args:
        address: "host:port".
        connect_timeout_s: how long to wait for the server to answer at all.
        timeout_s: for one call; the first one may compile.

    Attributes:
        description: what the server tells of its policy: ``policy`` (type, checkpoint), ``cameras``,
            ``image_size``, ``observation_keys``, ``reference_frame``, ``action_kind``, ``action_dim``,
            ``state_keys``.

    Raises:
        RemoteError: nobody listens there, it is no policy server, another version of it, or it is busy. Later
            calls raise it when the server is gone, and ValueError for what the policy refuses.
    """

    def __init__(self, address: str, *, connect_timeout_s: float = 10.0, timeout_s: float = 600.0):
        self.address, self._timeout_s = address, timeout_s
        self._needs: tuple[int, list[bool]] | None = None
        try:
            self._socket = socket.create_connection(parse_address(address), timeout=connect_timeout_s)
        except OSError as error:
            raise RemoteError(
                f"no policy server answers at {address} ({error}); start one with: vilma serve RUN --port "
                f"{parse_address(address)[1]}"
            ) from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.description = self._call("describe", {"protocol": PROTOCOL}, connect_timeout_s)[0]

    def select_action(self, obs: Mapping[str, Any]) -> np.ndarray:
        """The next actions (B, A) of all rows."""
        keys = self.description["observation_keys"]
        absent = [key for key in keys if key not in obs]
        if absent:
            raise ValueError(f"the observation lacks {', '.join(absent)}; it has {', '.join(sorted(obs))}")
        arrays = {key: np.asarray(obs[key]) for key in keys}
        reply, found = self._call("select_action", {"task": list(obs["task"])}, arrays=arrays)
        # Told along with the action, which saves a second way there and back in every step.
        self._needs = (len(found["action"]), reply["needs_observation"])
        return found["action"]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        self._needs = None
        self._call("reset", {"rows": None if rows is None else [int(row) for row in rows]})

    def seed_rows(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        self._call("seed_rows", {"rows": [int(row) for row in rows], "seeds": [int(seed) for seed in seeds]})

    def needs_observation(self, n: int) -> list[bool]:
        if self._needs is None or self._needs[0] != n:
            self._needs = (n, self._call("needs_observation", {"n": n})[0]["needs_observation"])
        return self._needs[1]

    def check_compatible(self, source: Mapping[str, Any], name: str = "the data") -> None:
        """ValueError unless an environment speaks of the same frame and action kind as the policy."""
        self._call("check_compatible", {"source": dict(source), "name": name})

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "RemotePolicy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self,
        name: str,
        arguments: Mapping[str, Any],
        timeout_s: float | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        self._socket.settimeout(timeout_s or self._timeout_s)
        try:
            _send(self._socket, {"call": name, **arguments}, arrays or {})
            reply, found = _receive(self._socket)
        except TimeoutError as error:
            self.close()
            busy = "; it may be at work for another client" if name == "describe" else ""
            raise RemoteError(
                f"the policy server at {self.address} did not answer {name} in time{busy}"
            ) from error
        except _ProtocolError as error:
            self.close()
            raise RemoteError(f"no policy server of vilma listens at {self.address}: {error}") from error
        except (OSError, EOFError) as error:
            self.close()
            raise RemoteError(
                f"the policy server at {self.address} is gone ({str(error) or 'it closed the connection'}); "
                "start it again, then run the same command again to go on"
            ) from error
        if "error" in reply:
            kind, message = reply["error"]
            if kind == "ValueError":
                raise ValueError(message)
            raise RemoteError(f"the policy server at {self.address}: {message}")
        return reply, found


class PolicyServer:
    """Serves one policy to one client after another.

    All calls happen in the thread that runs ``serve``, so the policy needs no lock. A second client is told
    that the server is busy. When a client leaves, the policy forgets its rows.

    Args:
        policy: see ``vilma.evaluation.RolloutPolicy``; actions may be tensors on any device.
        description: JSON values that the client shows and checks, see `RemotePolicy`.
        port: 0 takes a free one, see ``port``.
        on_event: called with a line of text when a client comes, leaves or fails.

    Raises:
        OSError: the port is taken.
    """

    HOST = "127.0.0.1"

    def __init__(
        self,
        policy: Any,
        description: Mapping[str, Any],
        *,
        port: int = 0,
        on_event: Callable[[str], None] = lambda text: None,
    ):
        self.policy, self.on_event = policy, on_event
        self.description = {**description, "protocol": PROTOCOL}
        self._listener = socket.create_server((self.HOST, port))
        self.port: int = self._listener.getsockname()[1]
        self._client: socket.socket | None = None
        self._is_closing = False

    @property
    def address(self) -> str:
        return f"{self.HOST}:{self.port}"

    def serve(self) -> None:
        """Answer until ``close`` is called from a signal handler or another thread, or Ctrl-C."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            try:
                while not self._is_closing:
                    # The client first: who comes as it leaves is not told that the server is busy.
                    ready = sorted(selector.select(0.5), key=lambda event: event[0].fileobj is self._listener)
                    for key, _ in ready:
                        if key.fileobj is self._listener:
                            self._welcome(selector)
                        elif not self._answer():
                            selector.unregister(self._client)
                            self._dismiss()
            finally:
                self._listener.close()
                if self._client is not None:
                    self._client.close()

    def close(self) -> None:
        self._is_closing = True

    def _welcome(self, selector: selectors.BaseSelector) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # gone before it was welcomed
            return
        client.settimeout(_STALLED_S)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._client is not None:
            with client:
                _reply_error(client, "busy", "it serves another client; wait for that one, or serve twice")
            return
        self.policy.reset()
        self._client = client
        selector.register(client, selectors.EVENT_READ)
        self.on_event("a client came")

    def _dismiss(self) -> None:
        self._client.close()
        self._client = None
        self.policy.reset()
        self.on_event("the client left")

    def _answer(self) -> bool:
        """Handle one request; False when the client is to be dismissed."""
        try:
            request, arrays = _receive(self._client)
        except EOFError:
            return False
        except (OSError, _ProtocolError) as error:
            self.on_event(f"the client is not understood: {error}")
            if isinstance(error, _ProtocolError):
                _reply_error(self._client, "protocol", str(error))
            return False
        try:
            reply, found = self._handle(request, arrays)
        except Exception as error:
            # Whatever the policy raises is the client's to hear; the server outlives it.
            self.on_event(f"{request.get('call')} failed: {error!r}")
            kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
            return _reply_error(self._client, kind, str(error) if kind == "ValueError" else repr(error))
        try:
            _send(self._client, reply, found)
        except OSError:
            return False
        except (TypeError, ValueError) as error:  # actions of objects, say: nothing was sent
            self.on_event(f"what the policy gave cannot be sent: {error}")
            return _reply_error(self._client, "protocol", f"what its policy gave cannot be sent: {error}")
        return True

    def _handle(self, request: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
        call = request.get("call")
        if call == "describe":
            if request.get("protocol") != PROTOCOL:
                raise ValueError(
                    f"the client speaks version {request.get('protocol')} of the protocol, this server "
                    f"{PROTOCOL}: install the same vilma on both sides"
                )
            return self.description, {}
        if call == "reset":
            self.policy.reset(request["rows"])
            return {}, {}
        if call == "seed_rows":
            if hasattr(self.policy, "seed_rows"):
                self.policy.seed_rows(request["rows"], request["seeds"])
            return {}, {}
        if call == "check_compatible":
            self.policy.check_compatible(request["source"], name=request["name"])
            return {}, {}
        if call == "needs_observation":
            return {"needs_observation": [bool(x) for x in self.policy.needs_observation(request["n"])]}, {}
        if call == "select_action":
            action = self.policy.select_action({**arrays, "task": request["task"]})
            action = np.asarray(action.detach().cpu() if hasattr(action, "detach") else action)
            needs = [bool(x) for x in self.policy.needs_observation(len(action))]
            return {"needs_observation": needs}, {"action": action}
        raise ValueError(f"unknown call {call!r}: install the same vilma on both sides")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[::1]:port"; ValueError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"got {text!r}, wanted an address like 127.0.0.1:8000")
    return host.removeprefix("[").removesuffix("]"), int(port)


class _ProtocolError(Exception):
    """Bytes that are no message."""


def _reply_error(client: socket.socket, kind: str, message: str) -> bool:
    try:
        _send(client, {"error": [kind, message]}, {})
    except OSError:
        return False
    return True


def _send(stream: socket.socket, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    packed = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    for key, value in packed.items():
        if value.dtype.kind not in _KINDS:
            raise ValueError(f"{key} has the dtype {value.dtype}, wanted numbers")
    listed = [[key, value.dtype.newbyteorder("<").str, value.shape] for key, value in packed.items()]
    text = json.dumps({**header, "arrays": listed}).encode()
    size = sum(value.nbytes for value in packed.values())
    stream.sendall(_PREFIX.pack(_MAGIC, len(text), size) + text)
    for value in packed.values():
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        stream.sendall(memoryview(little.reshape(-1).view(np.uint8)))


def _receive(stream: socket.socket) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One message; EOFError when the other side closed before it."""
    magic, header_size, size = _PREFIX.unpack(_read(stream, _PREFIX.size))
    if magic != _MAGIC or header_size > _MAX_HEADER or size > _MAX_ARRAYS:
        raise _ProtocolError("what came is no message of vilma")
    try:
        header = json.loads(bytes(_read(stream, header_size)))
        listed = [_checked(*entry) for entry in header.pop("arrays")]
        sizes = [dtype.itemsize * math.prod(shape) for _, dtype, shape in listed]
        if sum(sizes) != size:
            raise ValueError("its arrays do not have the announced size")
        arrays, content, start = {}, _read(stream, size), 0
        for (key, dtype, shape), length in zip(listed, sizes):
            arrays[key] = np.frombuffer(content, dtype, length // dtype.itemsize, start).reshape(shape)
            start += length
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise _ProtocolError(f"a message that cannot be read: {error}") from error
    return header, arrays


def _checked(key: Any, dtype: Any, shape: Any) -> tuple[str, np.dtype, tuple[int, ...]]:
    """The description of one array as it came; ValueError for what a peer of ours never sends."""
    if not isinstance(key, str) or not isinstance(dtype, str) or np.dtype(dtype).kind not in _KINDS:
        raise ValueError("arrays of another kind than numbers")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{key} has the shape {shape}")
    return key, np.dtype(dtype), tuple(shape)


def _read(stream: socket.socket, size: int) -> bytearray:
    """Exactly so many bytes, writable."""
    content = bytearray(size)
    view = memoryview(content)
    while view:
        read = stream.recv_into(view)
        if read == 0:
            raise EOFError
        view = view[read:]
    return content
