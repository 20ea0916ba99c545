"""Regular expressions from a folder that is not trusted.

Some take for ever, and Python's matcher cannot be stopped from within. Those that repeat or choose
anything are matched by a process of its own, all names at once, which is ended when it takes long.
"""

import functools
import json
import re
import subprocess
import sys

SECONDS = 5.0
"""What all names together may take; microseconds are usual."""

MAX_LENGTH = 2000
"""Of a pattern. Unsloth writes some of 500 characters."""

_PLAIN = re.compile(r"(?:[\w.-]|\\[.\w])*")
"""Patterns that cannot take long: a name with wildcards for single characters."""

_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
matched = [[name for name in names if re.fullmatch(each, name)] for each in patterns]
json.dump(matched, sys.stdout)
"""


def check_pattern(pattern: str) -> None:
    """Raise `ValueError` unless a text is a regular expression."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"a pattern has {len(pattern)} characters, expected at most {MAX_LENGTH}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression ({error})") from error


@functools.lru_cache(maxsize=64)
def matched(patterns: tuple[str, ...], names: frozenset[str]) -> dict[str, frozenset[str]]:
    """The names that patterns match as a whole, by pattern.

    Args:
        patterns: regular expressions.
        names: what each is held against.

    Raises:
        ValueError: they take too long.

    >>> matched((r".*\\.(q|v)_proj", "lm_head"), frozenset(["a.q_proj", "q_proj", "lm_head"]))
    {'lm_head': frozenset({'lm_head'}), '.*\\\\.(q|v)_proj': frozenset({'a.q_proj'})}
    """
    plain = [each for each in patterns if _PLAIN.fullmatch(each)]
    found = {each: frozenset(n for n in names if re.fullmatch(each, n)) for each in plain}
    if others := [each for each in patterns if each not in found]:
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
        given = json.dumps([others, [*names]])
        try:
            done = subprocess.run(
                command, input=given, capture_output=True, text=True, timeout=SECONDS, check=True
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"the patterns, such as {others[0][:80]!r}, take too long, or too much. Write them "
                "more simply"
            ) from error
        found |= dict(zip(others, map(frozenset, json.loads(done.stdout)), strict=True))
    return found
