"""Ray Tune's schedulers as a search uses them: counted in steps of the run, and with a memory that
outlives the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from bomemeta.metrics import parse_metrics
from bomemeta.tune.locations import run_of
from bomemeta.tune.space import Domain
from bomemeta.tune.spec import Pbt


class Halving(ASHAScheduler):  # type: ignore[misc]
    """ASHA that reads what trials have reported before from their run folders.

    Tune restores trials and forgets what its scheduler knew of them: after a restart the first ones
    would be stopped by nobody.
    """

    def __init__(self, steps: int, grace_steps: int, reduction: float) -> None:
        super().__init__(
            time_attr="steps", max_t=steps, grace_period=grace_steps, reduction_factor=reduction
        )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        reached = (trial.last_result or {}).get("steps", 0)
        if reached == 0:  # a new trial, which has no folder yet
            return
        for line in parse_metrics(run_of(trial).read("metrics.jsonl") or b""):
            value = line.get(self._metric)
            if line["step"] < reached and value is not None:
                self._trial_info[trial.trial_id].on_result(
                    trial, line["step"] + 1, self._metric_op * value
                )


def population(
    space: Mapping[str, Domain], options: Pbt, domains: Mapping[str, Any], report_every_steps: int
) -> Any:
    """PBT over numbers of the solver, which stay within their domains."""
    return PopulationBasedTraining(
        time_attr="steps",
        perturbation_interval=options.every_steps or report_every_steps,
        # From a list PBT takes a neighbour; a domain's value it multiplies.
        hyperparam_mutations={
            key: sorted(domain.arguments) if domain.kind in ("choice", "grid") else domains[key]
            for key, domain in space.items()
        },
        quantile_fraction=options.quantile,
        resample_probability=options.resample,
        synch=options.together,
        custom_explore_fn=partial(_within, dict(space)),
        log_config=False,  # a trial's lineage is in its reports
    )


def _within(space: Mapping[str, Domain], values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: space[key].within(value) if key in space else value for key, value in values.items()
    }
