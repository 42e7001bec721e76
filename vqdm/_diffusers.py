"""Let diffusers know the quantization method `vqdm`, whichever of the two is imported first.

Importing diffusers takes seconds, so `import vqdm` only waits for diffusers' table of methods to be imported.
"""

import importlib
import importlib.abc
import importlib.util
import sys

_TABLES = "diffusers.quantizers.auto"
_QUANTIZER = "vqdm.hub.quantizer"  # adds itself to the tables


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        importlib.import_module(_QUANTIZER)


class _TablesFinder(importlib.abc.MetaPathFinder):
    asked = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TABLES or self.asked:
            return None
        self.asked = True
        spec = importlib.util.find_spec(fullname)  # by the other finders
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_when_imported() -> None:
    """At once if diffusers' tables are there, else when they are imported."""
    if _TABLES in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _TablesFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TablesFinder())
