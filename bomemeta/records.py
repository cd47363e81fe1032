"""Files of a run folder that a resumed run reads, with digests: what was changed after the run wrote
it is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bomemeta.boundary import reason

_CONFIG_MARK = "# sha256 of the lines above: "
DIGEST_KEY = "digest"  # of result.json: the SHA-256 of all its other keys


def with_digest(text: str) -> str:
    """A YAML text with its SHA-256 as its last line, a comment."""
    return f"{text}{_CONFIG_MARK}{hashlib.sha256(text.encode()).hexdigest()}\n"


def is_changed(path: Path) -> bool:
    """Whether a file that `with_digest` made is not as it was. False where the last line is no
    digest, as in those of older versions. Raises OSError.
    """
    content = path.read_bytes().decode(errors="replace")
    text, mark, digest = content.rpartition(_CONFIG_MARK)
    if not mark:
        return False
    return digest != hashlib.sha256(text.encode()).hexdigest() + "\n"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON values with the digest of all its keys."""
    return {**record, DIGEST_KEY: _digest(record)}


def read_sealed(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The record of a file; None where it cannot be used. With what is wrong, or cannot be told; None
    where nothing is.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return (
            None,
            f"{path} cannot be read ({reason(error, named=False)}); it is made again",
        )
    if not isinstance(record, dict):
        return None, f"{path} is not a mapping; it is made again"
    digest = record.pop(DIGEST_KEY, None)
    missing = [
        key for key in ("steps", "metrics", "notes", "config", "upper_sha256") if key not in record
    ]
    if missing:
        return None, f"{path} has no {', '.join(missing)}; it is made again"
    if digest is None and _plausible(record):
        return (
            record,
            f"{path} has no digest, as an older version wrote it: whether it was changed cannot be told",
        )
    if digest is None or digest != _digest(record):
        return (
            None,
            f"{path} is not as the run wrote it: the digest in it is another; it is made again",
        )
    return record, None


def _plausible(record: Mapping[str, Any]) -> bool:
    numbers = (int, float, type(None))
    return (
        type(record["steps"]) is int
        and isinstance(record["config"], dict)
        and isinstance(record["notes"], list)
        and isinstance(record["metrics"], dict)
        and all(isinstance(value, numbers) for value in record["metrics"].values())
        and isinstance(record["upper_sha256"], str)
    )


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def changes(written: Mapping[str, Any], there: Any, above: str = "") -> list[str]:
    """`steps: 4 written, 20 there` for each key in which two configs differ."""
    if not isinstance(there, Mapping):
        return [f"{above or 'all of it'}"]
    found: list[str] = []
    for key in [*written, *(key for key in there if key not in written)]:
        a, b, name = written.get(key), there.get(key), f"{above}.{key}" if above else str(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += changes(a, b, name)
        elif a != b:
            found.append(f"{name}: {str(a)[:60]} written, {str(b)[:60]} there")
    return found
