"""Writes the JSON Schemas of a job's input and output: ``python -m builder.schemas``.

With them clients can check a request before they pay for it.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from src.api.output import OneImage, SeveralImages
from src.api.request import MAX_PROMPT_LENGTH, ImageRequest, ModelLimits
from src.schedulers import SCHEDULERS

V1_4 = ModelLimits(native_size=512, max_size=1024, scheduler="PNDM")
FOLDER = Path(__file__).parents[1] / "examples" / "schema"


def input_schema(limits: ModelLimits) -> dict[str, Any]:
    """The schema of ``job["input"]`` for a model. What it accepts, the worker accepts, but for characters that no text
    should hold and for the last seeds below 2^53, which leave no room for more images."""
    schema = ImageRequest.model_json_schema()
    schema["required"] = ["prompt"]
    fields = schema["properties"]
    for name in ("width", "height"):
        fields[name] |= {"maximum": limits.max_size, "default": limits.native_size}
    fields["scheduler"] |= {"enum": [*SCHEDULERS], "default": limits.scheduler}
    fields["prompt"] |= {"pattern": r"\S", "maxLength": MAX_PROMPT_LENGTH}
    fields["negative_prompt"]["maxLength"] = MAX_PROMPT_LENGTH
    for name, field in fields.items():
        del field["title"]
        if name != "prompt":
            # null means the default
            field["type"] = [field["type"], "null"]
            if "enum" in field:
                field["enum"].append(None)
    return _headed(schema, "Job input")


def output_schema() -> dict[str, Any]:
    """The schema of the output of a job that is completed."""
    return _headed(TypeAdapter(OneImage | SeveralImages).json_schema(), "Job output")


def _headed(schema: dict[str, Any], title: str) -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": title}


def files() -> dict[Path, str]:
    """Each schema file and what it should hold."""
    schemas = {"input.json": input_schema(V1_4), "output.json": output_schema()}
    return {FOLDER / name: json.dumps(schema, indent=2) + "\n" for name, schema in schemas.items()}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
