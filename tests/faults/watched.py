"""``train.py`` with a signal at a chosen moment: FAULTS_STRIKE holds arguments of `strike`."""

import sys

from watching import strike_by_environment

from quietstar.cli.main import main

if __name__ == "__main__":
    strike_by_environment()
    sys.exit(main(["train", *sys.argv[1:]]))
