#!/usr/bin/env python3
"""Write a JSON Schema of each record that `dmabuf ... --json` prints; `make schemas` runs this.

usage: tools/write_schemas.py FOLDER
"""

import inspect
import json
import pkgutil
import re
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from dmabuf import cli


def documents() -> dict[str, Any]:
    """Return the records by their `format`."""
    found = {}
    for module in pkgutil.iter_modules(cli.__path__, "dmabuf.cli."):
        for _, one in inspect.getmembers(import_module(module.name), is_dataclass):
            for field in fields(one):
                if field.name == "format" and isinstance(field.default, str):
                    found[field.default] = one
    return dict(sorted(found.items()))


class Plain(GenerateJsonSchema):
    """Sets no titles, which would only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: D102
        return False


def schema(record: Any) -> dict[str, Any]:
    """Return the schema of a record, described by the docstrings of its fields."""
    record.__pydantic_config__ = {
        "use_attribute_docstrings": True,
        "json_schema_serialization_defaults_required": True,
    }
    told = TypeAdapter(record).json_schema(mode="serialization", schema_generator=Plain)
    for name, part in {record.__name__: told, **told.get("$defs", {})}.items():
        kind = vars(sys.modules[record.__module__]).get(name, object)
        for base in filter(is_dataclass, inspect.getmro(kind)[1:]):  # pydantic leaves these out
            for key, field in schema(base)["properties"].items():
                part["properties"][key] = field | part["properties"][key]
    return told


if __name__ == "__main__":
    for name, record in documents().items():
        told = {"$schema": Plain.schema_dialect} | schema(record) | {"title": name}
        path = Path(sys.argv[1], f"{name.replace('/', '-')}.json")
        path.write_text(re.sub(r"\bNone\b", "null", json.dumps(told, indent=1)) + "\n")
