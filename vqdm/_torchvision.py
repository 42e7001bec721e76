"""Let a torchvision built for CUDA be imported beside a CPU torch.

Its compiled operators then fail to load, and `import torchvision` dies because the schemas of two of them
are missing ("operator torchvision::nms does not exist"), taking diffusers, transformers, open_clip and
torchmetrics along. We define these schemas just before torchvision is first imported. Where its operators
load, nothing is done.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries = []  # a torch.library.Library takes its schemas back when it is collected


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


class _Finder(importlib.abc.MetaPathFinder):
    asked = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torchvision" or self.asked:
            return None
        self.asked = True
        spec = importlib.util.find_spec(fullname)  # by the other finders
        if spec is not None and spec.origin:
            _define_missing_schemas(Path(spec.origin).parent)
        return spec


def install_cure() -> None:
    """Wait for torchvision's first import; costs nothing until then."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
