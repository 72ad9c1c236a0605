"""Warnings about the parts of a prompt that have no effect."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from src.errors import shortened

_SYNTAX_OF_WEB_UIS = re.compile(
    r"""
      [(\[] [^()\[\]]* (?: [^\s\d()\[\]]:[ ]?-?\d+ | :[ ]?-?\d*\.\d+ ) [)\]]  # (word:1.3), [a:b:0.5]; not (16:9)
    | \(\( [^()]+ \)+                                                      # ((word))
    | \[\[ [^\[\]]+ \]+                                                    # [[word]]
    | \[ [^\[\]]+ \] (?= .* \[ [^\[\]]+ \] )                               # [word], more than once
    | \[ [^\[\]]+ \| [^\[\]]+ \]                                           # [a|b]
    | < (?: lora|lyco|hypernet ) : [^<>]+ >
    | \b BREAK \b
    """,
    re.VERBOSE | re.DOTALL,
)

NOT_UNDERSTOOD = "prompt: the embedded model knows few of these words; it draws only landscapes and plain shapes"


@dataclass(frozen=True)
class Vocabulary:
    """The words of a model that knows only a few."""

    drawn: Collection[str]
    """Names of what it can draw."""
    ignored: Collection[str]
    """Words that it has learned to ignore."""


def syntax_warning(field: str, text: str) -> list[str]:
    """Warns if a text has the syntax in which web UIs write weights, LoRAs and chunks. Ordinary brackets are none."""
    found = _SYNTAX_OF_WEB_UIS.search(text)
    return [f'{field}: syntax of web UIs is read as plain text: "{shortened(found[0])}"'] if found else []


def truncation_warning(field: str, text: str, starts: list[int], max_tokens: int) -> list[str]:
    """Warns if a text is longer than the text encoder reads.

    Args:
        field: the field that has the text.
        text: its content.
        starts: where in ``text`` each of its tokens begins, including the start and the end token.
        max_tokens: how many tokens the text encoder reads.
    """
    if len(starts) <= max_tokens:
        return []
    # the last position holds the end token
    rest = text[starts[max_tokens - 1] :]
    return [f'{field}: longer than {max_tokens} tokens, this part was not used: "{rest}"']


def vocabulary_warnings(prompt: str, vocabulary: Vocabulary) -> list[str]:
    """Warns if most words of a prompt name nothing that the model can draw."""
    # letters of any script
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    drawn = [word for word in words if word in vocabulary.drawn or word.removesuffix("s") in vocabulary.drawn]
    unknown = [word for word in words if word not in drawn and word not in vocabulary.ignored]
    return [NOT_UNDERSTOOD] if not drawn or len(unknown) > len(drawn) else []
