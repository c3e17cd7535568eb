import gc
import os
import sys
from pathlib import Path

import pytest

from clip_pgs.masking.strategy import _REGISTRY

# Imports and thousands of tests stay to the end: to look for garbage among them takes seconds.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Look for garbage again, of the tests alone."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Run files with slow tests first: one that starts last keeps a process busy by itself."""
    first = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session", autouse=True)
def _lean_processes():
    """Start processes as clip-train.sh sets up: open_clip takes seconds to import these two."""
    lean = str(Path(__file__).parent / "support" / "lean")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [lean, os.environ.get("PYTHONPATH")]))
    os.environ["HIDDEN_PACKAGES"] = "transformers wandb"


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


@pytest.fixture(scope="session", autouse=True)
def _vocabulary_read_once():
    """Read open_clip's word list once a process; every check and every run makes a tokenizer."""
    if "open_clip" not in sys.modules:
        yield
        return
    from open_clip.tokenizer import SimpleTokenizer

    read, states = SimpleTokenizer.__init__, {}

    def init(self, *args, **options):
        key = repr((args, sorted(options.items())))
        if key not in states:
            read(self, *args, **options)
            states[key] = vars(self).copy()
        vars(self).update(states[key])

    SimpleTokenizer.__init__ = init
    yield
    SimpleTokenizer.__init__ = read
