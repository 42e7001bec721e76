"""What pyproject.toml cannot say: conf/ and experiments/, which lie beside the package, are copied into a wheel's."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout has them where they are (vqdm/config/places.py)
            return
        for name in ("conf", "experiments"):
            shutil.copytree(name, Path(self.build_lib) / "vqdm" / name, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigurations})
