"""How long one image takes: `predict` in this process, and the HTTP call to a real server.

    bomemeta train quickstart output_dir=runs/quickstart
    python -m benchmarks.serve_latency runs/quickstart --json latency.json

Photographs of noise, JPEG, 300 x 200; five classes of five examples. Percentiles of `--calls` calls,
one after the other, after ten that do not count.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
from PIL import Image

from bomemeta.environment import environment
from bomemeta.files import written_whole
from bomemeta.predict.classifier import few_shot_classifier

WAYS, SHOTS, WARM_UP = 5, 5, 10
START_S = 300.0


def photograph(seed: int) -> bytes:
    """A JPEG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (200, 300, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def percentiles(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Milliseconds of a call."""
    times = []
    for number in range(WARM_UP + calls):
        started = time.perf_counter()
        call()
        if number >= WARM_UP:
            times.append(1000 * (time.perf_counter() - started))
    return {"p50_ms": float(np.percentile(times, 50)), "p95_ms": float(np.percentile(times, 95))}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    options = parser.parse_args(argv)
    labels = [f"class {number % WAYS}" for number in range(WAYS * SHOTS)]
    examples, new = [photograph(number) for number in range(len(labels))], photograph(1000)
    classifier = few_shot_classifier(options.run_dir).fit(examples, labels)
    result: dict[str, Any] = {
        "predict": percentiles(lambda: classifier.predict([new]), options.calls)
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bomemeta", "serve", options.run_dir, "--port", str(port)]
        server = subprocess.Popen([*command, "--tenants", folder])
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S) as http:
                _wait(http, server)
                files = [("images", (f"{n}.jpg", image)) for n, image in enumerate(examples)]
                fitted = http.post("/tenants/one/fit", files=files, data={"labels": labels})
                fitted.raise_for_status()
                result["head_bytes"] = fitted.json()["head_bytes"]
                asked = {"files": [("images", ("new.jpg", new))]}
                result["http"] = percentiles(
                    lambda: http.post("/tenants/one/predict", **asked).raise_for_status(),
                    options.calls,
                )
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()
    result["environment"] = environment()
    with written_whole(options.json) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps({name: result[name] for name in ("predict", "http", "head_bytes")}))
    return result


def _wait(http: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            if http.get("/tenants").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError("the server did not start")


if __name__ == "__main__":
    main()
