"""The parts of `benchmarks/on_device.py`, one file each."""
