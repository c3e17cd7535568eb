"""Strategies, text maskings and suites by name, and what they declare.

Help and refusals have no seconds for torch: they find names in the text of modules, explanations in
docstrings, and a package imports a module when one of its names is asked for.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from clip_pgs.common import one_sentence

_PACKAGE = __name__.partition(".")[0]

# How a mask ratio can go over training; here, as options know it before torch is there.
MASK_SCHEDULES = ("constant", "linear", "cosine")

# The variable with the modules of one's own that the study of a run names.
OWN_MODULES = "CLIP_PGS_OWN_MODULES"

# A decorator or call at the beginning of a line that registers the name which it is given first.
_REGISTRATION = re.compile(r'^@?[\w.]*register\w*\(\s*"([\w-]+)"', re.MULTILINE)

Entry = TypeVar("Entry")
SameEntry = TypeVar("SameEntry")


def explained_arguments(documented: type) -> dict[str, str]:
    """Return what the "Args:" of a class's docstring say of each name, on one line each."""
    _, _, text = inspect.cleandoc(documented.__doc__ or "").partition("\nArgs:\n")
    entries = re.split(r"\n(?= {4}\S)", re.split(r"\n(?=\S)", text)[0])
    parts = (entry.strip().partition(":") for entry in entries)
    return {name: " ".join(said.split()) for name, _, said in parts}


class Registry(Generic[Entry]):
    """Classes or functions by name, each with a declaration of what others need to know of it.

    Help texts, checks, tests and tables read the declarations, so that a new entry is registered
    in one place. An entry outside this package is named "package.module:Class"; its module is
    imported and must have registered it.

    Args:
        kind: What the entries are, in one or two words for messages: "masking".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._declarations: dict[str, Mapping[str, Any]] = {}

    def register(self, name: str, **declaration: Any) -> Callable[[SameEntry], SameEntry]:
        """Register what is decorated.

        Args:
            name: What users type; it holds no colon.
            **declaration: What there is to know of it.

        Raises:
            ValueError: If the name is empty or holds a colon, or something else has it. A class
                or function that is defined anew, as in a notebook, replaces itself.
        """
        if not name or ":" in name:
            raise ValueError(f"the name of a {self.kind} must hold no colon, got {name!r}")

        def decorate(entry: SameEntry) -> SameEntry:
            if name in self._entries and _origin(self._entries[name]) != _origin(entry):
                raise ValueError(
                    f"{self.kind} {name!r} is registered already; taken: {', '.join(self.names())}"
                )
            self._entries[name] = entry  # type: ignore[assignment]
            self._declarations[name] = MappingProxyType(declaration)
            return entry

        return decorate

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._entries)

    def name(self, name: str) -> str:
        """Return the registered name of what a user names, importing "package.module:Class".

        Raises:
            ValueError: If nothing is registered under it, or the import fails.
        """
        if not isinstance(name, str):
            raise ValueError(f"the name of a {self.kind} must be a text, got {name!r}")
        if ":" not in name:
            if name not in self._entries:
                choices = ", ".join(self.names())
                raise ValueError(f"unknown {self.kind} {name!r}; choose from {choices}")
            return name
        module_name, _, attribute = name.partition(":")
        if "/" in module_name or module_name.endswith(".py"):
            example = f"{Path(module_name).stem}:{attribute or 'Class'}"
            raise ValueError(
                f"a {self.kind} of one's own is MODULE:CLASS, such as {example}, with the module "
                f"in the working directory or on PYTHONPATH, got {name!r}"
            )
        module: Any = None
        try:
            module = _import_own(module_name)
            entry = getattr(module, attribute)
        # A stranger's module can raise anything.
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {one_sentence(error)}"
            where = "" if module is None else f" ({getattr(module, '__file__', 'built in')})"
            raise ValueError(f"cannot import {self.kind} {name!r}: {reason}{where}") from error
        for registered, other in self._entries.items():
            if other is entry:
                return registered
        raise ValueError(
            f"{name!r} is not registered as a {self.kind}; its module has to register it"
        )

    def get(self, name: str) -> Entry:
        """Return an entry by its name or "package.module:Class".

        Raises:
            ValueError: See `name`.
        """
        return self._entries[self.name(name)]

    def declaration(self, name: str) -> Mapping[str, Any]:
        """Return what an entry declared when it was registered.

        Raises:
            ValueError: See `name`.
        """
        return self._declarations[self.name(name)]


def _import_own(module_name: str) -> Any:
    """Import a module that a user names, from the working directory if it is nowhere else.

    That joins the path for such a module alone: libraries try to import what need not be there, and
    would run files of those names in a folder that somebody else has filled.
    """
    if not is_installed(module_name) and "" not in sys.path:
        sys.path.append("")
    return importlib.import_module(module_name)


def is_installed(module_name: str) -> bool:
    """Return whether a module is imported, or is found without the working directory."""
    top = module_name.partition(".")[0]
    # Of what is imported, such as a notebook's own module, there may be no spec to find.
    if not top or top in sys.modules:
        return bool(top)
    # Another module of one's own may have joined the working directory to the path.
    path = sys.path[:]
    sys.path[:] = [place for place in path if place]
    try:
        spec = importlib.util.find_spec(top)
    finally:
        sys.path[:] = path
    # Folders of one name, as several packages have them, are one package without an origin.
    return getattr(spec, "origin", None) is not None


def own_code(module_name: str) -> str:
    """Return a digest of the code of an imported module outside this package, "" of one within.

    With its file go those that it imports from its own package or from the folder beside it, or all
    of the zip that it lies in.
    """
    if module_name.partition(".")[0] == _PACKAGE:
        return ""
    module = sys.modules.get(module_name)
    archive = getattr(getattr(module, "__loader__", None), "archive", None)
    if archive is not None:
        return _digest_of_zip(archive)
    path = getattr(module, "__file__", None)
    if path is None or not Path(path).is_file():
        # As where a notebook defines it, or a loader that keeps it elsewhere.
        return ""
    file = Path(path).absolute()
    package = module_name.split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    digest = hashlib.sha256(file.read_bytes())
    # A loader of plugins may give a file any name.
    if file.parts[len(file.parts) - 1 - len(package) : -1] == tuple(package):
        root = file.parents[len(package)]
        texts = _read_with_imports(file, package, root)
        for name in sorted(texts.keys() - {file.relative_to(root).as_posix()}):
            digest.update(name.encode() + b"\0" + texts[name])
    return digest.hexdigest()[:12]


def _digest_of_zip(archive: str) -> str:
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive) as file:
        for name in sorted(name for name in file.namelist() if name.endswith(".py")):
            digest.update(name.encode() + b"\0" + file.read(name))
    return digest.hexdigest()[:12]


def _read_with_imports(file: Path, package: Sequence[str], root: Path) -> dict[str, bytes]:
    """Return a file below `root`, and what it imports from there, by their names."""
    # Beside an installed package lie all others.
    holds_others = next(root.glob("*.dist-info"), None) is not None
    texts: dict[str, bytes] = {}
    waiting = [(file, list(package))]
    while waiting:
        file, inside = waiting.pop()
        name = file.relative_to(root).as_posix()
        if name in texts:
            continue
        texts[name] = file.read_bytes()
        for parts in _imported_names(texts[name], inside):
            if not parts or parts[0] == _PACKAGE or (holds_others and parts[:1] != package[:1]):
                continue
            for length in range(1, len(parts) + 1):
                place = root.joinpath(*parts[:length])
                found = [
                    (place / "__init__.py", parts[:length]),
                    (place.with_suffix(".py"), parts[: length - 1]),
                ]
                waiting += [(path, parent) for path, parent in found if path.is_file()]
    return texts


def _imported_names(text: bytes, package: Sequence[str]) -> list[list[str]]:
    """Return the modules that a module of a package imports, and what they may be."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return []
    imported: list[list[str]] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            imported += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) + 1 - node.level]) if node.level else []
            start += node.module.split(".") if node.module else []
            # A name may be that of a module, too.
            imported += [start, *([*start, alias.name] for alias in node.names)]
    return imported


def late_names(package: str, names: Collection[str], *modules: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports a module when one of its names is asked for.

    Help and refusals of a command, which import its package, have no seconds for torch.

    Args:
        package: Its name.
        names: What it offers.
        modules: Those of the package that hold them, in the order to look.
    """

    def find(name: str) -> Any:
        if name in names:
            for module in modules:
                found = importlib.import_module(f"{package}.{module}")
                if hasattr(found, name):
                    return getattr(found, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def registered_names(package: str) -> list[str]:
    """Return the names that the modules of a package of ours register, sorted.

    They are read from the modules' text, unless this process has imported them anyway: importing
    them takes torch, and with it seconds.

    Args:
        package: "masking" for the strategies, "data" for the maskings of texts.
    """
    if package == "masking" and "clip_pgs.masking" in sys.modules:
        return sys.modules["clip_pgs.masking"].list_maskings()
    if package == "data" and "clip_pgs.data.text_masking" in sys.modules:
        return sys.modules["clip_pgs.data.text_masking"].TEXT_MASKINGS.names()
    texts = (path.read_text("utf-8") for path in Path(__file__).with_name(package).glob("*.py"))
    return sorted(name for text in texts for name in _REGISTRATION.findall(text))


def _origin(entry: Any) -> Any:
    """Return where a class or function is defined; anything else stands for itself."""
    if hasattr(entry, "__qualname__"):
        return entry.__module__, entry.__qualname__
    return id(entry)
