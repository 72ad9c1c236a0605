import time

import pytest
from diffusers import StableDiffusionPipeline

from src.api.prompt_warnings import syntax_warning
from src.generation.engine import Engine
from tests.support.engines import generate


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("a (red:1.3) cat", "(red:1.3)"),
        ("(best quality:1.4), 8k", "(best quality:1.4)"),
        ("(8k:1.2)", "(8k:1.2)"),
        ("(a, b: .5)", "(a, b: .5)"),
        ("(word:2)", "(word:2)"),
        ("(word:-0.5)", "(word:-0.5)"),
        ("a ((red)) cat", "((red))"),
        ("(((a, b)))", "((a, b)))"),
        ("[[blurry]]", "[[blurry]]"),
        ("[blurry], dark,\n[ugly]", "[blurry]"),
        ("[cat:dog:0.5]", "[cat:dog:0.5]"),
        ("a [cat|dog]", "[cat|dog]"),
        ("a cat <lora:add_detail:0.8>", "<lora:add_detail:0.8>"),
        ("<hypernet:style:1>", "<hypernet:style:1>"),
        ("a cat BREAK a dog", "BREAK"),
        (f"(({'x' * 99}))", f"(({'x' * 38}..."),
    ],
)
def test_syntax_of_web_uis_gets_a_warning(text: str, quoted: str):
    assert syntax_warning("prompt", text) == [f'prompt: syntax of web UIs is read as plain text: "{quoted}"']


@pytest.mark.parametrize(
    "text",
    [
        "a cat (black) and a dog (white)",
        "a sign that reads [EXIT]",
        "a (very (deeply) nested) thought",
        "f(g(x)) and (a(b))",
        "a picture (ratio 16:9), at noon (12:30), from (Psalm 23:4)",
        "the time is 10:30, note: no brackets",
        "he smiles :) and winks ;) like (this :3)",
        "a breakfast, breakdance, BREAKING news",
        "a < b > c, <http://example.com>",
        "a (half-finished sentence",
        "[",
    ],
)
def test_ordinary_brackets_get_no_warning(text: str):
    assert syntax_warning("prompt", text) == []


def test_no_text_is_slow_to_search():
    started = time.process_time()
    for piece in ("(", "[", "[a", "(a:", "((a", "[a|", "<lora:", "(1:1", "[a]("):
        syntax_warning("prompt", piece * (2000 // len(piece)))
    assert time.process_time() - started < 2


def test_job_is_warned_of_both_its_texts(demo_pipe: StableDiffusionPipeline, demo_engine: Engine):
    said = generate(demo_engine, prompt="a ((house))", negative_prompt="(blurry:1.2)", num_inference_steps=1).warnings
    assert said == [
        'prompt: syntax of web UIs is read as plain text: "((house))"',
        'negative_prompt: syntax of web UIs is read as plain text: "(blurry:1.2)"',
    ]
