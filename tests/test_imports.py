"""Each in its own interpreter, as what is imported first is what is tested."""

import os
import subprocess
import sys

# what torchvision does on import: needs the operator's schema, loads compiled operators if it can
STANDS_IN_FOR_TORCHVISION = """
import torch
try:
    torch.ops.load_library(__path__[0] + "/_C.so")
except OSError:
    pass

@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return dets.new_empty(0)
"""


def run(code, *, path=None):
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600, check=False
    )


def test_importing_vqdm_imports_nothing_but_the_standard_library():
    code = """
import sys
before = set(sys.modules)
import vqdm
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - sys.stdlib_module_names))
"""
    done = run(code)
    assert done.stdout.strip() == "['vqdm']", done.stderr


def test_set_decode_is_reached_by_the_name_that_the_readme_gives():
    """Nobody has imported the submodules by then, and `import vqdm` has imported no torch for their sake."""
    code = """
import sys
import vqdm
print("torch" in sys.modules, "hub" in dir(vqdm))
print(callable(vqdm.hub.pipelines.set_decode), "torch" in sys.modules)
for module in (vqdm, vqdm.hub):
    try:
        module.no_such_name
    except AttributeError as error:
        print(error)
"""
    done = run(code)
    assert done.stdout.splitlines() == [
        "False True", "True True",
        "module 'vqdm' has no attribute 'no_such_name'", "module 'vqdm.hub' has no attribute 'no_such_name'",
    ], done.stderr  # fmt: skip


def test_torchvision_is_imported_and_its_operator_known():
    code = """
import vqdm, torchvision, torch
print(torch.ops.torchvision.nms.default._schema)
from torchvision.transforms.functional import resize
print(tuple(resize(torch.zeros(3, 8, 8), [4, 4]).shape))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    schema, shape = done.stdout.splitlines()
    assert schema == "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    assert shape == "(3, 4, 4)"


def test_cure_where_compiled_operators_do_not_load(tmp_path):
    """Without the cure, the stand-in dies as torchvision does; with it, it is imported, after being looked for, too."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(STANDS_IN_FOR_TORCHVISION)
    (package / "_C.so").write_bytes(b"not a library of this machine")
    code = """
import sys
try:
    import torchvision
except RuntimeError as error:
    print(error)
for name in [n for n in sys.modules if n.startswith("torchvision")]:
    del sys.modules[name]
import importlib, vqdm
from vqdm._imports import wait_for_imports
wait_for_imports()
print(sum(type(f).__name__ == "_TorchvisionFinder" for f in sys.meta_path))
finders = list(sys.meta_path)
print(importlib.util.find_spec("torchvision").origin)
import torchvision
print(torchvision.__file__, sys.meta_path == finders)
"""
    done = run(code, path=tmp_path)
    assert done.returncode == 0, done.stderr
    failure, count, looked_for, imported = done.stdout.splitlines()
    origin = str(package / "__init__.py")
    assert "operator torchvision::nms does not exist" in failure
    assert (count, looked_for, imported) == ("1", origin, f"{origin} True")


def test_absent_torchvision_is_reported_as_absent(tmp_path):
    code = """
import sys, importlib.util
import vqdm
sys.path[:] = [p for p in sys.path if "site-packages" not in p]
print(importlib.util.find_spec("torchvision"))
try:
    import torchvision
except ModuleNotFoundError as error:
    print(error.name, "torch" in sys.modules)
"""
    done = run(code)
    assert done.stdout.splitlines() == ["None", "torchvision False"], done.stderr


def test_open_clip_is_imported_without_wandb_which_can_be_imported_later():
    code = """
import sys
import vqdm, open_clip
print("wandb" in sys.modules, open_clip.create_model.__name__)
import wandb
print(wandb.run)
"""
    done = run(code)
    assert done.stdout.splitlines() == ["False create_model", "None"], done.stderr
