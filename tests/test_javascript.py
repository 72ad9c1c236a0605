"""RunPod's provider for the AI SDK, from npm; test_scripts.py runs examples/generate.mjs with its SDK."""

import json
import subprocess
from pathlib import Path

from src.api.request import ImageRequest
from tests.support.examples import ending_its_job, run
from tests.support.fields import LIMITS
from tests.support.platform_stub import Platform


def ai_sdk(platform: Platform, node_modules: Path, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
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
    (folder / "node_modules").symlink_to(node_modules)
    return run(command, folder)


def test_ai_sdk_shows_a_picture_in_a_bucket_when_its_own_fields_are_null(
    local_server: str, node_modules: Path, tmp_path: Path
):
    link = f"{local_server}/openapi.json"
    with ending_its_job("COMPLETED", {"output": {"image_url": link, "seed": 1}}) as platform:
        ran = ai_sdk(platform, node_modules, tmp_path, size=None, enable_safety_checker=None, width=64)
        (job,) = platform.jobs.values()
    assert json.loads(ran.stdout)["openapi"]
    assert ImageRequest.parse(job.input, LIMITS).width == 64
