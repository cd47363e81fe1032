"""`python tests/fuzz --count N --seed S [--kind KIND [--number I]]`: counts, and where it fails.

Processes of their own take blocks of inputs, so that one that dies is a fault like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.kinds import KINDS, shares
from fuzz.outcome import Counts, judge, quiet

MEMORY = 8 * 2**30  # bytes: what asks for more fails here, and does not end the machine
BLOCK = 200  # inputs of a process: also what is lost when memory leaks


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="this kind alone")
    parser.add_argument("--number", type=int, help="this input alone, with its traceback")
    parser.add_argument("--limit-s", type=float, default=20.0, help="seconds for one input")
    given = parser.parse_args()
    if given.number is not None:
        target = KINDS[given.kind].target
        target(random.Random(f"{given.seed}/{given.kind}/{given.number}"), Path(tempfile.mkdtemp()))
        return 0
    quiet()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    started, total = time.time(), {kind: Counts() for kind in KINDS}
    blocks = [
        (kind, range(start, min(start + BLOCK, count)))
        for kind, count in shares(given.count, given.kind).items()
        for start in range(0, count, BLOCK)
    ]
    while blocks:
        kind, numbers = blocks.pop(0)
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(read)
            _block(kind, numbers, given.seed, given.limit_s, write)
        os.close(write)
        at = numbers.start
        with os.fdopen(read, "rb") as pipe:
            while line := pipe.readline():
                outcome, what = json.loads(line)
                total[kind].add(outcome, what, at)
                at += 1
        _, status = os.waitpid(pid, 0)
        if status != 0:
            total[kind].add("raw", f"the process died (status {status})", at)
            if at + 1 < numbers.stop:
                blocks.insert(0, (kind, range(at + 1, numbers.stop)))
    seconds = time.time() - started
    faults = 0
    for kind, counts in total.items():
        if counts.of:
            faults += counts.of["raw"] + counts.of["silent"]
            print(
                f"{kind}: {sum(counts.of.values())} inputs, "
                + ", ".join(f"{n} {o}" for o, n in sorted(counts.of.items()))
            )
            for what, number in counts.wrong.most_common():
                print(f"    {number} {what}  (--kind {kind} --number {counts.example[what]})")
    print(f"{given.count} inputs, seed {given.seed}: {faults} faults, {seconds:.0f} s")
    return 1 if faults else 0


def _block(kind: str, numbers: range, seed: int, limit_s: float, write: int) -> None:
    code = 1
    try:
        with os.fdopen(write, "wb") as pipe:
            for number in numbers:
                found = judge(kind, KINDS[kind].target, seed, number, limit_s)
                pipe.write(json.dumps(found).encode() + b"\n")
                pipe.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
