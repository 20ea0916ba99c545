"""What can be said of generated texts without a judge: how much they repeat themselves.

Counts of words and their sequences; no model, no score that is not defined here.
"""

from collections.abc import Iterable


def words(text: str) -> list[str]:
    """Words of a text in any script: what stands between white space."""
    return text.split()


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All sequences of n words.

    >>> ngrams("to be or not", 3)
    [('to', 'be', 'or'), ('be', 'or', 'not')]
    """
    found = words(text)
    return [tuple(found[at : at + n]) for at in range(len(found) - n + 1)]


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Share of different ones among all sequences of n words of some texts together.

    distinct-n of Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation
    Models", section 5.1.

    Returns:
        In (0, 1]: 1 if none comes twice. None if there is none.

    >>> distinct(["yes yes", "yes no"], 1)
    0.5
    """
    all_of_them = [each for text in texts for each in ngrams(text, n)]
    return len({*all_of_them}) / len(all_of_them) if all_of_them else None


def repetition(text: str, n: int = 4) -> float:
    """Share of the sequences of n words that repeat an earlier one of the same text.

    seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", section
    6.1.

    Returns:
        In [0, 1): 0 if none repeats, or the text is shorter than n words.

    >>> repetition("a b a b a b", n=2)
    0.6
    """
    found = ngrams(text, n)
    return 1 - len({*found}) / len(found) if found else 0.0
