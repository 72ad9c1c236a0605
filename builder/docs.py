"""Generates documentation from the code: ``python -m builder.docs``.

It writes the JSON Schemas of a job's input and output, with which clients can check a request before they pay for it,
the README's tables of fields, output and settings, and the settings in RunPod's Hub.
"""

import json
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from src.api.limits import INVISIBLE, MAX_PROMPT_LENGTH, ModelLimits
from src.api.output import OneImage, SeveralImages
from src.api.request import ImageRequest
from src.schedulers import SCHEDULERS
from src.settings import Settings, bounds

ROOT = Path(__file__).parents[1]
V1_4 = ModelLimits(native_size=512, max_size=1024, scheduler="PNDM")
DEMO = ModelLimits(native_size=128, max_size=256, scheduler="DDIM")


def input_schema(limits: ModelLimits) -> dict[str, Any]:
    """Returns the schema of ``job["input"]`` for a model.

    It accepts what the worker accepts, and a little more: control characters, lone surrogates, invisible characters
    beyond U+FFFF alone, texts that are no pictures, and fields that do not fit together.
    """
    schema = ImageRequest.model_json_schema()
    schema["required"] = ["prompt"]
    fields = schema["properties"]
    for name in ("width", "height"):
        fields[name] |= {"maximum": limits.max_size, "default": limits.native_size}
    fields["scheduler"] |= {"enum": [*SCHEDULERS], "default": limits.scheduler}
    fields["prompt"] |= {"pattern": f"[^{INVISIBLE}]", "maxLength": MAX_PROMPT_LENGTH}
    fields["negative_prompt"]["maxLength"] = MAX_PROMPT_LENGTH
    for name, field in fields.items():
        del field["title"]
        if "anyOf" in field:
            # pydantic's way to say that it may be null
            field |= field.pop("anyOf")[0]
        if name != "prompt":
            # null means the default
            field["type"] = [field["type"], "null"]
            if "enum" in field:
                field["enum"].append(None)
    return _titled(schema, "Job input")


def output_schema() -> dict[str, Any]:
    """Returns the schema of a completed job's output."""
    return _titled(TypeAdapter(OneImage | SeveralImages).json_schema(), "Job output")


def fields_table() -> str:
    """Returns the README's table of a request's fields."""
    rows = ["| field | type | default | bounds | meaning |", "|---|---|---|---|---|"]
    v1_4, demo = (input_schema(limits)["properties"] for limits in (V1_4, DEMO))
    for name, field in v1_4.items():
        kind = field["type"] if name == "prompt" else field["type"][0]
        default, bounds = _default(name, field), _bounds(field)
        if field != demo[name]:
            default += f"; embedded model {_default(name, demo[name])}"
            if _bounds(demo[name]) != bounds:
                bounds += f"; embedded model at most {demo[name]['maximum']}"
        rows.append(f"| `{name}` | {kind} | {default} | {bounds} | {field['description']} |")
    return "\n".join(rows)


def output_table() -> str:
    """Returns the README's table of the output's fields, for one image."""
    rows = ["| field | meaning |", "|---|---|"]
    for name, field in TypeAdapter(OneImage).json_schema()["properties"].items():
        rows.append(f"| `{name}` | {field.get('description', 'The value that was used, given or default')} |")
    return "\n".join(rows)


def settings_table() -> str:
    """Returns the README's table of settings."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        meaning, _, default = field.description.partition(" Default: ") if field.description else ("", "", "")
        if not default:
            default = "unset" if field.default is None else f"`{json.dumps(field.default)}`".replace('"', "")
        rows.append(f"| `{name.upper()}` | {default} | {meaning.rstrip('.')}{_setting_bounds(name, field)} |")
    return "\n".join(rows)


def hub_settings() -> list[dict[str, Any]]:
    """Returns the settings in the format of RunPod's Hub."""
    return [{"key": name.upper(), "input": _hub_input(name, field)} for name, field in Settings.model_fields.items()]


def files() -> dict[Path, str]:
    """Returns the content of each file that this module writes."""
    schemas = ROOT / "examples" / "schema"
    readme, hub = ROOT / "README.md", ROOT / ".runpod" / "hub.json"
    text = readme.read_text(encoding="utf-8")
    tables = {"fields": fields_table(), "output": output_table(), "settings": settings_table()}
    for name, table in tables.items():
        start, end = f"<!-- {name}, written by python -m builder.docs -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        text = before + start + table + "\n" + end + rest.partition(end)[2]
    config = json.loads(hub.read_text(encoding="utf-8"))
    ours = {name.upper() for name in Settings.model_fields}
    others = [each for each in config["config"]["env"] if each["key"] not in ours]
    config["config"]["env"] = hub_settings() + others
    return {
        schemas / "input.json": _json(input_schema(V1_4)),
        schemas / "output.json": _json(output_schema()),
        readme: text,
        hub: _json(config),
    }


def _titled(schema: dict[str, Any], title: str) -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": title}


def _default(name: str, field: dict[str, Any]) -> str:
    if name == "prompt":
        return "required"
    return "none" if field["default"] is None else f"`{json.dumps(field['default'])}`"


def _bounds(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"] if value)
    if "maxLength" in field:
        return f"{'1 to' if 'pattern' in field else 'at most'} {field['maxLength']:,} characters after trimming"
    if "exclusiveMinimum" in field:
        return f"above {field['exclusiveMinimum']}, to {field['maximum']}"
    if "minimum" not in field:
        return ""
    multiple = f", multiple of {field['multipleOf']}" if "multipleOf" in field else ""
    return f"{field['minimum']} to {field['maximum']}{multiple}"


def _setting_bounds(name: str, field: FieldInfo) -> str:
    if isinstance(field.default, bool):
        return " (`true` or `false`)"
    if isinstance(field.default, str):
        *first, last = (f"`{choice}`" for choice in get_args(field.annotation))
        return f" ({', '.join(first)} or {last})"
    return " ({:,} to {:,})".format(*bounds(name)) if isinstance(field.default, int) else ""


def _hub_input(name: str, field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    kind = {bool: "boolean", int: "number"}.get(type(field.default), "string")
    entry = {
        "name": field.title,
        "type": kind,
        "description": (field.description or "").replace("`", ""),
        "default": "" if field.default is None else field.default,
    }
    if isinstance(field.default, str):
        entry["options"] = [{"label": choice, "value": choice} for choice in get_args(field.annotation)]
    if kind == "number":
        entry["min"], entry["max"] = bounds(name)
    if field.default is None:
        entry["required"] = False
    return entry | {"advanced": True} | extra


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")
