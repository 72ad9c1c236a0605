"""Checks whether the worker can run a model, from its small files and the names of the large ones."""

import json
import os
from collections.abc import Collection, Mapping, Set
from pathlib import Path, PurePosixPath
from typing import Any

from src.errors import StartError, shortened

PIPELINE = "StableDiffusionPipeline"
INPAINTING = "StableDiffusionInpaintPipeline"
CLASSES = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
REQUIRED = ("unet", "text_encoder", "vae", "tokenizer", "scheduler")
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")

FEATURE_EXTRACTORS = ("CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorPil")
"""What versions of transformers have called the one that the safety checker needs."""
PREPROCESSOR = "feature_extractor/preprocessor_config.json"

TOKENIZER = ("tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
"""Its files; ``tokenizer/tokenizer.json`` holds what is in the last two, too."""

LFS_POINTER = b"version https://git-lfs"
"""What a file begins with that git fetched without Git LFS (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "safety_checker": "model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
"""The name of each component's weight file, without its ending, in the order of their sizes in v1-4, largest first."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        StartError: if ``folder`` has none of that name.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StartError(f"{name} is missing") from None
    except (OSError, ValueError) as error:
        # the text of an OSError includes the whole path
        why = error.strerror if isinstance(error, OSError) else error
        raise StartError(f"cannot read {name}: {why}") from error
    if not isinstance(content, dict):
        raise StartError(f"cannot read {name}: it holds no JSON object")
    return content


def check_directory(path: Path, parts: Collection[str] = WEIGHTS.keys()) -> Mapping[str, str]:
    """Runs ``check`` on a model's directory, and checks that this user may read it and that its weights are there."""
    for name in ("", *REQUIRED, *OPTIONAL):
        if (path / name).is_dir() and not os.access(path / name, os.R_OK | os.X_OK):
            raise StartError(f"{name or 'it'} may not be read by this user")
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    if example := next(snapshots.glob("*/model_index.json"), None):
        raise StartError(f"a folder of a Hugging Face cache: name a commit in it, such as {example.parent}")
    # links into a cache may be broken
    files = {file.relative_to(path).as_posix() for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file()}
    weights = check(path, files, parts)
    for file in weights.values():
        if not os.access(path / file, os.R_OK):
            raise StartError(f"{file} may not be read by this user")
        with (path / file).open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise StartError(f"{file} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    return weights


def check(folder: Path, files: Set[str], parts: Collection[str]) -> dict[str, str]:
    """Checks that a model is a Stable Diffusion pipeline in safetensors, without reading the weights.

    Args:
        folder: contains the model's JSON files.
        files: the names of all its files, such as ``unet/config.json``, including those that are not in ``folder`` yet.
        parts: the components whose weights will be loaded, if the model has them.

    Returns:
        The weight file to load for each component, in the order of ``WEIGHTS``.

    Raises:
        StartError: saying what is missing or of the wrong kind, without the folder's name.
    """
    index = _read_index(folder, files)
    _check_configs(folder, index, files)
    components = [name for name in WEIGHTS if name in parts and index.get(name, [None])[0]]
    if "safety_checker" in components:
        _check_feature_extractor(index, files)
        for name in ("safety_checker/config.json", PREPROCESSOR):
            read_json(folder, name)
    return _choose_weights(components, files)


def _read_index(folder: Path, files: Set[str]) -> dict[str, Any]:
    if "model_index.json" not in files:
        single = [name for name in sorted(files) if "/" not in name and name.endswith(".safetensors")]
        hint = f"; for a single file, add its name, such as {single[0]}" if single else ""
        raise StartError(f"not a diffusers pipeline: it has no model_index.json{hint}")
    index = read_json(folder, "model_index.json")
    if (kind := index.get("_class_name")) not in (PIPELINE, INPAINTING):
        raise StartError(f"a {shortened(kind)}, this worker runs a {PIPELINE} (Stable Diffusion 1.x and 2.x)")
    for component in (*REQUIRED, *OPTIONAL):
        pair = index.get(component, [None, None])
        if not isinstance(pair, list) or len(pair) != 2:
            got = shortened(json.dumps(pair))
            raise StartError(f"model_index.json: {component} must be a pair, [null, null] for none, got {got}")
        if pair[0] is None and component in REQUIRED:
            raise StartError(f"model_index.json names no {component}")
        if pair[1] != CLASSES.get(component, pair[1]):
            raise StartError(f"{component} is a {shortened(pair[1])}, this worker runs a {CLASSES[component]}")
    return index


def _check_configs(folder: Path, index: dict[str, Any], files: Set[str]) -> None:
    """Checks that the components fit together. A missing value means the default of the component's class."""
    unet, vae, text_encoder = (read_json(folder, f"{name}/config.json") for name in ("unet", "vae", "text_encoder"))
    channels, latent_channels = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    # for inpainting 9: the latents, those of the picture that is painted over, and its mask
    if channels not in (latent_channels, 9):
        raise StartError(
            f"unet/config.json: in_channels must be {latent_channels}, or 9 for inpainting, got {channels}: "
            "models for editing are other pipelines"
        )
    size = unet.get("sample_size")
    if type(size) is not int or size < 8:
        raise StartError(f"unet/config.json: sample_size must be one integer, such as 64, got {json.dumps(size)}")
    # the configuration may be that of a whole CLIP model
    width = text_encoder.get("text_config", text_encoder).get("hidden_size", 512)
    expected = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280)
    if {width} != set(expected if isinstance(expected, list) else [expected]):
        raise StartError(
            f"text_encoder/config.json: hidden_size is {width}, but unet/config.json wants {json.dumps(expected)}: "
            "the text encoder is another model's"
        )
    for name in TOKENIZER if "tokenizer/tokenizer.json" not in files else TOKENIZER[:1]:
        if name not in files or not (folder / name).stat().st_size:
            raise StartError(f"{name} is {'empty' if name in files else 'missing'}")
    read_json(folder, TOKENIZER[0])
    scheduler = read_json(folder, "scheduler/scheduler_config.json")
    if index["scheduler"][1] == "PNDMScheduler" and not scheduler.get("skip_prk_steps"):
        raise StartError(
            "scheduler/scheduler_config.json: skip_prk_steps of PNDMScheduler must be true, as Stable Diffusion has it"
        )


def _check_feature_extractor(index: dict[str, Any], files: Set[str]) -> None:
    kind = index.get("feature_extractor", [None, None])[1]
    if kind in FEATURE_EXTRACTORS and PREPROCESSOR in files:
        return
    if kind in FEATURE_EXTRACTORS:
        got = f"{PREPROCESSOR} is missing"
    else:
        got = f"feature_extractor is a {shortened(kind)}" if kind else "model_index.json names no feature_extractor"
    raise StartError(f"{got}, safety_checker needs a CLIPImageProcessor: add it, or set SAFETY_CHECKER=false")


def _choose_weights(components: Collection[str], files: Set[str]) -> dict[str, str]:
    """Chooses the float16 files if every component has one, otherwise the others.

    If neither set is complete, a component's float16 file is preferred, as with diffusers' ``variant="fp16"``.
    """
    half, whole = (
        {name: f"{name}/{WEIGHTS[name]}{variant}.safetensors" for name in components} for variant in (".fp16", "")
    )
    if not files >= set(half.values()) and files >= set(whole.values()):
        return whole
    chosen = {name: half[name] if half[name] in files else whole[name] for name in components}
    for component, file in chosen.items():
        if file not in files:
            raise StartError(f"{file} is missing{_instead(component, files)}")
    return chosen


def _instead(component: str, files: Set[str]) -> str:
    """Names the files that a component's weights are in instead, and what to do about it."""
    endings = (".safetensors", ".bin", ".ckpt", ".msgpack")
    paths = [PurePosixPath(name) for name in sorted(files) if name.endswith(endings)]
    there = [path.name for path in paths if path.parent.name == component]
    if not there:
        return ""
    if any("-of-" in name for name in there):
        advice = "shards are not read: save the model again in one file (save_pretrained, max_shard_size)"
    elif any(name.endswith(".safetensors") for name in there):
        advice = "if these are the weights that you want, give them that name"
    else:
        advice = "pickled weights can run code, and are not read: save the model again with diffusers (save_pretrained)"
    return f" ({', '.join(there[:3])} is there; {advice})"


def check_tokenizer(tokenizer: Any, text_encoder: Any) -> None:
    """Checks that every token has an embedding: on a CUDA device, one without would corrupt the context.

    Args:
        tokenizer: transformers' CLIPTokenizer.
        text_encoder: the configuration of transformers' CLIPTextModel.

    Raises:
        StartError: if not.
    """
    length, positions = tokenizer.model_max_length, text_encoder.max_position_embeddings
    if length > positions:
        # transformers uses 1e30 for none
        got = length if length < 1e9 else "none"
        raise StartError(f"tokenizer/tokenizer_config.json: model_max_length must be at most {positions}, got {got}")
    highest, words = max(tokenizer.get_vocab().values()), text_encoder.vocab_size
    if highest >= words:
        raise StartError(
            f"tokenizer has tokens up to {highest}, text_encoder has embeddings up to {words - 1} only: "
            "save it again after resize_token_embeddings"
        )
