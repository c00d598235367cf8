"""Serve a policy to a simulator in another environment: `vilma eval SUITE host:port` acts with it."""

import argparse
import signal
import sys
from collections.abc import Sequence

from vilma.serving import PolicyServer
from vilma.tools.eval import find_policy, load, policy_facts

PORT = 8600


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vilma serve",
        description=__doc__,
        epilog="The other environment needs the simulator, numpy, gymnasium, pyyaml and "
        "`pip install --no-deps vilma`; there: vilma eval SUITE 127.0.0.1:PORT. One client at a time, on "
        "this machine only.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run directory, one of its checkpoints or a lone policy")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0 takes a free one")
    parser.add_argument(
        "--checkpoint", default="last", metavar="last|best", help="which one of a run directory"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", help="default: a GPU if there is one")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65536:
        raise ValueError(f"--port is {options.port}, wanted 0 to 65535")
    if options.threads < 1:
        raise ValueError(f"--threads is {options.threads}, wanted at least 1")
    checkpoint, run_dir, _ = find_policy(options.run, options.checkpoint)
    policy = load(checkpoint, options.device, options.threads)
    server = PolicyServer(
        policy,
        policy_facts(policy, checkpoint, run_dir),
        port=options.port,
        on_event=lambda text: print(text, flush=True),
    )
    # What a service is ended by; a shell's job in the background takes no notice of Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"serving {options.run} on {server.address}; Ctrl-C ends it", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
