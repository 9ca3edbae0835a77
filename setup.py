"""What `pip install` cannot be told in pyproject.toml: the files that `epsd init` writes go into the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PROJECT = ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", "stages", "presets")


class WithProject(build_py):
    """The package with a copy of the project in `epsd/project/template`. A checkout is its own template."""

    def run(self) -> None:
        """Copy after the modules."""
        super().run()
        if self.editable_mode:
            return
        place = Path(self.build_lib) / "epsd" / "project" / "template"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name in PROJECT:
            if (HERE / name).is_dir():
                shutil.copytree(HERE / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(HERE / name, place / name)


setup(cmdclass={"build_py": WithProject})
