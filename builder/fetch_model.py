"""Bakes a model into the image: ``python -m builder.fetch_model --model ID --revision HASH --output DIRECTORY``.

Downloads only the files that the worker reads, and saves the model in float16 safetensors, with its licence and card.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from src.errors import StartError, one_line
from src.model import repository
from src.model.hub import LICENCES
from src.model.repository import ORIGIN
from src.settings import DEFAULT_MODEL_ID, Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def save(pipe: "StableDiffusionPipeline", folder: Path) -> None:
    """Saves ``pipe`` to ``folder`` as safetensors that everyone can read; the library lets only the owner read them."""
    pipe.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def fetch(model_id: str, revision: str | None, output: Path, base_model: str | None = None) -> None:
    """Saves ``model_id`` to ``output`` in float16; an existing directory is replaced only by a finished copy.

    Raises:
        StartError: if the model cannot be found or downloaded, or the worker cannot run it.
    """
    settings = Settings(model_id=model_id, model_revision=revision, base_model=base_model)
    found = repository.find(settings)
    print(f"{found}: {found.where}, {found.path}", flush=True)
    # imported only now, so that a failed download is reported at once
    import torch

    from src.model import loading

    pipe = loading.load(found, "cpu", settings, torch.float16)
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save(pipe, unfinished)
        index = unfinished / "model_index.json"
        # records what the copy was made from, for the worker's clients and its log
        origin = {ORIGIN: {"model": found.name, "commit": found.revision}}
        index.write_text(json.dumps(json.loads(index.read_text()) | origin, indent=2) + "\n")
        for pattern in LICENCES:
            for file in found.licences.glob(pattern):
                shutil.copyfile(file, unfinished / file.name)
        shutil.rmtree(output, ignore_errors=True)
        unfinished.rename(output)
    except Exception as error:
        raise StartError(f"cannot save it in float16: {one_line(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {size / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Download a model and save it in float16.")
    parser.add_argument("--model", default=DEFAULT_MODEL_ID, help="hub id, or owner/name/file.safetensors")
    parser.add_argument("--revision", help="hub revision; by default a pinned one for the default model")
    parser.add_argument("--base", help="where a single file's tokenizer, scheduler and so on come from")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    arguments = parser.parse_args()
    try:
        fetch(arguments.model, arguments.revision or None, arguments.output, arguments.base)
    except StartError as error:
        sys.exit(f"cannot fetch the model: {error}")


if __name__ == "__main__":
    main()
