"""Hooks that `import vqdm` sets on the first import of diffusers' and transformers' tables, torchvision and open_clip.

diffusers, transformers: the quantization method `vqdm` is added to their tables, whichever is imported first.

torchvision: a build for CUDA may be installed beside a CPU torch. Its compiled operators then fail to load, and
`import torchvision` dies because the schemas of two of them are missing ("operator torchvision::nms does not exist"),
and diffusers, transformers, open_clip and torchmetrics with it. So these schemas are defined first. If the operators
load, nothing is done.

open_clip: it imports timm, which imports wandb wherever that is installed, three seconds that nothing here needs. While
open_clip is imported, there is no wandb.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path

_TABLES = {  # {module of the tables: our module that adds itself}
    "diffusers.quantizers.auto": "vqdm.hub.quantizer",
    "transformers.quantizers.auto": "vqdm.hub.transformers_table",
}
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries = []  # a torch.library.Library takes its schemas back when it is collected


class _Finder(importlib.abc.MetaPathFinder):
    """Finder that meets the first import of one module, finds it by the other finders and lets `prepare` look at it."""

    module: str
    asked = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module or self.asked:
            return None
        self.asked = True
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self.prepare(spec)
        return spec


class _TablesFinder(_Finder):
    def __init__(self, module: str):
        self.module = module

    def prepare(self, spec) -> None:
        if spec.loader is not None:
            spec.loader = _TablesLoader(spec.loader, _TABLES[self.module])


class _TablesLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, ours: str):
        self.loader, self.ours = loader, ours

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        config = sys.modules.get("vqdm.hub.config")
        if config is None or hasattr(config, "VQDMConfig"):  # else it is being read, and enters the tables at its end
            importlib.import_module(self.ours)


class _TorchvisionFinder(_Finder):
    module = "torchvision"

    def prepare(self, spec) -> None:
        if spec.origin:
            _define_missing_schemas(Path(spec.origin).parent)


def _define_missing_schemas(package: Path) -> None:
    import torch

    compiled = next(package.glob("_C*.so"), None) or next(package.glob("_C*.pyd"), None)
    if compiled is None:
        return
    try:
        torch.ops.load_library(str(compiled))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + _SCHEMA)
        _libraries.append(library)


class _OpenClipFinder(_Finder):
    module = "open_clip"

    def prepare(self, spec) -> None:
        if spec.loader is not None:
            spec.loader = _WithoutWandb(spec.loader)


class _WithoutWandb(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self.loader  # which knows the package's files
        hidden = "wandb" not in sys.modules
        if hidden:
            sys.modules["wandb"] = None  # to import it is an ImportError
        try:
            self.loader.exec_module(module)
        finally:
            if hidden:
                del sys.modules["wandb"]


def wait_for_imports() -> None:
    """Watch for the import of these modules; tables that are already imported get their entry at once."""
    for module, ours in _TABLES.items():
        if module in sys.modules:
            importlib.import_module(ours)
    watched = {found.module for found in sys.meta_path if isinstance(found, _Finder)}
    for finder in (*map(_TablesFinder, _TABLES), _TorchvisionFinder(), _OpenClipFinder()):
        if finder.module not in sys.modules and finder.module not in watched:
            sys.meta_path.insert(0, finder)
