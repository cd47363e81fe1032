"""`bomemeta reproduce`: the papers' experiments, each rerun from one command into a table and a
figure.

`experiment.py` says what an experiment is, `runner.py` does one run, `folder.py` keeps what is
done, `tables.py` writes it up; each paper's experiment is a file of its own.
"""

from bomemeta.reproduce.runs import EXPERIMENTS, reproduce

__all__ = ["EXPERIMENTS", "reproduce"]
