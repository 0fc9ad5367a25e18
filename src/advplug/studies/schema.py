"""The JSON Schema of matrix files, for editors."""

from __future__ import annotations

from typing import Any

from advplug.studies.file import File


def json_schema() -> dict[str, Any]:
    """What a file may hold, as far as can be said without looking names up."""
    schema: dict[str, Any] = _without_null(File.model_json_schema())
    schema.pop("description")
    for part in (schema, schema["$defs"]["Matrix"]):
        for name in ("include", "exclude"):  # one block may stand without a list
            found = part["properties"][name]
            del found["type"]
            item = found.pop("items")
            found["anyOf"] = [item, {"type": "array", "items": item}]
    named = [{"required": [key]} for key in ("models", "include", "scales")]
    top = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "advplug matrix"}
    return {**top, **{key: value for key, value in schema.items() if key not in top}, "anyOf": named}


def _without_null(schema: Any) -> Any:
    """What is left out of a file is no null in it."""
    if isinstance(schema, list):
        return [_without_null(part) for part in schema if part != {"type": "null"}]
    if not isinstance(schema, dict):
        return schema
    return {key: _without_null(part) for key, part in schema.items() if (key, part) != ("default", None)}
