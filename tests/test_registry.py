"""A registry gives what was registered by its name, or by where it can be imported."""

import hashlib
import importlib
import sys
import zipfile
from types import ModuleType

import pytest

from clip_pgs.registry import Registry, own_code


@pytest.fixture
def registry():
    registry = Registry("pet")
    registry.register("dog", sound="bark")(dict)
    return registry


def test_a_registry_gives_an_entry_and_what_it_declared(registry):
    assert registry.names() == ["dog"]
    assert registry.get("dog") is dict
    assert registry.declaration("dog") == {"sound": "bark"}
    with pytest.raises(ValueError, match="unknown pet 'cat'; choose from dog"):
        registry.get("cat")


def test_a_name_is_given_once_but_to_what_replaces_itself(registry):
    with pytest.raises(ValueError, match="pet 'dog' is registered already"):
        registry.register("dog")(list)

    def define():
        @registry.register("cat")
        def cat():
            pass

        return cat

    define()
    redefined = define()
    assert registry.get("cat") is redefined


@pytest.mark.parametrize("name", ["", "a:b"])
def test_a_name_that_could_be_an_import_is_refused(registry, name):
    with pytest.raises(ValueError, match="must hold no colon"):
        registry.register(name)


def test_an_entry_of_another_module_is_found_by_its_import_path(registry, tmp_path, monkeypatch):
    (tmp_path / "my_pets.py").write_text("class Bird:\n    pass\n\nclass Fish:\n    pass\n")
    (tmp_path / "my_broken_pets.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    import my_pets

    registry.register("bird", sound="sing")(my_pets.Bird)
    assert registry.get("my_pets:Bird") is my_pets.Bird
    assert registry.declaration("my_pets:Bird") == {"sound": "sing"}
    for name, reason in {
        "my_pets:Fish": "'my_pets:Fish' is not registered as a pet",
        "my_pets:Cow": "cannot import pet 'my_pets:Cow': AttributeError: .* 'Cow'",
        "my_broken_pets:Cow": "cannot import pet 'my_broken_pets:Cow': ZeroDivisionError",
        "no_such_pets:Cow": "cannot import pet 'no_such_pets:Cow': ModuleNotFoundError",
        ":Cow": "cannot import pet ':Cow': ValueError",
        "..a:Cow": "cannot import pet '..a:Cow': ",
        "./my_pets.py:Cow": "a pet of one's own is MODULE:CLASS, such as my_pets:Cow",
        "my_pets.py:Cow": "such as my_pets:Cow",
        "my_pets:": "cannot import pet 'my_pets:': AttributeError",
    }.items():
        with pytest.raises(ValueError, match=reason):
            registry.get(name)


@pytest.mark.parametrize("module", ["my_lonely_pets", "my_shared.pets"])
def test_code_of_ones_own_is_found_in_the_working_directory(
    registry, tmp_path, monkeypatch, module
):
    # Several packages may share a folder's name, as those of google do.
    (tmp_path / "installed" / "my_shared").mkdir(parents=True)
    path = tmp_path / "here" / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True)
    path.write_text("1")
    monkeypatch.chdir(tmp_path / "here")
    places = [place for place in sys.path if place]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed"), *places])
    with pytest.raises(ValueError, match=rf"no attribute 'Cow' \({path}\)"):
        registry.get(f"{module}:Cow")
    assert len(own_code(module)) == 12
    del sys.modules[module]
    # As where a loader of plugins keeps it to itself.
    assert own_code(module) == ""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Return what writes files into a folder and gives the digest of a module's code there."""

    def digest(module, folder="here", **files):
        for name, text in files.items():
            path = tmp_path / folder / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        module = ModuleType(module)
        module.__file__ = str(tmp_path / folder / f"{module.__name__.replace('.', '/')}.py")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return own_code(module.__name__)

    return digest


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("lab.mine", "from lab.formula import spread"),
        ("lab.mine", "from .formula import spread"),
        ("lab.mine", "from . import formula"),
        ("lab.mine", "import lab.formula as f"),
        ("lab.mine", "def late():\n    from lab import formula"),
        ("lab.mine", "import beside"),
        ("mine", "import beside"),
        ("mine", "from lab import formula"),
    ],
)
def test_code_of_ones_own_is_that_of_the_files_it_imports_too(lab, module, line):
    files = {"beside": "import lab.formula", "lab__formula": "spread = 1", "lab__other": "1"}
    first = lab(module, **files, **{module.replace(".", "__"): line})
    assert lab(module, lab__other="2", unrelated="1") == first
    changed = lab(module, lab__formula="spread = 2")
    assert changed != first
    assert lab(module, lab__formula="spread = 1") == first


def test_code_of_ones_own_alone_has_the_digest_that_runs_have_saved(lab):
    text = "import os, torch, clip_pgs.masking\n"
    assert lab("mine", mine=text) == hashlib.sha256(text.encode()).hexdigest()[:12]
    # Modules may import each other, and one may be no Python of this version.
    first = lab("mine", mine="import other", other="import mine\n")
    assert first == lab("mine")
    assert lab("mine", other="match x ->") != first


def test_of_an_installed_package_its_own_files_count(lab, tmp_path):
    files = {"theirs__mine": "from theirs import part\nimport numpy", "theirs__part": "1"}
    (tmp_path / "libs" / "numpy-2.0.dist-info").mkdir(parents=True)
    first = lab("theirs.mine", "libs", **files, numpy__random="1")
    assert lab("theirs.mine", "libs", numpy__random="2", numpy="3") == first
    assert lab("theirs.mine", "libs", theirs__part="2") != first


def test_code_of_ones_own_of_any_length_and_name_is_read(lab, monkeypatch):
    chain = {f"m{number}": f"import m{number + 1}" for number in range(1500)}
    first = lab("m0", **chain, m1500="1")
    assert lab("m0", m1500="2") != first
    # As a loader of plugins may name it.
    module = ModuleType("plugins.of.mine")
    module.__file__ = sys.modules["m0"].__file__
    monkeypatch.setitem(sys.modules, "plugins.of.mine", module)
    assert own_code("plugins.of.mine") == hashlib.sha256(b"import m1").hexdigest()[:12]


def test_code_of_ones_own_in_a_zip_is_that_of_its_modules(tmp_path, monkeypatch):
    digests = []
    for number, spread in enumerate("112"):
        place = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(place, "w") as file:
            file.writestr("zipped_lab/__init__.py", "")
            file.writestr("zipped_lab/mine.py", "from zipped_lab.formula import spread")
            file.writestr("zipped_lab/formula.py", f"spread = {spread}")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(place))
            importlib.import_module("zipped_lab.mine")
            digests.append(own_code("zipped_lab.mine"))
            for name in [name for name in sys.modules if name.startswith("zipped_lab")]:
                del sys.modules[name]
    assert len(digests[0]) == 12
    assert digests[0] == digests[1] != digests[2]


def test_code_that_a_loader_keeps_in_no_file_has_no_digest(monkeypatch):
    module = ModuleType("loaded_lab")
    module.__file__ = "/from/elsewhere/loaded_lab.py"
    monkeypatch.setitem(sys.modules, "loaded_lab", module)
    assert own_code("loaded_lab") == ""


def test_a_module_of_another_file_than_was_meant_is_named(registry):
    with pytest.raises(ValueError, match=r"has no attribute 'Cow' \(.*queue\.py\)"):
        registry.get("queue:Cow")


def test_code_of_a_notebook_whose_module_has_no_spec_is_that_of_no_file(monkeypatch):
    notebook = ModuleType("__main__")
    assert notebook.__spec__ is None
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    assert own_code("__main__") == ""
