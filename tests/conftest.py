import sys

import pytest

from clip_pgs.masking.strategy import _REGISTRY


@pytest.fixture(autouse=True)
def _strategies_of_a_test():
    """Forget what a test has registered, and the modules that it came from."""
    entries, declarations = dict(_REGISTRY._entries), dict(_REGISTRY._declarations)
    modules = set(sys.modules)
    yield
    for name in _REGISTRY._entries.keys() - entries.keys():
        module = _REGISTRY._entries[name].__module__
        if module not in modules:
            sys.modules.pop(module, None)
    _REGISTRY._entries, _REGISTRY._declarations = entries, declarations
