"""Which words mean something to the embedded model."""

import json
import re
from functools import cache

from src.model.repository import DEMO_MODEL

NOT_UNDERSTOOD = "prompt: the embedded model knows few of these words, it draws landscapes and plain shapes only"


@cache
def _vocabulary() -> dict[str, list[str]]:
    """Words that the model can draw (``drawn``), and others that do no harm (``ignored``). The warm-up reads them."""
    words: dict[str, list[str]] = json.loads((DEMO_MODEL / "words.json").read_text(encoding="utf-8"))
    return words


def vocabulary_warnings(prompt: str) -> list[str]:
    """What to say of a prompt to the embedded model when most of its words name nothing that the model can draw."""
    vocabulary = _vocabulary()
    # letters of any script
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    drawn = [word for word in words if {word, word.removesuffix("s")} & set(vocabulary["drawn"])]
    unknown = [word for word in words if word not in drawn and word not in vocabulary["ignored"]]
    return [NOT_UNDERSTOOD] if not drawn or len(unknown) > len(drawn) else []
