"""Python starts with this where its folder is on the path: HIDDEN_PACKAGES are not installed."""

import os
from importlib.machinery import PathFinder

_hidden = set(os.environ.get("HIDDEN_PACKAGES", "").split())
_find_spec = PathFinder.find_spec


def _find_others(name, path=None, target=None):
    return None if name in _hidden else _find_spec(name, path, target)


PathFinder.find_spec = _find_others
