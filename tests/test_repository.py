"""The search for a model in a directory, RunPod's cache, Hugging Face's cache and the hub, and the choice of files."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from httpx2 import ReadTimeout
from huggingface_hub import close_session, constants, get_session

from src.errors import StartError
from src.model import repository
from src.model.checks import WEIGHTS
from src.model.repository import ORIGIN
from src.settings import DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION, Settings
from tests.support import forks, hub
from tests.support.layouts import edit, halve, weight_file
from tests.support.single_files import make_checkpoint

REPO = "someone/tiny"


@pytest.fixture
def copy(v1_4_repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(v1_4_repository, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("model_id", "said"),
    [
        ("/no/such/directory", "no such file or directory"),
        ("./nowhere", "no such file or directory"),
        ("no hub id", "neither a directory, a file, nor a hub id"),
        ("a/b/c", "neither a directory, a file, nor a hub id"),
        ("~nobody_of_this_name/model", "no such home directory: write the whole path in place of ~"),
    ],
)
def test_impossible_model_id_is_refused(model_id: str, said: str):
    with pytest.raises(StartError, match=said):
        repository.find(Settings(model_id=model_id))


def test_directory_whose_name_ends_like_a_file_is_one(copy: Path):
    folder = copy.rename(copy.with_suffix(".safetensors"))
    assert repository.find(Settings(model_id=str(folder))).path == folder
    with pytest.raises(StartError, match=f"^LORA={folder}: a directory: name the .safetensors file that you want$"):
        repository.find(Settings(model_id=str(folder), lora=str(folder)))


def find(
    environment: dict[str, str], *, runpod_cache: Path | None = None, user: int | None = None, max_silence: float = 30
) -> str:
    """Runs ``repository.find`` in a process of its own, since huggingface_hub reads its environment only once.

    Args:
        environment: of the process.
        runpod_cache: stands for the directory of that name.
        user: runs it as this user, if the tests run as root.
        max_silence: how long it waits for the hub, in seconds.
    """
    code = (
        "import os; from pathlib import Path; from src.errors import StartError\n"
        "from src.model import hub, repository; from src.settings import Settings\n"
        f"hub.RUNPOD_CACHE = Path({str(runpod_cache or '/nowhere')!r}); hub.MAX_SILENCE = {max_silence}\n"
        f"if {user} and not os.geteuid(): os.setuid({user})\n"
        "try: print(repository.find(Settings.from_environment()).where)\n"
        "except StartError as error: print('may recover:' if error.may_recover else 'refused:', error)"
    )
    return forks.python(code, **{"MODEL_ID": REPO} | environment)


@pytest.mark.process
def test_model_is_downloaded_once_and_then_found_in_the_cache(v1_4_repository: Path, tmp_path: Path):
    with hub.serve(REPO, v1_4_repository) as (address, fetched):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        assert find(environment | {"SAFETY_CHECKER": "false"}) == "downloaded\n"
        assert "unet/diffusion_pytorch_model.safetensors" in fetched
        assert not [name for name in fetched if name.endswith(".bin") or name.startswith("safety_checker/model")]
        fetched.clear()
        assert find(environment) == "downloaded\n"
        assert fetched == ["safety_checker/model.safetensors"]
        fetched.clear()
        assert find(environment) == "Hugging Face cache\n"
        assert fetched == []
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert find(offline) == "Hugging Face cache\n"
    assert find(offline | {"HF_HOME": "/nowhere"}, runpod_cache=tmp_path / "hub") == "RunPod's cached models\n"
    assert find(offline, runpod_cache=tmp_path / "hub") == "RunPod's cached models\n"


def cached(v1_4_repository: Path, cache: Path, name: str, commit: str) -> None:
    """Adds a commit of a model to a cache as RunPod does, without huggingface_hub and without a branch."""
    shutil.copytree(v1_4_repository, cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit)


def test_pinned_cached_commit_is_preferred_and_another_is_logged(
    v1_4_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("src.model.hub.RUNPOD_CACHE", tmp_path)

    def found(revision: str | None = None) -> str | None:
        found = repository.find_local(Settings(model_id=DEFAULT_MODEL_ID, model_revision=revision))
        return found and f"{found}, {found.where}"

    other = f"{DEFAULT_MODEL_ID} at {hub.REVISION[:12]}, RunPod's cached models"
    pinned = f"{DEFAULT_MODEL_ID} at {DEFAULT_MODEL_REVISION[:12]}, RunPod's cached models"
    assert found() is None
    cached(v1_4_repository, tmp_path, DEFAULT_MODEL_ID.lower(), hub.REVISION)
    assert found() == f"{other} (not the pinned commit, {DEFAULT_MODEL_REVISION[:12]})"
    assert found(hub.REVISION) == other
    assert found(DEFAULT_MODEL_REVISION) is None
    cached(v1_4_repository, tmp_path, DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION)
    assert found() == found(DEFAULT_MODEL_REVISION) == pinned


def test_newest_usable_cached_snapshot_wins(v1_4_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("src.model.hub.RUNPOD_CACHE", tmp_path)
    for commit, changed in (("old", 1), ("new", 3), ("damaged", 4), ("middle", 2)):
        cached(v1_4_repository, tmp_path, REPO, commit)
        os.utime(tmp_path / "models--someone--tiny" / "snapshots" / commit, (changed, changed))
    (tmp_path / "models--someone--tiny" / "snapshots" / "damaged" / "model_index.json").unlink()
    found = repository.find(Settings(model_id=REPO))
    assert (found.name, found.revision, found.where) == (REPO, "new", "RunPod's cached models")


def test_fault_of_a_cached_model_is_reported_when_downloads_are_forbidden(
    v1_4_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("src.model.hub.RUNPOD_CACHE", tmp_path)
    cached(v1_4_repository, tmp_path, DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION)
    (weight,) = tmp_path.glob("*/snapshots/*/vae/*.safetensors")
    weight.unlink()
    assert repository.find_local(Settings(model_id=DEFAULT_MODEL_ID)) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = f"vae/{weight.name} is missing.*, in the cached copy, and HF_HUB_OFFLINE=1 forbids a download: choose it as"
    with pytest.raises(StartError, match=f"^MODEL_ID={DEFAULT_MODEL_ID}: {said}"):
        repository.find_local(Settings(model_id=DEFAULT_MODEL_ID))


@pytest.mark.process
def test_broken_download_is_resumed(copy: Path, tmp_path: Path):
    # more than huggingface_hub keeps in memory before it writes
    big = copy / "unet" / "diffusion_pytorch_model.safetensors"
    big.write_bytes(os.urandom(24 * 2**20))
    with hub.serve(REPO, copy, breaks_off="unet/diffusion_pytorch_model.safetensors") as (address, fetched):
        assert find({"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}) == "downloaded\n"
    assert [name for name in fetched if name.startswith("unet/diff")] == [
        "unet/diffusion_pytorch_model.safetensors",
        f"unet/diffusion_pytorch_model.safetensors:{10 * 2**20}",
    ]
    (downloaded,) = (tmp_path / "home").glob(f"hub/*/snapshots/{hub.REVISION}/unet/{big.name}")
    assert downloaded.read_bytes() == big.read_bytes()


@pytest.mark.process
@pytest.mark.parametrize(
    ("closed", "said"),
    [
        ("model", "it may not be read by this user"),
        ("model/unet", "unet may not be read by this user"),
        (".", "this user may not enter {folder}"),
    ],
)
def test_directory_that_this_user_may_not_read_is_named(v1_4_repository: Path, closed: str, said: str):
    # not in pytest's own directory, which another user may not enter
    with TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent, "volume")
        shutil.copytree(v1_4_repository, folder / "model").chmod(0o755)
        (folder / closed).chmod(0o600)
        refused = find({"MODEL_ID": str(folder / "model")}, user=65534)
    assert refused == f"refused: MODEL_ID={folder / 'model'}: {said.format(folder=folder)}\n"


INFO, FILES = f"/api/models/{REPO}", f"/{REPO}/resolve/"
NO_SCOPE = "Please enable access to public gated repositories in your fine-grained token settings"


@pytest.mark.process
@pytest.mark.parametrize(
    ("path", "refusal", "said"),
    [
        (INFO, (401, None, "Invalid credentials"), 'refused: {}: the hub answered 401: "Invalid credentials"'),
        (
            INFO,
            (401, "RepoNotFound", None),
            "refused: {}: the hub has no such model, or it is private and HF_TOKEN may ",
        ),
        (INFO, (403, None, "Access to this resource is disabled."), "refused: {}: the hub answered 403: "),
        (INFO, (451, None, "For legal\treasons"), 'refused: {}: the hub answered 451: "For legal reasons"'),
        (FILES, (403, None, NO_SCOPE), f'refused: {{}}: the hub answered 403: "{NO_SCOPE}"'),
        (
            FILES,
            (403, "GatedRepo", NO_SCOPE),
            f'refused: {{}}: gated: accept its licence on the hub and set HF_TOKEN: "{NO_SCOPE}"',
        ),
        (FILES, (400, None, "long " * 999), 'refused: {}: the hub answered 400: "' + "long " * 38 + 'long..."'),
        # not 408 or 429, for which huggingface_hub would ask again for most of a minute
        (FILES, (425, None, None), "may recover: {}: the hub answered 425"),
        (INFO, (408, None, "Too slow"), 'may recover: {}: the hub answered 408: "Too slow"'),
        (INFO, (429, None, "Slow down"), 'may recover: {}: the hub answered 429: "Slow down"'),
        (INFO, (503, None, "Busy"), 'may recover: {}: the hub answered 503: "Busy"'),
    ],
)
def test_only_a_refusal_that_a_restart_may_cure_leads_to_one(
    v1_4_repository: Path, tmp_path: Path, path: str, refusal: hub.Refusal, said: str
):
    with hub.serve(REPO, v1_4_repository, refuses={path: refusal}) as (address, _):
        refused = find({"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"})
    said = said.format(f"MODEL_ID={REPO}")
    assert refused.startswith(said) if said.endswith(" ") else refused == f"{said}\n"


@pytest.mark.process
def test_refusal_by_the_hub_is_reported_in_one_line(v1_4_repository: Path, tmp_path: Path):
    home = {"HF_HOME": str(tmp_path)}
    with hub.serve(REPO, v1_4_repository) as (address, _):
        assert find(home | {"HF_ENDPOINT": address, "MODEL_REVISION": "nope"}) == (
            f'refused: MODEL_ID={REPO}, MODEL_REVISION=nope: the hub has no such revision: "Invalid rev id: nope"\n'
        )
    with hub.serve("someone/else", v1_4_repository) as (address, _):
        assert "the hub has no such model, or it is private" in find(home | {"HF_ENDPOINT": address})
    with hub.serve(REPO, v1_4_repository, token="hf_other") as (address, _):
        said = find(home | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secret"})
        assert said.startswith(f"refused: MODEL_ID={REPO}: gated: accept its licence on the hub and set HF_TOKEN: ")
    for revision in ("main", hub.REVISION):
        unreachable = home | {"HF_ENDPOINT": "http://127.0.0.1:9", "MODEL_REVISION": revision}
        started = time.monotonic()
        assert "the hub cannot be reached" in find(unreachable)
        assert time.monotonic() - started < 15
    assert "or set HF_HUB_OFFLINE=0 to download it" in find(home | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.process
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"LORA": "/nowhere/a.safetensors"}, "LORA=/nowhere/a.safetensors: no such file or directory"),
        ({"LORA": f"{REPO}/a.safetensors"}, f"LORA={REPO}/a.safetensors: {REPO} has no file a.safetensors"),
        ({"LORA": f"{REPO}/checkpoint.safetensors"}, f"LORA={REPO}/checkpoint.safetensors: no LoRA, but a checkpoint"),
        ({"LORA": f"{REPO}/page.safetensors"}, "page.safetensors is no safetensors file, whatever its name says"),
        ({"BASE_MODEL": "/nowhere"}, "BASE_MODEL=/nowhere: no such file or directory"),
        ({"BASE_MODEL": f"{REPO}/x"}, f"BASE_MODEL={REPO}/x: neither a directory, a file, nor a hub id"),
    ],
)
def test_nothing_large_is_downloaded_while_another_setting_is_wrong(
    copy: Path, tmp_path: Path, settings: dict[str, str], said: str
):
    make_checkpoint(copy, copy / "checkpoint.safetensors")
    (copy / "page.safetensors").write_text("<!doctype html>" * 100)
    checkpoint = {"MODEL_ID": f"{REPO}/checkpoint.safetensors"}
    with hub.serve(REPO, copy) as (address, fetched):
        online = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), **settings}
        for model in ({}, checkpoint) if "LORA" in settings else (checkpoint,):
            refused = find({"BASE_MODEL": REPO} | model | online)
            assert refused.startswith("refused: ") and said in refused
    assert fetched and not [name for name in fetched if name.endswith((".safetensors", ".bin"))]


@pytest.mark.process
def test_silent_hub_is_given_up(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for model_id in (REPO, f"{REPO}/a.safetensors"):
            said = find({"MODEL_ID": model_id, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}, max_silence=0.5)
            assert said == f"may recover: MODEL_ID={model_id}: in no local cache, and the hub cannot be reached\n"


def test_every_new_client_of_the_hub_gives_up_on_silence():
    # huggingface_hub closes its client after an error of a connection
    close_session()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patched:
        patched.setattr("src.model.hub.MAX_SILENCE", 0.1)
        with pytest.raises(ReadTimeout):
            get_session().get(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=None)


ALL = set(WEIGHTS)
"""The components with weights."""


def in_part(folder: Path) -> None:
    halve(folder, "unet", "vae")


def without_common_kind(folder: Path) -> None:
    halve(folder, "unet", "vae")
    weight_file(folder, "unet").unlink()


@pytest.mark.parametrize(
    ("prepare", "half"),
    [
        (lambda folder: None, set()),
        (halve, ALL),
        (lambda folder: halve(folder, keep=False), ALL),
        (in_part, set()),
        (without_common_kind, {"unet", "vae"}),
    ],
)
def test_float16_files_are_read_if_every_component_has_one(copy: Path, prepare: Callable[[Path], None], half: set[str]):
    prepare(copy)
    found = repository.find(Settings(model_id=str(copy)))
    assert list(found.weights) == ["unet", "safety_checker", "text_encoder", "vae"]
    assert {component for component, file in found.weights.items() if ".fp16." in file} == half
    assert all(file.is_file() for file in found.weight_files)


def test_components_that_are_not_loaded_need_no_float16_file(copy: Path):
    halve(copy, "unet", "text_encoder", "vae")
    found = repository.find(Settings(model_id=str(copy), safety_checker=False))
    assert found.weights == {name: f"{name}/{WEIGHTS[name]}.fp16.safetensors" for name in found.weights}


def test_embedded_model_has_three_files_to_read():
    assert all(file.is_file() for file in repository.find(Settings(model_id="demo")).weight_files)


@pytest.mark.process
@pytest.mark.parametrize(("prepare", "half"), [(halve, True), (in_part, False)])
def test_one_precision_is_downloaded(copy: Path, tmp_path: Path, prepare: Callable[[Path], None], half: bool):
    prepare(copy)
    (copy / "LICENSE.md").write_text("as the model's authors have it")
    with hub.serve(REPO, copy) as (address, fetched):
        assert find({"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}) == "downloaded\n"
    weights = {name for name in fetched if name.endswith(".safetensors")}
    assert weights == {f"{name}/{WEIGHTS[name]}{'.fp16' if half else ''}.safetensors" for name in ALL}
    assert "LICENSE.md" in fetched


@pytest.mark.process
@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (
            lambda folder: edit(folder, "model_index.json", _class_name="StableDiffusionXLPipeline"),
            "a StableDiffusionXLPipeline, this worker runs a StableDiffusionPipeline (Stable Diffusion 1.x and 2.x)",
        ),
        (
            lambda folder: edit(folder, "tokenizer/tokenizer_config.json", model_max_length=78),
            "tokenizer/tokenizer_config.json: model_max_length must be at most 77, got 78",
        ),
        (
            lambda folder: (folder / "tokenizer" / "vocab.json").unlink(),
            "tokenizer/vocab.json is missing",
        ),
    ],
)
def test_model_is_refused_before_its_weights_are_downloaded(
    copy: Path, tmp_path: Path, prepare: Callable[[Path], None], said: str
):
    prepare(copy)
    with hub.serve(REPO, copy) as (address, fetched):
        refused = find({"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")})
    assert refused.startswith(f"refused: MODEL_ID={REPO}: {said}")
    assert fetched and not [name for name in fetched if name.endswith((".safetensors", ".bin"))]


def test_only_a_baked_model_has_the_name_of_its_origin(copy: Path):
    edit(copy, "model_index.json", _name_or_path="CompVis/stable-diffusion-v1-4", _commit_hash="abc")
    found = repository.find(Settings(model_id=str(copy)))
    assert (found.name, found.revision) == ("copy", None)
    edit(copy, "model_index.json", **{ORIGIN: {"model": REPO, "commit": hub.REVISION}})
    found = repository.find(Settings(model_id=str(copy)))
    assert (found.name, found.revision) == (REPO, hub.REVISION)


def test_snapshot_folder_of_a_cache_has_the_name_of_its_model(v1_4_repository: Path, tmp_path: Path):
    cached(v1_4_repository, tmp_path, "Someone/tiny-model", hub.REVISION)
    snapshot = tmp_path / "models--Someone--tiny-model" / "snapshots" / hub.REVISION
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        assert str(repository.find(Settings(model_id=str(path)))) == f"Someone/tiny-model at {hub.REVISION[:12]}"
    for folder in (snapshot.parent, snapshot.parent.parent):
        with pytest.raises(
            StartError, match=f"folder of a Hugging Face cache: name a commit in it, such as {snapshot}$"
        ):
            repository.find(Settings(model_id=str(folder)))
