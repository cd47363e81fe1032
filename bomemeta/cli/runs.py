"""Commands that train and evaluate."""

from __future__ import annotations

from bomemeta.cli.app import ConfigName, Overrides, RunDir, app, reported, run_and_show


@app.command()
def train(
    config: ConfigName,
    overrides: Overrides = None,
) -> None:
    """Meta-train as CONFIG says, then meta-test and print the result.

    The run's folder is printed first: output_dir=DIR chooses it, runs/NAME is the default. Ctrl-C stops after the
    current step; `bomemeta resume` goes on from there to the same result.
    """
    with reported():
        from bomemeta import api

        run_and_show(lambda listener: api.train(config, overrides or (), listener=listener))


@app.command()
def resume(run_dir: RunDir, overrides: Overrides = None) -> None:
    """Go on with a run that was interrupted, to the same bits.

    Keys that cannot change the result may be set, such as workers=4 or log.every_steps=5.
    """
    with reported():
        from bomemeta import api

        run_and_show(lambda listener: api.resume(run_dir, overrides or (), listener=listener))


@app.command("eval")
def evaluate(run_dir: RunDir, overrides: Overrides = None) -> None:
    """Meta-test a run's last checkpoint again.

    Keys that cannot change training may be set, as in evaluation.episodes=2000.
    """
    with reported():
        from bomemeta import api

        run_and_show(lambda listener: api.evaluate(run_dir, overrides or (), listener=listener))
