"""Data mixing: how much of each domain a language model should learn from, to be good on a small target
set.

    f(y)    = mean cross-entropy of the target's sequences at y
    g(x, y) = sum_d w_d(x) * mean cross-entropy of domain d's sequences at y

y is ONE network; every block draws sequences of its own, by (seed, step, block), so a step sees
`blocks` times `sequences` of each domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bomemeta.core.problem import Batch, Encoded, SharedProblem, Split
from bomemeta.core.tree import Params
from bomemeta.data.texts import Bytes, TextDomains
from bomemeta.errors import ConfigError, DataError
from bomemeta.nets.gpt import BYTES, GPT
from bomemeta.problems.blocks import block_rows
from bomemeta.registry import problems

Size = Annotated[int, Field(ge=1)]

# Second number of a key of what is drawn from the config's seed.
TRAIN, TARGET, NETWORK, DOMAINS = range(4)
# Of the target's text: what f sees, and what the result is tested on. The rest is its domain's own.
HELD_OUT = 0.1


@problems.register("data_mixing")
@dataclass(kw_only=True)
class DataMixing(SharedProblem):
    """Weights of domains for a small language model; f is its loss on held-out text of `target`.

    weights: domains  w = softmax(x), one number a domain, from `mixture`
             rater    w_i of a sequence from a small network on how often each byte occurs in it, as
                      a softmax over the step's sequences of a block; from equal weights

    `mixture`: x's start, uniform, proportional to the domains' sizes, or a number for each domain;
    with solver `lower_only` it is a fixed mixture. `sampled`: as many sequences in all, each of a
    domain drawn by `mixture` and with weight w_d(x) / mixture_d (of a fixed mixture: 1), as language
    models are trained; else `sequences` of every domain, weighed by w_d. The target's text is cut:
    its last tenth is for f, one half, and for testing, the other; its domain keeps the rest. A
    subclass may define
    `network`, and `init_lower` with `logits` where y is a part of it (docs/howto/language_model.md).
    """

    minibatches = True
    needs_data = True

    target: str = "english"
    weights: Literal["domains", "rater"] = "domains"
    mixture: Literal["uniform", "proportional"] | dict[str, Annotated[float, Field(gt=0)]] = (
        "uniform"
    )
    sampled: bool = False  # the sequences' domains are drawn by `mixture`, and not as many of each
    width: Size = 96
    layers: Size = 3
    heads: Size = 4
    context: Annotated[int, Field(ge=2)] = 64  # bytes that are predicted in a sequence
    sequences: Size = 4  # of each domain, in a block's batch
    target_sequences: Size = 8  # in a block's batch
    test_sequences: Size = 64
    inner_batches: bool = False  # inner step k draws its own sequences, not the step's
    recompute_activations: bool = False  # keep none of a layer's, compute them again going back
    blocks: Size = 2

    @property
    def num_blocks(self) -> int:
        return self.blocks

    def network(self) -> nn.Module:
        """From tokens `[n, context]` to the next ones' logits `[n, context, 256]`."""
        return GPT(
            self.width,
            self.layers,
            self.heads,
            self.context,
            recompute=self.recompute_activations,
        )

    def setup(self) -> None:
        if not isinstance(self.data, TextDomains):
            raise ConfigError(
                f"data.dataset: data_mixing wants texts by domain (installed_texts), and {type(self.data).__name__} has none"
            )
        if self.sampled and self.weights == "rater":
            raise ConfigError(
                "problem.sampled: got true with weights: rater, which knows no shares of domains to draw by: take one of the two out"
            )
        if self.width % self.heads:
            raise ConfigError(
                f"problem.heads: got {self.heads}, which does not divide problem.width = {self.width}"
            )
        texts = dict(self.data.texts)
        if self.target not in texts:
            raise ConfigError(
                f"problem.target: got {self.target!r}; the data set has {', '.join(texts)}"
            )
        whole = texts[self.target]
        held = int(len(whole) * HELD_OUT) // 2
        cut = len(whole) - 2 * held
        texts[self.target] = whole[:cut]
        self._target, self._test = whole[cut : cut + held], whole[cut + held :]
        self.domains = tuple(texts)
        self._texts = [texts[name] for name in self.domains]
        for name, text in [*texts.items(), (f"{self.target}'s held-out part", self._target)]:
            if len(text) <= self.context + 1:
                raise DataError(
                    f"problem.context: {self.context} bytes are too many for {name}, which has {len(text)}"
                )
        self._start = self._mixture({name: len(text) for name, text in texts.items()})
        self.net = self.network().to(self.dtype)
        self._tests: Batch | None = None

    def check_data(self) -> dict[str, Any]:
        digests = {
            f"domain {name}": f"{len(text)} bytes, {hashlib.sha256(text.tobytes()).hexdigest()}"
            for name, text in self.data.texts.items()
        }
        return {"data set": type(self.data).__name__, **digests}

    def _mixture(self, sizes: Mapping[str, int]) -> Tensor:
        given = self.mixture
        if given == "uniform":
            given = dict.fromkeys(sizes, 1.0)
        elif given == "proportional":
            given = {name: float(size) for name, size in sizes.items()}
        assert isinstance(given, dict)
        if set(given) != set(sizes):
            raise ConfigError(
                f"problem.mixture: got weights of {', '.join(sorted(given))}; the domains are {', '.join(sizes)}"
            )
        whole = sum(given.values())
        return torch.tensor([given[name] / whole for name in sizes], dtype=torch.float64)

    def init_upper(self, generator: torch.Generator) -> Params:
        if self.weights == "domains":
            return {"logits": self._start.log().to(self.dtype)}
        hidden = 16
        first = torch.randn(hidden, BYTES, generator=generator, dtype=torch.float64)
        return {
            "hidden.weight": first.to(self.dtype),
            "hidden.bias": torch.zeros(hidden, dtype=self.dtype),
            "weight": torch.zeros(hidden, dtype=self.dtype),
        }

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        return self._drawn(task_ids, step, 0) if split == "train" else self._held_out(task_ids)

    def load_inner(self, task_ids: Sequence[int], step: int, inner: int) -> Batch:
        return self._drawn(task_ids, step, 1 + inner)

    def _drawn(self, blocks: Sequence[int], step: int, number: int) -> Batch:
        domains = np.stack([self._domains((step, number, block)) for block in blocks])
        each = [
            np.concatenate(
                [
                    self._windows(text, int((own == d).sum()), (TRAIN, step, number, block, d))
                    for d, text in enumerate(self._texts)
                ]
            ).reshape(*own.shape, -1)
            for block, own in zip(blocks, domains, strict=True)
        ]
        target = [
            self._windows(self._target, self.target_sequences, (TARGET, step, number, block))
            for block in blocks
        ]
        found = {
            "tokens": torch.from_numpy(np.stack(each)),
            "target": torch.from_numpy(np.stack(target)),
        }
        return found | ({"domains": torch.from_numpy(domains)} if self.sampled else {})

    def _domains(self, key: tuple[int, ...]) -> np.ndarray:
        """Of each of a block's sequences, `[domains, sequences]` in rising order."""
        count = len(self.domains)
        every = np.repeat(np.arange(count), self.sequences)
        if self.sampled:
            draw = np.random.default_rng((self.seed, DOMAINS, *key))
            every = np.sort(draw.choice(count, len(every), p=self._start.numpy()))
        found: np.ndarray = every.reshape(count, self.sequences)
        return found

    def _windows(self, text: Bytes, count: int, key: tuple[int, ...]) -> np.ndarray:
        """Random windows `[count, context + 1]` of the text."""
        draw = np.random.default_rng((self.seed, *key))
        starts = draw.integers(0, len(text) - self.context, count)
        found: np.ndarray = text[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)
        return found

    def _held_out(self, blocks: Sequence[int]) -> Batch:
        if self._tests is None:
            starts = np.linspace(0, len(self._test) - self.context - 1, self.test_sequences)
            rows = self._test[starts.astype(np.int64)[:, None] + np.arange(self.context + 1)]
            numbers, scale = block_rows(self.test_sequences, self.blocks)
            every = self._drawn(range(self.blocks), 0, 0)
            self._tests = every | {
                "test": torch.from_numpy(rows.astype(np.int64))[numbers],
                "test_scale": scale.to(self.dtype),
            }
        return {name: tensor[list(blocks)] for name, tensor in self._tests.items()}

    def micro_batches(self, batch: Batch, size: int) -> list[Batch]:
        if self.weights == "rater":
            raise ConfigError(
                "micro_batch: a rater's weights are a softmax over all of a block's sequences; take it out, or raise problem.blocks"
            )
        rows = max(self.sequences * len(self.domains), self.target_sequences)
        parts = min(-(-rows // size), self.sequences, self.target_sequences)
        cut = {
            name: tensor.tensor_split(parts, 1 if name == "target" else 2)
            for name, tensor in batch.items()
        }
        return [{name: each[part] for name, each in cut.items()} for part in range(parts)]

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        """The sequences' weights `[domains, sequences]`, which add up to 1."""
        if self.weights == "domains":
            shares = upper["logits"].softmax(0)
            if self.sampled:
                each = shares / self._start.to(shares) / (self.sequences * len(self.domains))
                return {"weights": each[batch["domains"]], "shares": shares}
            weights = (shares / self.sequences)[:, None]
            return {"weights": weights.expand(-1, batch["tokens"].shape[1])}
        often = functional.one_hot(batch["tokens"], BYTES).to(self.dtype).mean(-2)
        hidden = torch.tanh(functional.linear(often, upper["hidden.weight"], upper["hidden.bias"]))
        scores = hidden @ upper["weight"]
        return {"weights": scores.flatten().softmax(0).view_as(scores)}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        net = self.network().to(self.dtype)
        if isinstance(net, GPT):
            key = np.random.SeedSequence((self.seed, NETWORK)).generate_state(1)
            net.reset(torch.Generator().manual_seed(int(key[0])))
        like = encoded["weights"]
        return {name: tensor.detach().to(like) for name, tensor in net.named_parameters()}

    def logits(self, lower: Params, tokens: Tensor) -> Tensor:
        """Of the next tokens, `[n, context, tokens]`; of parameters that are not in y, the network's own."""
        found: Tensor = functional_call(self.net, lower, (tokens,))
        return found

    def losses(self, lower: Params, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of each sequence, [n], from tokens `[n, context + 1]`."""
        logits = self.logits(lower, tokens[:, :-1])
        after = tokens[:, 1:]
        each = functional.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="none")
        return each.view(after.shape).mean(1)

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return self.losses(lower, batch["target"]).sum() / self.target_sequences

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        losses = self.losses(lower, batch["tokens"].flatten(0, 1))
        return (encoded["weights"].flatten() * losses).sum()

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """`test_loss` on the target's test part, in nats a byte, and each domain's weight."""
        shares = encoded["shares"] if self.sampled else encoded["weights"].sum(1)
        return {
            "test_loss": (batch["test_scale"] * self.losses(lower, batch["test"])).sum(),
            **{f"domain_weights_{name}": shares[d] for d, name in enumerate(self.domains)},
        }

    def reported(self, upper: Params) -> dict[str, Any]:
        if self.weights == "rater":
            return {}
        shares = upper["logits"].softmax(0).tolist()
        return {"domain_weights": dict(zip(self.domains, shares, strict=True))}
