"""docs/howto/language_model.md: a Hugging Face model whose LoRA adapters are y."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "language_model.md"


def test_the_pages_model_learns_by_its_adapters_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers", reason="pip install 'bomemeta[llm]'")
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    names: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert "nats a byte" in capsys.readouterr().out
    metrics = names["result"].metrics
    assert metrics["test_loss"] < 4.5  # 5.55, the log of 256, at the start
    shares = [value for name, value in metrics.items() if name.startswith("domain_weights")]
    assert sum(shares) == pytest.approx(1)
    assert metrics["domain_weights_english"] == max(shares)
    model = names["AdaptedModel"](context=32, blocks=1)
    numbers = sum(parameter.numel() for parameter in model.network().parameters())
    assert f"beside a tiny model's {numbers:,}" in PAGE.read_text(encoding="utf-8")
