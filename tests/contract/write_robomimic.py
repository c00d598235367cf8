"""Records two demonstrations of robosuite's Lift with depth, as `vilma collect-robosuite` does."""

import sys

from vilma.tools.collect_robosuite import main

if __name__ == "__main__":
    arguments = ["--task", "Lift", "--demos", "2", "--seed", "3", "--workers", "1", "--out", sys.argv[1]]
    sys.exit(main(arguments))
