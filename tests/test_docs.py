"""Documentation that repeats the code: schemas, tables, the Hub's settings."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.docs import DEMO, ROOT, V1_4, files, input_schema, output_schema
from src.api.request import ImageRequest
from src.errors import JobError
from src.settings import Settings
from tests.support.client import Client
from tests.support.engines import Engine
from tests.support.examples import run
from tests.support.fields import FIELDS


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_generated_file_is_up_to_date(path: Any):
    assert path.read_text(encoding="utf-8") == files()[path], "run python -m builder.docs"


def test_documented_limits_are_those_of_the_embedded_model(demo_engine: Engine):
    assert demo_engine.limits == DEMO


def test_hub_defaults_presets_and_tests_are_valid():
    hub = json.loads((ROOT / ".runpod" / "hub.json").read_text())["config"]
    # the last is a Blackwell card in the pool AMPERE_24, for which the image has no kernels
    assert hub["gpuIds"] == "ADA_24,AMPERE_24,-NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 1g.24gb"
    defaults = {each["key"]: str(each["input"]["default"]) for each in hub["env"]}
    assert Settings.from_environment(defaults) == Settings(model_id="/model", base_model="/model")
    for preset in hub["presets"]:
        Settings.from_environment(defaults | {name: str(value) for name, value in preset["defaults"].items()})
    tests = json.loads((ROOT / ".runpod" / "tests.json").read_text())
    for test in tests["tests"]:
        ImageRequest.parse(test["input"], V1_4)
        # in milliseconds, enough for a cold start
        assert test["timeout"] >= 600_000


SCHEMA = input_schema(V1_4)
ANY_VALUE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([[], {}])


def near_bounds(name: str) -> st.SearchStrategy[Any]:
    field = SCHEMA["properties"][name]
    if "maximum" not in field:
        return FIELDS[name] | st.text(max_size=20)
    return FIELDS[name] | st.integers(field.get("minimum", 0) - 2, field["maximum"] + 2)


@given(st.fixed_dictionaries({}, optional={name: near_bounds(name) | ANY_VALUE for name in FIELDS}))
def test_input_schema_accepts_what_the_worker_accepts(job_input: dict[str, Any]):
    valid = jsonschema.Draft202012Validator(SCHEMA).is_valid(job_input)
    try:
        ImageRequest.parse(job_input, V1_4)
        accepted, message = True, ""
    except JobError as error:
        accepted, message = False, str(error)
    # a schema cannot express these
    beyond = (
        *("control characters", "Unicode", "characters, got 0", "images, got", "finite"),
        *("file", "needs", "strength must be"),
    )
    assert valid == accepted or (valid and any(words in message for words in beyond)), message


@pytest.mark.process
def test_pattern_of_a_prompt_means_the_same_in_javascript_in_python_and_in_the_worker(tmp_path: Path):
    code = """
        const pattern = process.argv[1], empty = /[\\s\\p{Default_Ignorable_Code_Point}\\p{Cc}\\u2800]/u;
        const all = Array.from({ length: 0x10000 }, (_, code) => String.fromCharCode(code));
        const matched = (regex) => all.map((text) => +regex.test(text)).join("");
        console.log([matched(new RegExp(pattern)), matched(new RegExp(pattern, "u")), matched(empty)].join("\\n"));
    """
    pattern = SCHEMA["properties"]["prompt"]["pattern"]
    ran = run(["node", "-e", code, pattern], tmp_path)
    plain, unicode, empty = ran.stdout.splitlines()
    for code, visible in enumerate(plain):
        assert visible == unicode[code] == "01"[bool(re.search(pattern, chr(code)))] != empty[code], hex(code)

    def accepted(prompt: str) -> bool:
        try:
            return bool(ImageRequest.parse({"prompt": prompt}, V1_4).prompt)
        except JobError as error:
            assert str(error) == "invalid input: prompt: must have 1 to 2,000 characters, got 0"
            return False

    for code, visible in enumerate(plain):
        if unicodedata.category(chr(code)) not in ("Cc", "Cs"):
            assert accepted(chr(code)) == (visible == "1"), hex(code)


def test_output_schema_accepts_what_the_worker_answers(client: Client):
    validate = jsonschema.Draft202012Validator(output_schema()).validate
    for num_images in (1, 2):
        validate(client.generate("the sea " * 80, num_images=num_images)["output"])
