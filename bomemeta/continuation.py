"""What a resumed run shares with the run before it, and what changes where it is to be longer."""

from __future__ import annotations

from bomemeta.checkpoint import Checkpoint
from bomemeta.config import Config, differing_keys
from bomemeta.core.solver import Solver
from bomemeta.core.upper import schedule_factor
from bomemeta.errors import ConfigError
from bomemeta.run_folder import RunFolder


def longer_notes(solver: Solver, saved: Checkpoint, steps: int | None) -> list[str]:
    """What another number of steps changes from here on, a sentence each; nothing where it is the
    same number.
    """
    before = saved.config.get("steps")
    if before is None or steps is None or before == steps or saved.step == 0:
        return []
    found = []
    for name in ("upper_schedule", "lower_schedule"):
        if getattr(solver, name, "constant") != "cosine":
            continue
        warmup = getattr(solver, "upper_warmup_steps", 0) if name == "upper_schedule" else 0
        now, *ends = (solver.upper_steps(n) for n in (saved.step, before, steps))
        at = [schedule_factor("cosine", now, n, warmup=warmup) for n in ends]
        rate = name.replace("schedule", "lr")
        found.append(
            f"steps was {before} and is {steps}: solver.{name}: cosine falls to 0 over `steps`, so at step {saved.step} solver.{rate} is "
            f"multiplied by {at[1]:.3g} and not by {at[0]:.3g}. The result is not that of {steps} steps from the start: for that, "
            "train anew"
        )
    return found


def check_continues(settings: Config, folder: RunFolder) -> None:
    """Raises ConfigError where the folder's run is not the config's, naming the keys."""
    there, _ = folder.recorded_config()
    lines = [f"  {key}: there {a!r}, config {b!r}" for key, a, b in differing_keys(there, settings)]
    if there.get("seeds", 1) != settings.seeds:
        lines.append(f"  seeds: there {there.get('seeds', 1)!r}, config {settings.seeds!r}")
    if lines:
        raise ConfigError(
            f"output_dir: {folder.location} holds another run, which --auto-resume does not resume:\n"
            + "\n".join(lines)
            + "\nSet these keys back, or choose another output_dir; `bomemeta resume` with steps=N trains longer"
        )
