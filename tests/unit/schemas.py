"""The published JSON Schemas, which the tests compare with what `--json` prints."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema

SCHEMAS = Path(__file__).parents[2] / "docs/reference/schemas"


def closed(schema: Any) -> Any:
    """Return a schema that allows no other keys than it describes, and only snake_case."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    told = {key: closed(value) for key, value in schema.items()}
    if isinstance(told.get("properties"), dict):
        told |= {"additionalProperties": False, "propertyNames": {"pattern": "^[a-z][a-z0-9_]*$"}}
    return told


def checked(text: str) -> Any:
    """Return the one document in a text, which the schema of its format describes."""
    document = json.loads(text)
    name = document["format"]
    assert re.fullmatch(r"dmabuf-[a-z-]+/\d+", name)
    schema = json.loads((SCHEMAS / f"{name.replace('/', '-')}.json").read_text())
    jsonschema.Draft202012Validator(closed(schema)).validate(document)
    return document
