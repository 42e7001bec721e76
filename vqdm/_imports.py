"""What `import vqdm` waits for: the first import of diffusers' tables and of torchvision; it imports neither.

diffusers: the quantization method `vqdm` enters its tables, whichever of the two is imported first.

torchvision: one built for CUDA can be imported beside a CPU torch. Its compiled operators fail to load there, and
`import torchvision` dies because the schemas of two of them are missing ("operator torchvision::nms does not exist"),
taking diffusers, transformers, open_clip and torchmetrics along. These schemas are defined just before. Where its
operators load, nothing is done.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path

_TABLES = "diffusers.quantizers.auto"
_QUANTIZER = "vqdm.hub.quantizer"  # adds itself to the tables
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries = []  # a torch.library.Library takes its schemas back when it is collected


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the first import of one module, finds it by the other finders and lets `prepare` look at it."""

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
    module = _TABLES

    def prepare(self, spec) -> None:
        if spec.loader is not None:
            spec.loader = _TablesLoader(spec.loader)


class _TablesLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        importlib.import_module(_QUANTIZER)


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


def wait_for_imports() -> None:
    """Watch for both modules; enters diffusers' tables at once if they are imported already."""
    if _TABLES in sys.modules:
        importlib.import_module(_QUANTIZER)
    for finder in (_TablesFinder, _TorchvisionFinder):
        if finder.module not in sys.modules and not any(isinstance(found, finder) for found in sys.meta_path):
            sys.meta_path.insert(0, finder())
