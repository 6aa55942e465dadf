"""Reasoning benchmarks with and without thoughts (the same as ``quietstar eval``).

python eval/run.py --model DIR --tasks gsm8k,commonsense_qa [--thoughts both] [--controls] ...
"""

import sys

from quietstar.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
