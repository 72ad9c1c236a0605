"""The README's tables and commands say what the code does."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from builder.docs import V1_4
from src.api.output import job_output
from src.api.picture import Picture
from src.api.request import ImageRequest
from src.model.repository import DEMO_MODEL
from tests.support.platform_stub import Platform
from tests.support.platform_stub.client_routes import ClientRoutes
from tests.support.platform_stub.job import Policy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RED = Image.new("RGB", (64, 64), "red")


def table(header: str) -> dict[str, list[str]]:
    """The rows of the table whose first column is ``header``: first cell to the others."""
    (body,) = re.findall(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.M)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()]
    return {first.strip("`"): rest for first, *rest in rows}


def test_the_response_table():
    def fields(job_input: dict[str, object], **more: object) -> set[str]:
        request = ImageRequest.parse({"prompt": "x"} | job_input, V1_4)
        pictures = [Picture(RED, seed, None) for seed in request.seeds]
        return set(job_output(request, pictures, ["look out"], model_name="demo", max_result_bytes=10**7, **more))

    rows = table("field \\| meaning")
    one = fields({"output_format": "webp"})
    assert set(rows) == one | fields({}, links=["https://example.com"])
    of_an_image = one - fields({"output_format": "webp", "num_images": 2})
    assert of_an_image == {"image", "seed", "nsfw_content_detected"}
    assert fields({"num_images": 2}) - one == {"images"}
    assert "`images`" in README


def test_the_example_of_a_job():
    asked, answered = (json.loads(block) for block in re.findall(r"```json\n(.+?)```", README, re.S)[:2])
    request = ImageRequest.parse(asked["input"], V1_4)
    pictures = [Picture(RED, request.seed, None)]
    output = job_output(request, pictures, [], model_name="demo", max_result_bytes=10**7)
    assert {**answered["output"], "image": ""}.items() <= {**output, "image": ""}.items()


def test_the_endpoints_routes():
    routes = {f"{route.method} {route.path.removeprefix('/v2/local')}" for route in ClientRoutes(Platform()).routes()}
    listed = {route.replace("<id>", "{job}") for route in table("route")}
    # no worker of ours streams, and the others are for clients that know them
    routes = {route for route in routes if not re.match(r"GET /(stream|status-sync)/|\* /openai", route)}
    assert listed == routes


def test_the_policy_table():
    rows, schema = table("`policy`"), Policy.model_json_schema()["properties"]
    assert list(rows) == list(schema)
    for name, (default, bounds, _) in rows.items():
        assert default == str(schema[name]["default"]).lower()
        if "minimum" in schema[name]:
            assert bounds == f"{schema[name]['minimum']} to {schema[name]['maximum']}"


def test_readme_quotes_how_the_gate_installs_lints_checks_types_and_tests():
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:python3|\.venv/bin/(?:pip install -r|ruff|mypy|python)).*$", gate, re.M)
    assert len(commands) == 6
    assert set(commands) <= set(re.split(r" && |[`\n]", README))


def test_every_command_runs_in_the_environment_that_the_first_one_made():
    for path in (ROOT / "README.md", DEMO_MODEL / "README.md"):
        assert not re.findall(r"(?:`|^)python3? (?:-m (?!venv)|handler).*", path.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize(
    "path", re.findall(r"(?:\]\(|src=\")([^)#:\"]+)[)\"]|^\| `([\w.]+(?:/[\w./]*|\.py))` \|", README, re.M)
)
def test_what_it_points_to_exists(path: tuple[str, str]):
    assert (ROOT / (path[0] or path[1])).exists()
