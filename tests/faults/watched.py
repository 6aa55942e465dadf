"""``train.py`` with a fault in it, which the environment describes.

FAULTS_STRIKE holds arguments of `strike`, FAULTS_RANK_N more arguments of the command on rank
N, FAULTS_FOLDER_N the folder in which it works, and FAULTS_BYTES_N the size beyond which it can
write no file.
"""

import json
import os
import resource
import sys

from watching import strike_by_environment

from quietstar.cli.main import main

if __name__ == "__main__":
    strike_by_environment()
    rank = os.environ.get("RANK", "0")
    if size := os.environ.get(f"FAULTS_BYTES_{rank}"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    if folder := os.environ.get(f"FAULTS_FOLDER_{rank}"):
        if file := os.environ.get(of_deepspeed := "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            os.environ[of_deepspeed] = os.path.abspath(file)
        os.chdir(folder)
    more = json.loads(os.environ.get(f"FAULTS_RANK_{rank}", "[]"))
    sys.exit(main(["train", *sys.argv[1:], *more]))
