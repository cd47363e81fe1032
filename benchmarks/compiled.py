"""What torch.compile would gain on the CPU: a forward and a backward pass of conv4 and of the GPT of
problem data_mixing, as they are and compiled, in turn.

    OMP_NUM_THREADS=1 python -m benchmarks.compiled --rounds 20

Ratios are medians of the rounds' own, of CPU time. Compiling itself is timed apart. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bomemeta.environment import environment, environment_line
from bomemeta.nets import build_backbone
from bomemeta.nets.gpt import GPT

Loss = Callable[[], Tensor]


def conv4() -> tuple[nn.Module, Loss, Loss]:
    """Four layers of 32 filters and a linear one, 64 images of 28 x 28."""
    net = nn.Sequential(
        build_backbone("conv4", 1, 32, torch.Generator().manual_seed(0)), nn.Linear(32, 5)
    )
    images, labels = torch.randn(64, 1, 28, 28), torch.arange(64) % 5
    made: Any = torch.compile(net)
    return (
        net,
        lambda: functional.cross_entropy(net(images), labels),
        lambda: functional.cross_entropy(made(images), labels),
    )


def gpt() -> tuple[nn.Module, Loss, Loss]:
    """Two layers of width 64, 16 sequences of 64 bytes."""
    net = GPT(width=64, layers=2, heads=4, context=64)
    tokens = torch.randint(256, (16, 64), generator=torch.Generator().manual_seed(0))
    made: Any = torch.compile(net)

    def loss(of: Any) -> Tensor:
        return functional.cross_entropy(of(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return net, lambda: loss(net), lambda: loss(made)


def timed(net: nn.Module, loss: Loss) -> float:
    """CPU seconds of one step."""
    began = time.process_time()
    net.zero_grad()
    loss().backward()
    return time.process_time() - began


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, make in (("conv4", conv4), ("gpt", gpt)):
        net, plain, compiled = make()
        timed(net, plain)
        first = timed(net, compiled)
        pairs = [(timed(net, plain), timed(net, compiled)) for _ in range(options.rounds)]
        found[name] = {
            "milliseconds": 1000 * statistics.median(plain for plain, _ in pairs),
            "compiled_milliseconds": 1000 * statistics.median(made for _, made in pairs),
            "ratio": statistics.median(made / plain for plain, made in pairs),
            "first_step_s": first,
        }
    found["environment"] = environment()
    print(json.dumps({name: found[name] for name in ("conv4", "gpt")}, indent=1))
    print(environment_line(found["environment"]))
    return found


if __name__ == "__main__":
    main()
