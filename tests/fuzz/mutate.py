"""Mutations of texts and bytes. All are functions of a random generator alone, so that the number
of an input gives the input again.
"""

from __future__ import annotations

import random

# Scalars that a parser, a validator or an allocation may trip over.
SCALARS = (
    "0", "-1", "1", "2", "3", "-0", "+5", "0123", "010", "0o17", "0x1f", "0b11", "1:30", "12:30:45",
    "1_000", "1e5", "1e-3", "1E3", "1e400", "-1e400", "1e-400", ".5", "5.", "0.1", ".inf", "-.inf",
    ".nan", "NaN", "inf", "true", "True", "false", "yes", "no", "on", "off", "y", "n", "null", "~",
    "", "''", '""', "' '", "abc", "2020-01-01", "2020-13-45", "2001-12-14t21:59:43.10-05:00",
    "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551616",
    "1000000000", "100000000000000000000000000000", "[]", "{}", "[1, 2]", "[[[]]]", "{a: 1}",
    "{name: bome}", "[null]", "!!int ''", "!!bool x", "!!float x", "!!timestamp x", "!!binary x",
    "!!python/object:os.system x", "!!set {a}", "!!omap [a]", "!!str 0123", "!local x", "&a x", "*a",
    "<<", "=", "? a", "- a", "a: b: c", "|", ">", "%TAG", "@x", "`x`", "\t", "'", '"', "[", "{", "]",
    '"a\\0b"', '"\\ud800"', "\u00e9", "\u2028", "\ufeff", "\x85", "\U0001f600", "~nosuchuser/x",
    "$HOME/x", "/", ".", "..", "s3://", "s3:/x", "file://", "mock://x", "nosuch://x", "a\nb",
    "/nonexistent/a/b", "auto", "float32", "float64", "cpu", "cuda", "cosine", "adam",
)  # fmt: skip
LONG = (
    lambda: "[" * 1200,
    lambda: "{a: " * 300,
    lambda: "9" * 6000,
    lambda: "0x" + "f" * 6000,
    lambda: "x" * 300,
    lambda: "x/" * 3000,
    lambda: "- " * 1500 + "a",
    lambda: "1." + "0" * 5000,
    lambda: "1e" + "9" * 400,
)
TOKENS = (
    ": ", "\n", "  ", "- ", "#", "[", "]", "{", "}", ",", "'", '"', "&x ", "*x", "!!int ", "|\n", ">\n",
    "\t", "\x00", "\x7f", "\u2028", "---\n", "...\n", "%YAML 1.1\n", "? ", "<<: ", "0", "e", "_",
)  # fmt: skip


def scalar(rng: random.Random) -> str:
    """A text for a value."""
    if rng.random() < 0.06:
        return rng.choice(LONG)()
    if rng.random() < 0.3:
        return rng.choice(
            ("1", "2", "3", "0.1", "0123", "010", "1:30", "1_0", "0x2", "1e0", "10.", "yes", "2e-1")
        )
    return rng.choice(SCALARS)


def text(rng: random.Random, source: str) -> str:
    """A YAML text with one to three things changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        source = rng.choice((_value, _value, _value, _key, _line, _token, _cut, _character))(
            rng, source
        )
    return source


def _value(rng: random.Random, source: str) -> str:
    """Another value in the place of one after `key:`."""
    starts = [i + 2 for i in range(len(source) - 2) if source[i : i + 2] == ": "]
    if not starts:
        return source + f"\nsteps: {scalar(rng)}"
    start = rng.choice(starts)
    end = start
    while end < len(source) and source[end] not in ",}\n#":
        end += 1
    return source[:start] + scalar(rng) + source[end:]


def _key(rng: random.Random, source: str) -> str:
    """Another word in the place of a key."""
    ends = [i for i in range(len(source)) if source[i] == ":"]
    if not ends:
        return source
    end = rng.choice(ends)
    start = end
    while start > 0 and source[start - 1] not in "{, \n":
        start -= 1
    return source[:start] + rng.choice((scalar(rng), source[start : end - 1])) + source[end:]


def _line(rng: random.Random, source: str) -> str:
    lines = source.split("\n")
    at = rng.randrange(len(lines))
    change = rng.randrange(4)
    if change == 0:
        del lines[at]
    elif change == 1:
        lines.insert(at, rng.choice(lines))
    elif change == 2:
        lines[at] = "  " + lines[at]
    else:
        lines.insert(at, scalar(rng))
    return "\n".join(lines)


def _token(rng: random.Random, source: str) -> str:
    at = rng.randrange(len(source) + 1)
    return source[:at] + rng.choice(TOKENS) + source[at:]


def _cut(rng: random.Random, source: str) -> str:
    return source[: rng.randrange(len(source) + 1)]


def _character(rng: random.Random, source: str) -> str:
    if not source:
        return source
    at = rng.randrange(len(source))
    return (
        source[:at]
        + chr(rng.choice((0, 9, 33, 39, 58, 91, 123, 125, 233, 0x2028)))
        + source[at + 1 :]
    )


def data(rng: random.Random, source: bytes) -> bytes:
    """A file with bits flipped, bytes changed, a part taken out, put in or doubled."""
    content = bytearray(source)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if not content:
            return bytes(content)
        at = rng.randrange(len(content))
        change = rng.randrange(8)
        if change < 4:
            content[at] ^= 1 << rng.randrange(8)
        elif change == 4:
            content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif change == 5:
            del content[at : at + rng.choice((1, 4, 64, 4096))]
        elif change == 6:
            content[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        else:
            content = content[:at] if rng.random() < 0.5 else content + content[at:]
    return bytes(content)
