"""Bakes a model into the image: ``python -m builder.fetch_model --model ID --revision HASH --output DIRECTORY``.

Downloads only the files that the worker reads and saves them again as float16 safetensors, half their size.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from src.errors import StartError, one_line
from src.model import repository
from src.settings import DEFAULT_MODEL_ID, Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def save(pipe: "StableDiffusionPipeline", folder: Path) -> None:
    """Writes ``pipe`` to ``folder`` as safetensors that everyone may read; the library lets only the owner."""
    pipe.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def fetch(model_id: str, revision: str | None, output: Path) -> None:
    """Writes ``model_id`` to ``output`` in float16; what stood there is replaced only by a finished copy.

    Raises:
        StartError: if the model cannot be had, or is not one that the worker runs.
    """
    settings = Settings(model_id=model_id, model_revision=revision)
    found = repository.find(settings)
    print(f"{found}: {found.where}, {found.path}", flush=True)
    # imported only now: a model that cannot be downloaded is reported at once
    import torch
    from diffusers import StableDiffusionPipeline

    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        pipe = StableDiffusionPipeline.from_pretrained(found.path, dtype=torch.float16, use_safetensors=True)
        save(pipe, unfinished)
        index = unfinished / "model_index.json"
        # the directory remembers what it was made from, for the worker's clients and its log
        origin = {"_name_or_path": found.name, "_commit_hash": found.revision}
        index.write_text(json.dumps(json.loads(index.read_text()) | origin, indent=2) + "\n")
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
    parser.add_argument("--model", default=DEFAULT_MODEL_ID, help="hub id")
    parser.add_argument("--revision", help="hub revision; by default a pinned one for the default model")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    arguments = parser.parse_args()
    try:
        fetch(arguments.model, arguments.revision or None, arguments.output)
    except StartError as error:
        sys.exit(f"cannot fetch {arguments.model}: {error}")


if __name__ == "__main__":
    main()
