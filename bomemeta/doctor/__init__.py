"""`bomemeta doctor`: what a run will need, against what is there, before it starts.

`dry.py` runs a step on a few tasks and counts; `machine.py` and `cluster.py` look at this machine
and at a cluster's nodes; `data.py`, `memory.py`, `traffic.py`, `bundles.py` and `storage.py` make
findings of it; `doctor.py` does it in order.
"""

from bomemeta.callable_module import callable_as
from bomemeta.doctor.doctor import examine
from bomemeta.doctor.findings import DoctorReport, Finding

__all__ = ["DoctorReport", "Finding", "examine"]

callable_as(__name__, "doctor")
