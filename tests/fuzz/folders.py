"""Run folders: checkpoints, edited or damaged, and the files beside them. A run continues to the same
bits and figures, or says why not.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from fuzz import mutate
from fuzz.outcome import Silent

CONFIG = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
    "solver": {"name": "bome", "inner_steps": 1, "upper_optimizer": "adam"},
    "log": {"tensorboard": False},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "steps": 4,
}
LENGTH = 5  # of the run taken further


@functools.cache
def _run() -> tuple[Path, str]:
    """A run of 4 steps, and the hash of x when it is taken to LENGTH."""
    from bomemeta import api

    folder = Path(tempfile.mkdtemp(prefix="bomemeta-fuzz-run-"))
    api.train({**CONFIG, "output_dir": str(folder / "run")})
    shutil.copytree(folder / "run", folder / "further")
    result = api.resume(folder / "further", [f"steps={LENGTH}"])
    return folder / "run", result.upper_sha256


def checkpoint(rng: random.Random, folder: Path) -> None:
    """The newest checkpoint is changed; the run resumes from it."""
    from bomemeta import api
    from bomemeta.checkpoint import Checkpoint, load_latest

    source, sha = _run()
    run = folder / "run"
    shutil.copytree(source, run)
    path = run / "checkpoints" / "step_00000004.pt"
    before = torch.load(path, weights_only=True)
    fields = {name: value for name, value in before.items() if name in Checkpoint._fields}
    if rng.random() < 0.7:
        path.write_bytes(mutate.data(rng, path.read_bytes()))
        edited = False
    else:
        values, edited = _edited(rng, copy.deepcopy(before)), True
        buffer = io.BytesIO()
        torch.save(values, buffer)
        path.write_bytes(buffer.getvalue())
    if not edited and rng.random() < 0.7:
        loaded = load_latest(path.parent)
        if loaded.checkpoint.step == 4 and not _equal(fields, loaded.checkpoint._asdict()):
            raise Silent("a damaged checkpoint was loaded")
        return
    result = api.resume(run, [f"steps={LENGTH}"])
    if result.upper_sha256 != sha or result.steps != LENGTH:
        raise Silent(
            "an edited checkpoint was taken" if edited else "a damaged checkpoint was taken"
        )


def _edited(rng: random.Random, values: dict[str, Any]) -> Any:
    """An entry taken out, put in, or of another kind."""
    section = rng.choice([*values, "upper", "lower", "solver"])
    other: Any = rng.choice((None, 3, -1, "x", [], {}, 1.5, float("nan"), torch.zeros(2), True))
    change = rng.randrange(6)
    inside = values.get(section)
    if change == 0:
        values.pop(section)
    elif change == 1:
        values[section] = other
    elif change == 2:
        return rng.choice((None, [], {}, 3, torch.zeros(3), [values], {"step": 4}))
    elif not isinstance(inside, dict) or not inside:
        values["more"] = other
    else:
        name = rng.choice(list(inside))
        tensor = inside[name]
        if isinstance(tensor, torch.Tensor) and rng.random() < 0.6:
            inside[name] = rng.choice((
                tensor.double(), tensor.int(), tensor.bool(), tensor[:1], tensor.reshape(1, -1), tensor.repeat(2),
                tensor.to(torch.bfloat16), tensor.reshape(-1)[:0], tensor * float("nan"), tensor.to_sparse(),
            ))  # fmt: skip
        elif change == 3:
            del inside[name]
        elif change == 4:
            inside[rng.choice(("more", 7, -1))] = inside.pop(name)
        else:
            inside[name] = other
    return values


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and all(
            name in b and _equal(value, b[name]) for name, value in a.items()
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


JUNK = (b"", b"{", b"[]", b"{}", b"null", b"3", b'{"config": null}', b'{"config": {}}', b"\xff\xfe", b"[" * 100000,
        b'{"steps": 1e999}', b"imports: null\n", b"imports: 3\n", b"- a\n", b"{" * 2000, b"NaN")  # fmt: skip


def run_folder(rng: random.Random, folder: Path) -> None:
    """config.yaml, result.json or metrics.jsonl is changed; --auto-resume or resume."""
    from bomemeta import api

    source, sha = _run()
    run = folder / "run"
    shutil.copytree(source, run)
    before = json.loads((run / "result.json").read_text())
    name = rng.choice(("config.yaml", "result.json", "metrics.jsonl", "other"))
    if name == "other":
        _more(rng, run)
    elif rng.random() < 0.5:
        (run / name).write_bytes(mutate.data(rng, (run / name).read_bytes()))
    elif rng.random() < 0.5:
        (run / name).write_bytes(rng.choice(JUNK))
    elif name == "config.yaml":
        (run / name).write_text(mutate.text(rng, (run / name).read_text()), errors="surrogatepass")
    else:
        content = (run / name).read_bytes()
        digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
        at = rng.choice(digits)
        (run / name).write_bytes(
            content[:at] + bytes([48 + (content[at] - 47) % 10]) + content[at + 1 :]
        )
    if rng.random() < 0.5:
        result = api.train({**CONFIG, "output_dir": str(run)}, auto_resume=True)
        if result.upper_sha256 != before["upper_sha256"]:
            raise Silent(f"--auto-resume over a changed {name} gave another x")
        values = {k: v for k, v in before["metrics"].items() if not k.endswith("_s")}
        got = {k: v for k, v in result.metrics.items() if not k.endswith("_s")}
        if got != values:
            raise Silent(f"--auto-resume over a changed {name} gave other metrics")
    else:
        result = api.resume(run, [f"steps={LENGTH}"])
        if result.upper_sha256 != sha:
            raise Silent(f"resume over a changed {name} gave another x")
        if _lines(run)[:4] != _lines(source) and not result.notes:
            raise Silent(f"resume over a changed {name} kept a changed metrics.jsonl")


def _lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def _more(rng: random.Random, run: Path) -> None:
    """Files that are not ours, and ours under other names."""
    checkpoints = run / "checkpoints"
    name = rng.choice(
        ("step_best.pt", "step_.pt", "step_4.pt", "step_00000009.pt", "step_00000004.pt.bak", "x")
    )
    content = rng.choice((b"", b"x", (checkpoints / "step_00000002.pt").read_bytes()))
    (checkpoints / name).write_bytes(content)
    board = run / "tensorboard"
    board.mkdir()
    (
        board
        / rng.choice(
            ("events.out.tfevents.foo", "events.out.tfevents.", "events.out.tfevents.99x.y")
        )
    ).write_bytes(content)
