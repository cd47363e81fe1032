"""What a call asks of a GPU, counted without one: on the device that the tests simulate
(tests/elsewhere.py).

    BOMEMETA_DATA=DATA python -m benchmarks.device_counts --json OUT.json

A call is one shard in one round. `operations` are those that a GPU would launch, views left out.
`there` and `back` are copies from and to the CPU, which waits for each that comes back. One step,
after three others: what stays on the device is there by then.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bomemeta.assembly import build_problem, open_transport, torch_threads, trainer_of
from bomemeta.config import load_config
from bomemeta.core.problem import SharedProblem
from bomemeta.environment import environment
from bomemeta.files import written_whole

CONFIGS = (
    "omniglot_5w1s",
    "omniglot_20w5s",
    "omniglot_5w1s_maml",
    "hyper_cleaning_mnist_bome",
    "l2_newsgroups_bome",
)
KEYS = ("evaluation.every_steps=null", "log.tensorboard=false", "threads=1", "workers=0")
NOT_LAUNCHED = {
    "detach",
    "lift_fresh",
    "alias",
    "empty",
    "_unsafe_view",
}  # beside what torch calls a view


def counted(config: str, keys: Sequence[str]) -> dict[str, Any]:
    elsewhere = importlib.import_module("elsewhere").elsewhere
    settings = load_config(config, [*KEYS, *keys])
    with elsewhere() as seen, torch_threads(1):
        problem = build_problem(settings)
        with (
            closing(open_transport(settings, print)) as transport,
            trainer_of(settings, problem=problem, transport=transport) as trainer,
        ):
            trainer.advance(3)
            for what in seen:
                what.clear()
            (reported,) = trainer.advance(1)
            blocks = problem.num_tasks if isinstance(problem, SharedProblem) else None
            tasks = blocks or trainer.step_run(0).tasks
    launched = {
        op: times
        for op, times in seen.ran.items()
        if not op.is_view and op._schema.name.removeprefix("aten::") not in NOT_LAUNCHED
    }
    row = {
        "config": config,
        "calls": int(reported["reduces"]) * min(settings.shards, tasks),
        "operations": sum(launched.values()),
        "there": len(seen.sent),
        "back": len(seen.brought),
        "bytes_there": sum(seen.sent),
        "bytes_back": sum(seen.brought),
    }
    print(row, flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", nargs="+", default=[f"configs/{name}.yaml" for name in CONFIGS])
    parser.add_argument("--set", nargs="*", default=[], help="overrides for all of them")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    result = {
        "rows": [counted(config, options.set) for config in options.config],
        "environment": environment(),
    }
    with written_whole(options.json) as file:
        file.write(json.dumps(result, indent=1).encode())
    return result


if __name__ == "__main__":
    main()
