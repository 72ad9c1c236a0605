"""The READMEs' tables, links and commands say what the code does."""

import json
import re
from urllib.parse import unquote

import pytest
from PIL import Image

from builder.docs import V1_4
from src.api.output import job_output
from src.api.picture import Picture
from src.api.request import ImageRequest
from src.settings import DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION
from tests.support.pictures import in_base64
from tests.support.processes import ROOT

PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        ".runpod/README.md",
        ".github/CONTRIBUTING.md",
        ".github/SECURITY.md",
        "builder/README.md",
        "examples/README.md",
        "src/README.md",
        "src/model/demo/README.md",
        "tests/README.md",
    )
}
README = PAGES["README.md"]
RED = Image.new("RGB", (64, 64), "red")


def table(page: str, header: str) -> dict[str, list[str]]:
    """The rows of a page's table whose first columns are ``header``: first cell to the others."""
    (body,) = re.findall(rf"^\| {re.escape(header)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGES[page], re.M)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()]
    return {first.strip("`* "): rest for first, *rest in rows}


def sources() -> str:
    paths = [ROOT / "handler.py", *(ROOT / "src").rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def anchors(page: str) -> set[str]:
    """The fragments by which GitHub links to a page's headings."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_response_table_lists_the_fields_of_an_output():
    def fields(job_input: dict[str, object], **more: object) -> set[str]:
        request = ImageRequest.parse({"prompt": "x"} | job_input, V1_4)
        pictures = [Picture(RED, seed, None) for seed in request.seeds]
        return set(job_output(request, pictures, ["look out"], model_name="demo", max_result_bytes=10**7, **more))

    rows = table("README.md", "field | meaning")
    one = fields({"output_format": "webp", "image": in_base64(RED)})
    assert set(rows) == one | fields({}, links=["https://example.com"])
    of_an_image = one - fields({"output_format": "webp", "image": in_base64(RED), "num_images": 2})
    assert of_an_image == {"image", "seed", "nsfw_content_detected"}
    assert fields({"num_images": 2}) - one == {"images"}
    assert "`images`" in README


def test_example_job_gets_the_answer_shown():
    asked, answered = (json.loads(block) for block in re.findall(r"```json\n(.+?)```", README, re.S)[:2])
    request = ImageRequest.parse(asked["input"], V1_4)
    pictures = [Picture(RED, request.seed, None)]
    output = job_output(request, pictures, [], model_name="demo", max_result_bytes=10**7)
    assert {**answered["output"], "image": ""}.items() <= {**output, "image": ""}.items()


def test_kinds_of_request_that_the_hub_announces_are_supported():
    description = json.loads((ROOT / ".runpod" / "hub.json").read_text())["description"]
    kinds = re.split(r", | and ", description.split(".")[0].lower())
    (not_supported,) = re.findall(r"\*\*Not supported:\*\* (.*)", README)
    assert kinds == ["text to image", "image to image", "inpainting"]
    assert not [kind for kind in kinds if kind in not_supported]


@pytest.mark.parametrize("error", table("README.md", "error"))
def test_listed_error_exists_in_the_code(error: str):
    # the longest part that is neither left out nor put in
    part = max(re.split(r"\.\.\.|<\w+>", error), key=len).strip()
    assert part in sources()


@pytest.mark.parametrize("symptom", re.findall(r"log: `([^`]+)`|^- `([^`]+)`, with", PAGES[".runpod/README.md"], re.M))
def test_listed_log_line_exists_in_the_code(symptom: tuple[str, str]):
    for part in re.split(r"\.\.\.|: ", symptom[0] or symptom[1]):
        assert part.strip() in sources()


def test_map_lists_every_module_of_src():
    listed = {name for name in table("src/README.md", "module") if not name.endswith("/")} - {""}
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert listed == {module for module in modules if not re.search("__init__|^model/demo/", module)}


def test_build_argument_table_matches_the_dockerfile():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    rows = table("builder/README.md", "build argument")
    listed = {name: default for names, (default, _) in rows.items() for name in re.findall(r"\w+", names)}
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", dockerfile, re.M))
    assert listed.keys() == arguments.keys()
    for name, default in arguments.items():
        # what the default of MODEL_REVISION stands for is said in words
        assert default in listed[name]


@pytest.mark.parametrize("page", PAGES)
def test_module_that_a_command_runs_exists(page: str):
    for name in re.findall(r"python -m ((?:tests|builder)[\w.]+)", PAGES[page]):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_body_that_creates_an_endpoint_has_the_hosts_and_the_disk_of_the_hub():
    (body,) = (json.loads(block) for block in re.findall(r"```json\n(.+?)```", PAGES[".runpod/README.md"], re.S))
    hub = json.loads((ROOT / ".runpod" / "hub.json").read_text())["config"]
    assert ",".join([*body["gpu"]["pools"], *(f"-{card}" for card in body["gpu"]["excludedTypes"])]) == hub["gpuIds"]
    assert body["disk"] == hub["containerDiskInGb"]


def test_deployment_page_links_the_model_at_the_pinned_commit():
    assert f"https://huggingface.co/{DEFAULT_MODEL_ID}:{DEFAULT_MODEL_REVISION}" in PAGES[".runpod/README.md"]


LINKS = [
    (page, link)
    for page, text in PAGES.items()
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    for link in link
    if link and not link.startswith("https:")
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_link_leads_to_an_existing_file_and_heading(page: str, link: str):
    path, _, fragment = unquote(link).partition("#")
    target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    assert target.exists()
    if fragment:
        assert fragment in anchors(target.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("page", PAGES)
def test_named_file_exists(page: str):
    named = re.findall(
        r"`((?:\.runpod|builder|examples|src|tests)/[\w./*-]+|(?:handler|test_\w+)\.(?:py|json))`", PAGES[page]
    )
    for name in named:
        assert [*ROOT.glob(name), *(ROOT / "tests").glob(name)], name
