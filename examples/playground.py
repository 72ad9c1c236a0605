"""Opens a page on this machine for trying an endpoint: python examples/playground.py

The endpoint is that of ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL, such as http://localhost:8000.
"""

import base64
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import gradio as gr
import requests
import runpod
from requests.adapters import HTTPAdapter, Retry

SCHEMA = json.loads(Path(__file__).with_name("schema").joinpath("input.json").read_text(encoding="utf-8"))
FIELDS = SCHEMA["properties"]
PROGRESS = gr.Progress()
LARGEST = 1536  # pixels each way: no model makes more, and RunPod refuses requests of more than 10 MB


def control(name: str) -> Any:
    """Makes a field's control. Left as it is, it is empty, and shows the default in grey."""
    field = FIELDS[name]
    shown = {"label": name, "info": field["description"]}
    if "enum" in field:
        return gr.Dropdown([("default", ""), *filter(None, field["enum"])], value="", **shown)
    is_integer = "integer" in field["type"]
    if is_integer or "number" in field["type"]:
        bounds = {"minimum": field.get("minimum"), "maximum": field.get("maximum")}
        step = field.get("multipleOf", 1 if is_integer else 0.1)
        default = None if field.get("default") is None else str(field["default"])
        precision = 0 if is_integer else None
        # as the value, None would be shown as 0
        return gr.Number(lambda: None, placeholder=default, precision=precision, step=step, **bounds, **shown)
    return gr.Textbox(max_length=field.get("maxLength"), **shown)


def in_base64(picture: Any) -> str:
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def read_controls(values: dict[Any, Any]) -> dict[str, Any]:
    """Returns a job's input: the fields that are set, the picture, and what was painted over it as the mask."""
    filled = {name: values[each] for name, each in controls.items()}
    job_input = {name: value for name, value in filled.items() if value not in (None, "") or name in SCHEMA["required"]}
    edited = values[editor]
    if edited and edited["background"]:
        job_input["image"] = in_base64(edited["background"])
        # opaque where painted
        masks = [mask for layer in edited["layers"] if (mask := layer.getchannel("A")).getbbox()]
        if masks:
            job_input["mask"] = in_base64(masks[0])
    return job_input


def follow(job: runpod.endpoint.Job, progress: gr.Progress) -> dict[str, Any]:
    """Shows a job's progress until it has ended. Returns the last answer about it, with its output or error."""
    client, path = job.rp_client, f"{job.endpoint_id}/status/{job.job_id}"
    try:
        # job.status() and job.output() leave out the job's error
        while (answer := client.get(path))["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            done = answer.get("output") or {}
            progress((done.get("step", 0), done.get("steps")), desc=answer["status"])
            time.sleep(1)
    except requests.HTTPError as error:
        if error.response.status_code != 405:
            raise
        answer = client.post(path, {}, timeout=600)  # the SDK's local server
    return dict(answer)


def generate(values: dict[Any, Any], progress: gr.Progress = PROGRESS) -> Iterator[dict[Any, Any]]:
    """Sends a job, and yields what changes on the page: first the job that Stop cancels, in the end its pictures."""
    try:
        endpoint = runpod.Endpoint(endpoint_id, key or "none")
        retries = Retry(8, backoff_factor=1, status_forcelist=[429, 500, 502, 503, 504])  # of GET only
        endpoint.rp_client.rp_session.mount(endpoint.rp_client.endpoint_url_base, HTTPAdapter(max_retries=retries))
        job = endpoint.run({"input": read_controls(values)})
        yield {running: job}
        answer = follow(job, progress)
        output = answer.get("output")
        if not output:
            raise RuntimeError(f"{answer['status']}: {answer.get('error', 'the job has no output')}")
        pictures, images = [], output.get("images", [output])
        # the gallery copies the files as they are
        with tempfile.TemporaryDirectory() as folder:
            for image in images:
                path = Path(folder, f"{image['seed']}.{output.get('output_format', 'png')}")
                with urlopen(image.get("image_url") or f"data:;base64,{image['image']}", timeout=120) as file:
                    path.write_bytes(file.read())
                pictures.append((path, f"seed {image['seed']}"))
            shown = gr.Gallery(pictures, selected_index=0)
            yield {gallery: shown, seeds: [image["seed"] for image in images], chosen: 0}
        for warning in output.get("warnings", []):
            gr.Warning(warning)
    except (RuntimeError, OSError) as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def cancel(job: runpod.endpoint.Job | None) -> None:
    try:
        if job:
            job.cancel()
    except (RuntimeError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def choose(event: gr.SelectData) -> int:
    return int(event.index)


key, endpoint_id = os.environ.get("RUNPOD_API_KEY"), os.environ.get("ENDPOINT_ID")
if url := os.environ.get("ENDPOINT_URL"):
    runpod.endpoint_url_base, _, endpoint_id = url.rstrip("/").rpartition("/")
elif not (endpoint_id and key):
    sys.exit("playground.py: set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL")

# a page that runs for days deletes pictures when they are a day old
with gr.Blocks(title="Playground", analytics_enabled=False, delete_cache=(86400, 86400)) as page, gr.Row():
    with gr.Column():
        controls = {"prompt": control("prompt")}
        with gr.Row():
            start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
        editor = gr.ImageEditor(
            label="image and mask",
            placeholder="Drop a picture to start from\nand paint over what is to change",
            type="pil",
            sources=["upload", "clipboard"],
            brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
            layers=False,
        )
        with gr.Row():
            controls |= {name: control(name) for name in ("width", "height")}
        with gr.Accordion("More", open=False), gr.Row():
            controls |= {name: control(name) for name in FIELDS if name not in {*controls, "image", "mask"}}
    with gr.Column():
        gallery = gr.Gallery(label="pictures", interactive=False, preview=True, buttons=["download", "fullscreen"])
        with gr.Row():
            again, same_seed = gr.Button("Start from this picture"), gr.Button("Use its seed")
    running, seeds, chosen = gr.State(), gr.State([]), gr.State(0)

    start.click(
        generate,
        {editor, *controls.values()},
        [running, gallery, seeds, chosen],
        show_progress_on=gallery,
        concurrency_limit=None,
        api_name="generate",
    )
    stop.click(cancel, running, api_name="stop")
    gallery.select(choose, None, chosen, api_visibility="private")
    again.click(lambda shown, i: shown[i][0] if shown else None, [gallery, chosen], editor, api_name="start_from")
    same_seed.click(lambda seeds, i: seeds[i] if seeds else None, [seeds, chosen], controls["seed"], api_name="seed")

page.launch(server_name="127.0.0.1", share=False, ssr_mode=False, run_history=False, footer_links=[])
