"""Stand-ins for modules of libraries that are not installed here."""

import sys
import types


def install(monkeypatch, name, **content):
    """Have `import name` find a module with this content, and its packages."""
    parts, module = name.split("."), None
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        parent, module = module, sys.modules.get(path)
        if module is None:
            module = types.ModuleType(path)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
        if parent is not None:
            monkeypatch.setattr(parent, parts[end - 1], module, raising=False)
    for key, value in content.items():
        monkeypatch.setattr(module, key, value, raising=False)


def forget(*names):
    """Have the next import of these modules run them again."""
    for name in names:
        package, _, last = name.rpartition(".")
        if sys.modules.pop(name, None) is not None:
            delattr(sys.modules[package], last)
