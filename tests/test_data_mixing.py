"""Problem `data_mixing`: the losses against plain PyTorch, the one-step hypergradient in closed form, what
domains there are, and parts of a batch.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional
from toy import Bench

import bomemeta
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.data.texts import InstalledTexts
from bomemeta.distributed import cluster
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.worker import Computing, ShardWorker
from bomemeta.errors import ConfigError, DataError
from bomemeta.nets.gpt import GPT
from bomemeta.problems.data_mixing import DataMixing
from bomemeta.registry import solvers

SMALL = {"width": 8, "layers": 1, "heads": 2, "context": 8, "sequences": 2, "target_sequences": 4}


def made(dtype: torch.dtype = torch.float64, **fields: Any) -> DataMixing:
    problem = DataMixing(**{**SMALL, "test_sequences": 6, **fields})
    data = InstalledTexts(domain_bytes=5000)
    data.prepare()
    problem.attach(seed=0, dtype=dtype, data=data)
    return problem


def test_the_domains_are_there_and_shuffled_bytes_are_the_others() -> None:
    texts = InstalledTexts(domain_bytes=5000).texts
    assert list(texts) == ["english", "python", "licences", "shuffled"]
    assert b"def " in texts["python"].tobytes()
    everything = np.concatenate([texts[name] for name in ("english", "python", "licences")])
    assert set(texts["shuffled"]) <= set(everything)
    pairs = {bytes(pair) for pair in pairwise(everything)}
    shuffled = list(pairwise(texts["shuffled"]))
    assert sum(bytes(pair) in pairs for pair in shuffled) < 0.9 * len(shuffled)


def test_files_are_domains_and_missing_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "plays.txt").write_text("To be or not to be. " * 100)
    files = {"plays": str(tmp_path / "plays.txt")}
    assert "plays" in InstalledTexts(domain_bytes=5000, files=files).texts
    with pytest.raises(DataError, match=r"data.files.plays: .*none.txt is no file"):
        InstalledTexts(files={"plays": str(tmp_path / "none.txt")}).prepare()


def test_the_target_keeps_its_held_out_text_from_its_domain() -> None:
    problem = made()
    whole = InstalledTexts(domain_bytes=5000).texts["english"]
    own = problem._texts[problem.domains.index("english")]
    parts = (own, problem._target, problem._test)
    assert np.array_equal(np.concatenate(parts), whole)
    assert [len(part) for part in parts] == [4500, 250, 250]


def test_a_gpt_sees_no_later_byte() -> None:
    net = GPT(8, 2, 2, 8)
    net.reset(torch.Generator().manual_seed(0))
    tokens = torch.arange(8)[None]
    other = tokens.clone()
    other[0, 5:] = 200
    assert torch.equal(net(tokens)[0, :5], net(other)[0, :5])
    assert not torch.equal(net(tokens)[0, 5:], net(other)[0, 5:])


def test_fused_and_recomputed_gpts_are_the_plain_one() -> None:
    """And the recomputed one has second derivatives too."""
    plain = GPT(8, 2, 2, 8).double()
    plain.reset(torch.Generator().manual_seed(0))
    tokens = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(1))
    weights = dict(plain.named_parameters())

    def second(net: GPT) -> torch.Tensor:
        loss = functional_call(net, weights, (tokens,)).square().mean()
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        square = torch.stack([(each**2).sum() for each in grads]).sum()
        return torch.autograd.grad(square, weights["tokens.weight"])[0]

    fused = GPT(8, 2, 2, 8, fused=True).double()
    assert torch.allclose(functional_call(fused, weights, (tokens,)), plain(tokens))
    assert torch.allclose(second(GPT(8, 2, 2, 8, recompute=True).double()), second(plain))


def plain_losses(problem: DataMixing, y: dict[str, torch.Tensor], tokens: torch.Tensor) -> Any:
    """Mean cross-entropy of each sequence, written out anew."""
    logits = functional_call(GPT(8, 1, 2, 8).double(), y, (tokens[:, :-1],))
    picked = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return -picked.mean(1)


def test_one_step_of_itd_moves_x_by_how_domains_and_target_agree() -> None:
    """d f(y - lr grad g(x, y)) / d w_d = -lr <grad f(y_1), grad L_d(y)>, through the softmax."""
    problem, lr = made(), 0.1
    bench = Bench(problem, solvers.get("itd")(inner_steps=1, inner_lr=lr, upper_lr=1.0), 1)
    batch = problem.load(range(2), 0, "train")
    w = bench.x().softmax(0).clone()
    y = {
        name: tensor.requires_grad_()
        for name, tensor in problem.init_lower(
            problem.encode(bench.upper.params, {n: t[0] for n, t in batch.items()}),
            {n: t[0] for n, t in batch.items()},
        ).items()
    }
    start = bench.x().clone()
    domains = []
    for d in range(4):
        loss = torch.stack([plain_losses(problem, y, batch["tokens"][b, d]).mean() for b in (0, 1)])
        domains.append(torch.autograd.grad(loss.mean(), list(y.values())))
    moved = {
        name: tensor - lr * sum(w[d] * domains[d][i] for d in range(4))
        for i, (name, tensor) in enumerate(y.items())
    }
    f = torch.stack([plain_losses(problem, moved, batch["target"][b]).mean() for b in (0, 1)])
    slopes = torch.autograd.grad(f.mean(), list(moved.values()))
    in_w = torch.stack(
        [-lr * sum((a * b).sum() for a, b in zip(slopes, own, strict=True)) for own in domains]
    )
    expected = start - (w * in_w - w * (w * in_w).sum())
    bench.advance()
    assert torch.allclose(bench.x(), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("weights", ["domains", "rater"])
def test_weights_add_up_to_one_and_start_equal(weights: str) -> None:
    problem = made(weights=weights)
    x = problem.init_upper(torch.Generator().manual_seed(0))
    block = {name: tensor[0] for name, tensor in problem.load([0], 0, "train").items()}
    found = problem.encode(x, block)["weights"]
    assert torch.allclose(found, torch.full((4, 2), 1 / 8, dtype=torch.float64))


def test_draws_are_by_key_and_blocks_and_inner_steps_have_their_own() -> None:
    problem = made(inner_batches=True)
    first = problem.load(range(2), 3, "train")["tokens"]
    assert torch.equal(first, made().load(range(2), 3, "train")["tokens"])
    assert torch.equal(first[1:], made().load([1], 3, "train")["tokens"])
    others = [problem.load(range(2), 4, "train"), problem.load_inner(range(2), 3, 0)]
    others.append(problem.load_inner(range(2), 3, 1))
    tokens = [first, first.flip(0), *(batch["tokens"] for batch in others)]
    assert all(not torch.equal(first, other) for other in tokens[1:])


def test_a_sampled_mixture_draws_its_domains_and_has_the_weighted_loss_as_mean() -> None:
    shares = {"english": 0.5, "python": 0.25, "licences": 0.15, "shuffled": 0.1}
    problem = made(sampled=True, mixture=shares, sequences=200)
    batch = {name: tensor[0] for name, tensor in problem.load([0], 0, "train").items()}
    x = problem.init_upper(torch.Generator().manual_seed(0))
    encoded = problem.encode(x, batch)
    assert torch.allclose(encoded["weights"], torch.full((4, 200), 1 / 800, dtype=torch.float64))
    drawn = batch["domains"].flatten().bincount(minlength=4) / 800
    # Four standard deviations of a share of 800 draws are 0.07 at most.
    assert torch.allclose(drawn.double(), torch.tensor([*shares.values()]).double(), atol=0.07)
    for d, text in enumerate(problem._texts):
        own = batch["tokens"].flatten(0, 1)[batch["domains"].flatten() == d]
        assert bytes(own[0].tolist()) in text.tobytes()
    # At other weights: each domain's own, in expectation.
    x = {"logits": torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)}
    weights = problem.encode(x, batch)["weights"].flatten()
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, batch["domains"].flatten(), weights)
    assert torch.allclose(sums, x["logits"].softmax(0), atol=0.15)
    with pytest.raises(ConfigError, match=r"problem\.sampled"):
        made(sampled=True, weights="rater")


@pytest.mark.parametrize("sampled", [False, True])
def test_parts_of_a_batch_add_up_to_it(sampled: bool) -> None:
    problem = made(sequences=3, target_sequences=5, sampled=sampled)
    whole = problem.load(range(2), 0, "train")
    x = problem.init_upper(torch.Generator().manual_seed(0))

    def answers(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        oracle = LocalOracle(problem, x, batch, "loop")
        y = oracle.init_lower()
        total = oracle.total(Term("upper", y), Term("lower", y, 0.5))
        return [*total.values, total.upper["logits"], total.lowers[1]["tokens.weight"]]

    parts = problem.micro_batches(whole, 4)
    assert len(parts) == 3
    added = [torch.stack(each).sum(0) for each in zip(*map(answers, parts), strict=True)]
    assert all(torch.allclose(a, b) for a, b in zip(added, answers(whole), strict=True))
    with pytest.raises(ConfigError, match="micro_batch: a rater"):
        made(weights="rater").micro_batches(whole, 4)
    with pytest.raises(ConfigError, match="micro_batch: Analytic"):
        bomemeta.train("analytic_quadratic", ["micro_batch=4"])


JOB: dict[str, Any] = {
    "problem": {"name": "data_mixing", **SMALL, "test_sequences": 6, "blocks": 3},
    "data": {"dataset": "installed_texts", "domain_bytes": 5000},
    "solver": {"name": "itd", "inner_steps": 1, "upper_lr": 0.5},
    "steps": 3, "shards": 3, "log": {"tensorboard": False},
}  # fmt: skip


def test_a_run_reports_weights_and_loss(tmp_path: Path) -> None:
    result = bomemeta.train(JOB, [f"output_dir={tmp_path / 'run'}"])
    shares = [v for name, v in result.metrics.items() if name.startswith("domain_weights_")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert sum(written["final"]["domain_weights"].values()) == pytest.approx(1, abs=1e-5)
    assert 0 < result.metrics["test_loss"] < 8
    other = bomemeta.train(JOB, [f"output_dir={tmp_path / 'micro'}", "micro_batch=4"])
    assert other.metrics["test_loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-4)


@pytest.mark.slow(reason="five runs, four of them over Ray")
def test_same_weights_with_any_number_of_workers_and_one_killed(tmp_path: Path) -> None:
    mortal = {**JOB, "imports": [str(Path(__file__).with_name("mortal.py"))]}
    mortal["problem"] = {**JOB["problem"], "name": "mortal_data_mixing"}

    def hashed(name: str, *keys: str) -> str:
        given = ["cpus_per_worker=0.3", f"output_dir={tmp_path / name}", *keys]
        result = bomemeta.train(mortal, given)
        killed = any("died" in note for note in result.notes)
        assert killed == any(key.startswith("problem.strike") for key in keys), result.notes
        return result.upper_sha256

    wanted = hashed("serial", "workers=0")
    strike = ["problem.strike_step=1", f"problem.strike_mark={tmp_path / 'mark'}"]
    with cluster.local(RayOptions(workers=3, cpus_per_worker=0.3), print):
        found = {count: hashed(f"workers{count}", f"workers={count}") for count in (1, 2, 3)}
        killed = hashed("killed", "workers=2", "reduce=collective", *strike)
    assert {*found.values(), killed} == {wanted}


def test_bfloat16_computes_in_it_and_keeps_x_and_y_in_float32(tmp_path: Path) -> None:
    result = bomemeta.train(JOB, [f"output_dir={tmp_path / 'a'}"])
    lowered = bomemeta.train(JOB, [f"output_dir={tmp_path / 'b'}", "compute_dtype=bfloat16"])
    assert lowered.upper["logits"].dtype == torch.float32
    assert lowered.upper_sha256 != result.upper_sha256
    assert lowered.metrics["test_loss"] == pytest.approx(result.metrics["test_loss"], rel=2e-2)
    with pytest.raises(ConfigError, match="compute_dtype"):
        bomemeta.train(JOB, ["dtype=float64", "compute_dtype=bfloat16"])


def test_products_in_bfloat16_are_made_in_it() -> None:
    problem = made(torch.float32)
    batch = problem.load(range(2), 0, "train")
    x = problem.init_upper(torch.Generator().manual_seed(0))
    seen: set[torch.dtype] = set()
    linear = functional.linear
    oracle = LocalOracle(problem, x, batch, "loop", True, torch.bfloat16)
    y = oracle.init_lower()

    def spied(*args: Any) -> torch.Tensor:
        found = linear(*args)
        seen.add(found.dtype)
        return found

    functional.linear = spied  # type: ignore[assignment]
    try:
        g = oracle.lower(y)
        adjoint = oracle.adjoint(y, y, ("lower", 1.0))
    finally:
        functional.linear = linear
    assert seen == {torch.bfloat16}
    answers = [g.value, *g.lower.values(), adjoint.upper["logits"], *adjoint.residual.values()]
    assert {tensor.dtype for tensor in answers} == {torch.float32}
    assert ShardWorker(lambda changes: problem, "auto", "cpu", Computing(torch.bfloat16))
