import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from PIL import Image

from src.generation.engine import Engine
from src.job_handler import KEPT_ANSWERS, JobHandler
from src.settings import Settings
from tests.support import engines
from tests.support.pictures import in_base64, plain


def run(engine: Engine, job: dict[str, Any], settings: Settings | None = None) -> dict[str, Any]:
    return asyncio.run(JobHandler(engine, settings or Settings()).handle(job))


def job(**job_input: object) -> dict[str, Any]:
    return {"id": "job-1", "input": {"prompt": "a secret cat", "num_inference_steps": 2, "seed": 1} | job_input}


def test_job_is_answered_with_its_picture(v1_4_engine: Engine, capsys: pytest.CaptureFixture):
    output = run(v1_4_engine, job())
    image = Image.open(io.BytesIO(base64.b64decode(output.pop("image"))))
    assert image.size == (64, 64)
    assert output == {
        "seed": 1,
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "scheduler": "PNDM",
        "model": v1_4_engine.model_name,
        "nsfw_content_detected": False,
    }
    log = capsys.readouterr().out
    assert "job-1 | generated 1 of 64 x 64 in 2 steps: " in log
    assert "secret" not in log


def test_job_with_a_picture_tells_its_strength_and_counts_the_steps_that_are_done(
    v1_4_engine: Engine, capsys: pytest.CaptureFixture
):
    reports: list[dict[str, Any]] = []

    @asynccontextmanager
    async def last_report(job_id: str, report: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
        yield
        reports.append(report())

    asked = job(image=in_base64(plain("red")), num_inference_steps=10, strength=0.5)
    output = asyncio.run(JobHandler(v1_4_engine, Settings(), last_report).handle(asked))
    assert reports == [{"progress": 100, "step": 5, "steps": 5}]
    assert output["strength"] == 0.5
    text = Image.open(io.BytesIO(base64.b64decode(output["image"]))).text["parameters"]
    assert "Size: 64x64, Denoising strength: 0.5, Model: " in text
    assert "job-1 | generated 1 of 64 x 64 in 5 steps: " in capsys.readouterr().out


@pytest.mark.parametrize("bad", [{"id": "job-1"}, {"id": "job-1", "input": None}, {"id": "job-1", "input": ["secret"]}])
def test_bad_input_is_answered_with_an_error(v1_4_engine: Engine, capsys: pytest.CaptureFixture, bad: dict):
    assert run(v1_4_engine, bad)["error"].startswith("invalid input: must be an object")
    assert run(v1_4_engine, job(width=65, prompt="secret\x00")) == {
        "error": "invalid input: prompt: must not hold control characters other than newline and tab; "
        "width: must be a multiple of 8, got 65"
    }
    log = capsys.readouterr().out
    assert "job-1 | failed: invalid input" in log
    assert "secret" not in log


def test_unexpected_error_is_described_only_in_the_log(
    v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("at /root/secret/path on host worker-7")

    with monkeypatch.context() as patch:
        patch.setattr(engines.pipe_of(v1_4_engine).vae, "decode", fail)
        assert run(v1_4_engine, job()) == {"error": "internal error, see the worker's log for job job-1"}
    log = capsys.readouterr().out
    assert "job-1 | Traceback" in log
    assert "RuntimeError: at /root/secret/path on host worker-7" in log
    assert "image" in run(v1_4_engine, job())


def test_job_delivered_again_gets_the_same_answer_unless_it_failed(v1_4_engine: Engine):
    job_handler = JobHandler(v1_4_engine, Settings())

    async def answer(job_id: str, **job_input: object) -> dict[str, Any]:
        return await job_handler.handle(
            {"id": job_id, "input": {"prompt": "a cat", "num_inference_steps": 1} | job_input}
        )

    async def deliver() -> None:
        assert "error" in await answer("failed", width=99)
        assert "image" in await answer("failed")
        # seeds are drawn at random, so they differ if a job is handled again
        first = await answer("job-0")
        assert await answer("job-0") == first
        for i in range(1, KEPT_ANSWERS + 1):
            await answer(f"job-{i}")
        assert (await answer("job-0"))["seed"] != first["seed"]

    asyncio.run(deliver())
