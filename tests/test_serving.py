"""A policy behind a socket: the same actions, and every way in which a peer can be missing, busy or wrong."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from vilma import serving
from vilma.serving import PolicyServer, RemoteError, RemotePolicy, parse_address

KEYS = ["observation.images.front", "observation.state"]


class Counter:
    """Acts with the brightness of its picture and counts its steps; refuses states that are not finite."""

    def __init__(self):
        self.resets, self.seeds, self.steps, self.seen = [], {}, 0, []

    def select_action(self, obs):
        if not np.isfinite(obs["observation.state"]).all():
            raise ValueError("observation.state is not finite")
        if obs["task"][0] == "break":
            raise RuntimeError("broken inside")
        self.steps += 1
        self.seen.append({key: (np.asarray(v).dtype, np.shape(v)) for key, v in obs.items()})
        bright = obs["observation.images.front"].reshape(len(obs["task"]), -1).mean(1)
        return np.stack([bright, obs["observation.state"][:, 0], np.full(len(bright), self.steps)], 1)

    def reset(self, rows=None):
        self.resets.append(rows)

    def seed_rows(self, rows, seeds):
        self.seeds |= dict(zip(rows, seeds))

    def needs_observation(self, n):
        return [self.steps % 2 == 0] * n

    def check_compatible(self, source, name="the data"):
        if source["reference_frame"] != "world":
            raise ValueError(f"{name} does not fit the policy: reference_frame")


@pytest.fixture
def served():
    policy, events = Counter(), []
    server = PolicyServer(policy, {"observation_keys": KEYS, "cameras": ["front"]}, on_event=events.append)
    server.policy_seen, server.events = policy, events
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield server
    server.close()
    thread.join(5)
    assert not thread.is_alive()


def observation(rows=2, value=100):
    return {
        "observation.images.front": np.full((rows, 3, 5, 7), value, np.uint8),
        "observation.state": np.arange(rows * 2, dtype=np.float64).reshape(rows, 2),
        "observation.depth.front": np.ones((rows, 5, 7), np.float32),
        "task": [f"go {i}" for i in range(rows)],
    }


def test_a_served_policy_acts_like_itself(served):
    with RemotePolicy(served.address) as remote:
        assert remote.description["cameras"] == ["front"]
        remote.reset()
        remote.reset([1])
        remote.seed_rows([0, 1], [7, 2**40])
        assert remote.needs_observation(2) == [True, True]
        for obs in (observation(), observation(value=3)):
            expected = np.asarray(Counter().select_action(obs))[:, :2]
            action = remote.select_action(obs)
            assert action.dtype == np.float64 and np.array_equal(action[:, :2], expected)
        assert remote.needs_observation(2) == [True, True]
    policy = served.policy_seen
    assert policy.resets[1:3] == [None, [1]] and policy.seeds == {0: 7, 1: 2**40}
    assert policy.seen[0] == {
        "observation.images.front": (np.dtype(np.uint8), (2, 3, 5, 7)),
        "observation.state": (np.dtype(np.float64), (2, 2)),
        "task": (np.asarray(["go 0"]).dtype, (2,)),
    }, "only what the policy reads travels"


def test_what_is_needed_next_costs_no_second_way(served):
    with RemotePolicy(served.address) as remote:
        remote.select_action(observation())
        remote._call = None  # nothing more may be asked
        assert remote.needs_observation(2) == [False, False]


def test_errors_of_the_policy_reach_the_client_and_the_server_lives_on(served):
    with RemotePolicy(served.address) as remote:
        bad = observation()
        bad["observation.state"][0, 0] = np.nan
        with pytest.raises(ValueError, match="state is not finite"):
            remote.select_action(bad)
        with pytest.raises(RemoteError, match="broken inside"):
            remote.select_action(observation() | {"task": ["break"] * 2})
        with pytest.raises(ValueError, match="robocasa does not fit the policy: reference_frame"):
            remote.check_compatible({"reference_frame": "base"}, name="robocasa")
        with pytest.raises(ValueError, match=r"the observation lacks observation\.state; it has"):
            remote.select_action({k: v for k, v in observation().items() if k != "observation.state"})
        assert remote.select_action(observation()).shape == (2, 3)


def test_a_second_client_is_told_and_the_next_one_served(served):
    with RemotePolicy(served.address), pytest.raises(RemoteError, match="serves another client"):
        RemotePolicy(served.address)
    deadline = time.monotonic() + 5
    while "the client left" not in served.events and time.monotonic() < deadline:
        time.sleep(0.02)
    with RemotePolicy(served.address) as remote:
        assert remote.select_action(observation()).shape == (2, 3)


def test_other_peers_and_versions_are_refused(served):
    with socket.create_connection(parse_address(served.address)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"no message of vilma" in stranger.recv(1000)
    for header_size, size in ((2**20 + 1, 0), (2, 2**31 + 1)):  # refused before anything is set aside for it
        with socket.create_connection(parse_address(served.address)) as stranger:
            stranger.sendall(b"VLMA" + header_size.to_bytes(4, "big") + size.to_bytes(8, "big"))
            assert b"no message of vilma" in stranger.recv(1000)
    with socket.create_connection(parse_address(served.address)) as stranger:
        text = json.dumps({"call": "select_action", "arrays": [["x", "|O", [1]]]}).encode()
        stranger.sendall(b"VLMA" + len(text).to_bytes(4, "big") + (8).to_bytes(8, "big") + text)
        assert b"another kind than numbers" in stranger.recv(1000), "objects never travel"
    for header in (
        {"call": "reset", "arrays": [["x", "|u1", [-1, 0]]]},
        {"call": "reset", "arrays": [["x", "|u1", [0, 2**62, 2**62]]]},
        {"call": "reset", "arrays": [["x", "|u1", [0] + [1] * 99]]},
        {"call": "reset", "arrays": [[["x"], "|u1", [0]]]},
        {"call": "reset", "arrays": [["x", "|u1", [True, 0]]]},
        {"call": "reset", "arrays": [["x", "|u1", [2**32, 2**32]]]},
        {"call": "reset", "arrays": [["x"]]},
        {"call": "reset"},
        "[" * 100_000,
    ):
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        with socket.create_connection(parse_address(served.address)) as stranger:
            stranger.sendall(b"VLMA" + len(text).to_bytes(4, "big") + bytes(8) + text)
            assert b"a message that cannot be read" in stranger.recv(1000), text[:80]
    with socket.create_connection(parse_address(served.address)) as newer:
        serving._send(newer, {"call": "describe", "protocol": 99}, {})
        assert "install the same vilma on both sides" in serving._receive(newer)[0]["error"][1]


def test_what_the_policy_gives_is_told_when_it_cannot_be_sent(served):
    with RemotePolicy(served.address) as remote:
        served.policy_seen.select_action = lambda obs: np.array([[object()]] * 2)
        with pytest.raises(RemoteError, match="cannot be sent: action has the dtype object"):
            remote.select_action(observation())
        remote.reset()


def test_nobody_there_and_somebody_else_there():
    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n"))
        thread.start()
        with pytest.raises(RemoteError, match="no policy server of vilma listens"):
            RemotePolicy(f"127.0.0.1:{other.getsockname()[1]}")
        thread.join()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RemoteError, match="did not answer describe in time"):
            RemotePolicy(f"127.0.0.1:{port}", connect_timeout_s=0.3)
        with pytest.raises(OSError, match=r"(?i)address already in use"):
            PolicyServer(Counter(), {}, port=port)
    with pytest.raises(RemoteError, match=f"no policy server answers .* vilma serve RUN --port {port}"):
        RemotePolicy(f"127.0.0.1:{port}")
    for text in ("localhost", "localhost:0", "localhost:99999", ":80"):
        with pytest.raises(ValueError, match="wanted an address like"):
            parse_address(text)
    assert parse_address("[::1]:80") == ("::1", 80)


def test_a_server_that_is_killed_is_named():
    code = (
        "from vilma.serving import PolicyServer\n"
        "class P:\n"
        "    def reset(self, rows=None): pass\n"
        "server = PolicyServer(P(), {'observation_keys': []})\n"
        "print(server.address, flush=True)\n"
        "server.serve()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        remote = RemotePolicy(process.stdout.readline().strip())
        process.kill()
        process.wait()
        with pytest.raises(RemoteError, match=r"is gone .* run the same command again"):
            remote.reset()
    finally:
        process.kill()


def test_the_simulators_side_needs_neither_torch_nor_any_package_of_ours():
    blocked = (
        "torch",
        "triton",
        "timm",
        "torchvision",
        "draccus",
        "safetensors",
        "rich",
        "h5py",
        "robosuite",
    )
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked())
import vilma.envs, vilma.evaluation, vilma.serving, vilma.rollout, vilma.workers, vilma.summaries
import vilma.tools.eval, vilma.cli, vilma.tools.compare
print(sorted(m for m in sys.modules if m.split(".")[0] in {blocked}))
"""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
