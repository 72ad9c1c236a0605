"""The words that the embedded model knows."""

import json
import re
from functools import cache

from src.model.repository import DEMO_MODEL

NOT_UNDERSTOOD = "prompt: the embedded model knows few of these words, it draws landscapes and plain shapes only"


@cache
def _vocabulary() -> dict[str, list[str]]:
    """Words that the model can draw (``drawn``) or has learned to ignore (``ignored``). Cached by the warm-up."""
    words: dict[str, list[str]] = json.loads((DEMO_MODEL / "words.json").read_text(encoding="utf-8"))
    return words


def vocabulary_warnings(prompt: str) -> list[str]:
    """Warns if most words of a prompt name nothing that the embedded model can draw."""
    vocabulary = _vocabulary()
    # letters of any script
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    drawn = [word for word in words if {word, word.removesuffix("s")} & set(vocabulary["drawn"])]
    unknown = [word for word in words if word not in drawn and word not in vocabulary["ignored"]]
    return [NOT_UNDERSTOOD] if not drawn or len(unknown) > len(drawn) else []
