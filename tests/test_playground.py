"""examples/playground.py in its own environment, called as its page calls it, with the stand-in for RunPod."""

import base64
import io
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from gradio_client import Client as GradioClient
from gradio_client import handle_file
from gradio_client.client import Job
from gradio_client.exceptions import AppError
from PIL import Image

from src.api.request import ImageRequest
from tests.support.client import Client, until
from tests.support.examples import EXAMPLES, environment
from tests.support.pictures import plain
from tests.support.platform_stub import Platform

PYTHON = EXAMPLES / ".venv" / "bin" / "python"
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs an environment with Gradio: see tests/README.md"),
]


@contextmanager
def serving_page(cache: Path, **set_by_user: str) -> Iterator[tuple[str, int]]:
    """Runs the example, and yields its page's address and the process's id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | set_by_user | {"GRADIO_SERVER_PORT": port, "GRADIO_TEMP_DIR": str(cache)}
    process = subprocess.Popen([PYTHON, EXAMPLES / "playground.py"], env=env, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None
        with suppress(requests.ConnectionError):
            return requests.get(address, timeout=10).ok
        return False

    try:
        until(answers)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def page(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with serving_page(tmp_path_factory.mktemp("cache"), **environment(platform)) as page:
        yield page


def shown(job: Job) -> list[dict[str, Any]]:
    """Waits for the job, and returns its pictures' paths and captions."""
    return job.result(timeout=120)["value"]


class Visitor:
    """One who has opened the page."""

    def __init__(self, address: str, folder: Path) -> None:
        self.gradio = GradioClient(address, verbose=False, download_files=folder)
        api = self.gradio.view_api(return_format="dict", print_info=False)["named_endpoints"]
        self.controls = [parameter["label"] for parameter in api["/generate"]["parameters"]]

    def start(self, prompt: str = "the sea", **set_by_user: Any) -> Job:
        values = {"prompt": prompt, "num_inference_steps": 2} | set_by_user
        # what an untouched menu holds
        empty = {"output_format": "", "scheduler": "", "negative_prompt": ""}
        return self.gradio.submit(*[(empty | values).get(name) for name in self.controls], api_name="/generate")

    def generate(self, prompt: str = "the sea", **set_by_user: Any) -> list[dict[str, Any]]:
        return shown(self.start(prompt, **set_by_user))

    def press(self, button: str, *inputs: Any) -> Any:
        return self.gradio.predict(*inputs, api_name=button)


@pytest.fixture
def visitor(page: tuple[str, int], client: Client, tmp_path: Path) -> Visitor:
    return Visitor(page[0], tmp_path)


def edited(folder: Path, picture: Image.Image, layer: Image.Image) -> dict[str, Any]:
    """What the editor sends: the picture, and what was painted over it."""
    files = {"background": picture, "layer": layer}
    for name, image in files.items():
        image.save(folder / f"{name}.png")
    background, layer = (handle_file(folder / f"{name}.png") for name in files)
    return {"image and mask": {"background": background, "layers": [layer], "composite": None, "id": None}}


def last_job(platform: Platform) -> Any:
    return list(platform.jobs.values())[-1]


def decoded(picture: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture)))


def test_each_field_of_a_request_has_a_control(visitor: Visitor):
    assert {*visitor.controls, "image", "mask"} - {"image and mask"} == {*ImageRequest.model_fields}


def test_only_filled_controls_are_sent_and_pictures_are_the_files_that_came(visitor: Visitor, platform: Platform):
    pictures = visitor.generate(num_images=2, seed=3, guidance_scale=0, output_format="webp")
    job = last_job(platform)
    filled = {"num_inference_steps": 2, "num_images": 2, "seed": 3, "guidance_scale": 0, "output_format": "webp"}
    assert job.input == {"prompt": "the sea"} | filled
    assert [picture["caption"] for picture in pictures] == ["seed 3", "seed 4"]
    for picture, image in zip(pictures, job.output["images"], strict=True):
        assert Path(picture["image"]).suffix == ".webp"
        assert Path(picture["image"]).read_bytes() == base64.b64decode(image["image"])


def test_last_picture_and_its_seed_go_into_the_next_job(visitor: Visitor):
    (picture,) = visitor.generate(seed=7)
    assert visitor.press("/seed") == 7
    gallery = [{"image": handle_file(picture["image"]), "caption": picture["caption"]}]
    started_from = visitor.press("/start_from", gallery)
    assert Image.open(started_from["background"]).tobytes() == Image.open(picture["image"]).tobytes()


def test_picture_is_sent_without_a_mask_if_nothing_is_painted(visitor: Visitor, platform: Platform, tmp_path: Path):
    picture = plain("green", (128, 64))
    visitor.generate(strength=0.5, **edited(tmp_path, picture, Image.new("RGBA", (128, 64))))
    job = last_job(platform)
    assert job.input.keys() == {"prompt", "num_inference_steps", "strength", "image"}
    assert decoded(job.input["image"]).convert("RGB").tobytes() == picture.tobytes()
    assert (job.output["width"], job.output["height"]) == (128, 64)


def test_photo_of_a_phone_fits_into_a_request(visitor: Visitor, platform: Platform, tmp_path: Path):
    photo = Image.effect_noise((4032, 3024), 100).convert("RGB")
    visitor.generate(**edited(tmp_path, photo, Image.new("RGBA", photo.size)))
    job = last_job(platform)
    assert decoded(job.input["image"]).size == (1536, 1152)
    assert len(job.input["image"]) < 10**7


def test_mask_is_white_where_it_is_painted(visitor: Visitor, platform: Platform, tmp_path: Path):
    picture, layer = plain("green", (128, 128)), Image.new("RGBA", (128, 128))
    layer.paste("white", (32, 64, 96, 128))
    (picture_shown,) = visitor.generate("a red house", **edited(tmp_path, picture, layer))
    mask = decoded(last_job(platform).input["mask"])
    assert (mask.mode, mask.getbbox(), mask.getcolors()) == ("L", (32, 64, 96, 128), [(12288, 0), (4096, 255)])
    result = Image.open(picture_shown["image"])
    assert result.crop((0, 0, 128, 64)).tobytes() == plain("green", (128, 64)).tobytes()
    assert result.tobytes() != picture.tobytes()


@pytest.mark.parametrize(
    ("set_by_user", "error"),
    [
        ({"width": 65}, "FAILED: invalid input: width: must be a multiple of 8, got 65"),
        ({"prompt": "", "num_inference_steps": None}, "FAILED: invalid input: prompt: "),
        ({"width": 2000}, "Value 2000 is greater than maximum value 1024."),
    ],
)
def test_failed_job_shows_one_line(visitor: Visitor, set_by_user: dict[str, Any], error: str):
    with pytest.raises(AppError) as raised:
        visitor.generate(**set_by_user)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_stop_cancels_ones_own_job(visitor: Visitor, page: tuple[str, int], platform: Platform, tmp_path: Path):
    other = Visitor(page[0], tmp_path)
    mine = visitor.start("slow", seed=1, num_inference_steps=150)
    until(lambda: mine.status().progress_data)
    cancelled = last_job(platform)
    theirs = other.start("the sea", seed=2)
    visitor.press("/stop")
    with pytest.raises(AppError, match="CANCELLED"):
        mine.result(timeout=120)
    assert cancelled.status == "CANCELLED"
    (picture,) = shown(theirs)
    assert picture["caption"] == "seed 2"
    assert (visitor.press("/seed"), other.press("/seed")) == (None, 2)


def test_two_visitors_at_once_get_their_own_pictures(
    visitor: Visitor, page: tuple[str, int], platform: Platform, tmp_path: Path
):
    visitors = [visitor, Visitor(page[0], tmp_path)]
    jobs = [each.start(f"slow {i}", seed=i, num_inference_steps=50) for i, each in enumerate(visitors)]
    until(lambda: [job.status for job in platform.jobs.values()].count("IN_PROGRESS") == 2)
    for i, job in enumerate(jobs):
        (picture,) = shown(job)
        assert Image.open(picture["image"]).text["parameters"].startswith(f"slow {i}\n")
        assert visitors[i].press("/seed") == i


def test_page_holds_no_key_and_is_for_this_machine_alone(visitor: Visitor, page: tuple[str, int], platform: Platform):
    address, pid = page
    for path in ("", "/config", "/gradio_api/info", "/gradio_api/startup-events"):
        answer = requests.get(address + path, timeout=60)
        assert answer.ok
        assert platform.key not in answer.text
        assert platform.url not in answer.text
    process = psutil.Process(pid)
    listening = [each.laddr.ip for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}
    assert process.children() == []
    assert not requests.get(f"{address}/config", timeout=60).json()["analytics_enabled"]


def test_local_server_of_the_sdk_works_as_an_endpoint(local_server: str, tmp_path: Path):
    with serving_page(tmp_path / "cache", ENDPOINT_URL=local_server) as (address, _):
        (picture,) = Visitor(address, tmp_path).generate(seed=5)
    assert picture["caption"] == "seed 5"
