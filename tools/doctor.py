"""Check the installation of a simulator suite and print the exact steps that are missing."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

# Suite -> its module, which has STEPS (how to install it, in words and commands) and
# checks(source: Path | None) -> an iterable of vilma.envs.installation.Check.
SUITES = {
    "calvin": "vilma.envs.calvin_install",
    "libero": "vilma.envs.libero_install",
    "robocasa": "vilma.envs.robocasa_install",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma doctor", description=__doc__)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument(
        "--source", type=Path, metavar="DIR", help="where the public repository of the suite was cloned to"
    )
    parser.add_argument(
        "--requirements", action="store_true", help="only print the packages that pip has to install"
    )
    options = parser.parse_args(arguments)
    module = importlib.import_module(SUITES[options.suite])
    if options.requirements:
        print("\n".join(requirement for _, _, requirement in getattr(module, "PACKAGES", ())))
        return 0
    is_ready = True
    for check in module.checks(options.source):
        missing = "optional" if check.is_optional else "MISSING"
        print(f"{'ok' if check.ok else missing:<8}  {check.name}: {check.found}", flush=True)
        if not check.ok and check.remedy:
            print("".join(f"            {line}\n" for line in check.remedy.splitlines()), end="")
        is_ready = is_ready and (check.ok or check.is_optional)
    if is_ready:
        print(f"{options.suite} is ready")
        return 0
    print(f"\nHow to install {options.suite}:\n\n{module.STEPS.strip()}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
