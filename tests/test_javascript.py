"""Clients from npm with the stand-in for RunPod: its SDK in examples/generate.mjs, and its AI SDK provider."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from src.api.request import ImageRequest
from tests.support.client import Client
from tests.support.examples import EXAMPLES, ending_its_job, environment, run
from tests.support.fields import LIMITS
from tests.support.platform_stub import Fault, Platform


@pytest.fixture
def project(node_modules: Path, tmp_path: Path) -> Path:
    """A JavaScript project with the packages and the example."""
    (tmp_path / "node_modules").symlink_to(node_modules)
    shutil.copy(EXAMPLES / "generate.mjs", tmp_path)
    return tmp_path


def generate(platform: Platform, project: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return run(["node", "generate.mjs", *arguments], project, **environment(platform, **settings))


def test_any_field_passes_through_and_several_pictures_are_numbered(platform: Platform, client: Client, project: Path):
    platform.faults += [Fault("/status/", status=502)]
    fields = ("num_images=2", "seed=3", "guidance_scale=5.5", "negative_prompt=a = b", "output_format=png")
    ran = generate(platform, project, "the sea", *fields)
    assert (ran.stdout, ran.returncode) == ("picture-1.png seed 3\npicture-2.png seed 4\n", 0), ran.stderr
    parameters = Image.open(project / "picture-2.png").text["parameters"]
    assert parameters.startswith("the sea\nNegative prompt: a = b\n")
    assert "CFG scale: 5.5, Seed: 4, " in parameters


def test_picture_in_a_bucket_is_downloaded(local_server: str, project: Path):
    # any file that can be downloaded
    output = {"image_url": f"{local_server}/openapi.json", "seed": 1, "output_format": "webp", "warnings": ["careful"]}
    with ending_its_job("COMPLETED", {"output": output}) as platform:
        ran = generate(platform, project, "the sea")
    assert (ran.stdout, ran.stderr) == ("picture.webp seed 1\n", "warning: careful\n")
    assert json.loads((project / "picture.webp").read_text())["openapi"]


def test_local_server_of_the_sdk_works_as_an_endpoint(local_server: str, platform: Platform, project: Path):
    ran = generate(platform, project, "the sea", "num_inference_steps=2", ENDPOINT_URL=local_server)
    assert ran.returncode == 0, ran.stderr
    assert Image.open(project / "picture.png").size == (128, 128)


@pytest.mark.parametrize(
    ("fields", "settings", "error"),
    [
        (["width=65"], {}, "ended as FAILED: invalid input: width: must be a multiple of 8, got 65"),
        (["the", "sea"], {}, "the is not FIELD=VALUE; a prompt of several words needs quotes"),
        ([], {"RUNPOD_API_KEY": "wrong"}, "Request failed with status code 401"),
        ([], {"ENDPOINT_URL": "http://127.0.0.1:2/x"}, "fetch failed: connect ECONNREFUSED 127.0.0.1:2"),
        ([], {"ENDPOINT_URL": "localhost"}, "Invalid URL"),
        ([], {"ENDPOINT_URL": ""}, "set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL"),
    ],
)
def test_error_is_reported_in_one_line(
    platform: Platform, client: Client, project: Path, fields: list[str], settings: dict[str, str], error: str
):
    ran = generate(platform, project, "the sea", *fields, **settings)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("generate.mjs: ") and line.endswith(error)
    assert not list(project.glob("picture*"))


def ai_sdk(platform: Platform, project: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Generates a picture with Vercel's AI SDK and ``options`` of RunPod's provider, and prints the file."""
    code = """
        import { createRunpod } from "@runpod/ai-sdk-provider";
        import { generateImage } from "ai";
        const [, apiKey, baseURL, options] = process.argv;
        const model = createRunpod({ apiKey, baseURL }).image("stable-diffusion");
        const providerOptions = { runpod: JSON.parse(options) };
        const { image } = await generateImage({ model, prompt: "the sea", maxRetries: 0, providerOptions });
        process.stdout.write(image.uint8Array);
    """
    command = ["node", "--input-type=module", "-e", code, platform.key, f"{platform.url}/v2/local", json.dumps(options)]
    return run(command, project)


def test_ai_sdk_shows_a_picture_in_a_bucket_when_its_own_fields_are_null(local_server: str, project: Path):
    link = f"{local_server}/openapi.json"
    with ending_its_job("COMPLETED", {"output": {"image_url": link, "seed": 1}}) as platform:
        ran = ai_sdk(platform, project, size=None, enable_safety_checker=None, width=64)
        (job,) = platform.jobs.values()
    assert json.loads(ran.stdout)["openapi"]
    assert ImageRequest.parse(job.input, LIMITS).width == 64
