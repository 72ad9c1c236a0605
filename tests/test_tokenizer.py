"""The pinned libraries read v1-4's own tokenizer files: CLIP's true vocabulary, in its files of 2022."""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

OPEN_CLIP = find_spec("open_clip")


def clip_bytes() -> list[str]:
    """CLIP's alphabet: printable bytes as they are, then the others as the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@pytest.mark.skipif(OPEN_CLIP is None, reason="CLIP's vocabulary comes with open_clip_torch, which is not installed")
def test_pinned_tokenizer_reads_clips_own_vocabulary(tmp_path: Path):
    packed = Path(OPEN_CLIP.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    words = [*clip_bytes(), *(byte + "</w>" for byte in clip_bytes()), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49408
    ids = tokenizer("A double-black diamond mountain to ski on near Seattle.").input_ids
    assert ids == [49406, 320, 3200, 268, 1449, 6235, 3965, 531, 3428, 525, 2252, 6274, 269, 49407]
