"""Generated malformed inputs over all commands.

    python tests/faults/fuzz.py --count 500 --seed 0 --json report.json
    python tests/faults/fuzz.py --only generate/model-files:37 --seed 0 --keep   # one case again

Case ``i`` of a generator depends only on the seed and on ``i``. Exit code 1 if a case fails.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import cases
import forking
import fuzz_configs
import fuzz_data
import fuzz_lines
import fuzz_models
import fuzz_runs
from forking import say
from spoiling import GENERATORS

FAMILIES = (fuzz_configs, fuzz_data, fuzz_models, fuzz_runs, fuzz_lines)
"""What fills `GENERATORS` when it is imported."""


def plan_cases(count: int, only: str | None) -> list[tuple[str, int]]:
    """Return names of generators with the number of the case, all generators equally often."""
    if only is not None:
        name, _, number = only.partition(":")
        names = [n for n in GENERATORS if n == name or n.startswith(f"{name}/")]
        if number:
            return [(names[0], int(number))]
    else:
        names = sorted(GENERATORS, key=lambda n: (n.partition("/")[2], n))
    return [(names[i % len(names)], i // len(names)) for i in range(count)]


def main() -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="command, command/kind, or command/kind:number")
    parser.add_argument(
        "--real", type=int, default=25, help="every so many-th case is a new process"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folders of failing cases")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    forking.preload()
    import material

    base = forking.new_place()
    material.build(base / "good")
    records = []
    began = time.monotonic()
    for place, (name, number) in enumerate(plan_cases(args.count, args.only)):
        # A text seeds the generator by its digest: no hash of this process is in it.
        rng = random.Random(f"{args.seed} {name} {number}")
        folder = Path(tempfile.mkdtemp(prefix="case-", dir=base))
        folder.chmod(0o755)
        real = args.real > 0 and place % args.real == args.real - 1
        try:
            record = cases.run_case(GENERATORS[name], rng, base / "good", folder, real=real)
        except Exception as problem:
            raise RuntimeError(f"{name}:{number} of seed {args.seed} cannot be made") from problem
        record |= {"name": f"{name}:{number}", "command": name.partition("/")[0], "seed": args.seed}
        records.append(record)
        if record["verdicts"]:
            say(f"{record['name']}: {', '.join(record['verdicts'])}")
        if record["verdicts"] and args.keep:
            say(f"  kept in {folder}")
        else:
            cases.clear(folder)
    cases.report(records, args.json)
    failed = sum(bool(record["verdicts"]) for record in records)
    say(
        f"{len(records)} cases in {time.monotonic() - began:.0f} s, {failed} failed, "
        f"seed {args.seed}"
    )
    if not args.keep:
        cases.clear(base)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
