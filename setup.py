"""Adds the demo pair and its configuration to the wheel. All other metadata is in pyproject.toml.

Both are outside the packages in the repository, so `package-data` cannot name them. An editable installation needs no
copies: the code finds the originals beside the packages.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
COPIED_SUFFIXES = {".json", ".safetensors", ".jinja", ".md"}  # what loads a model, and its card; no plots


class BuildWithDemoPair(build_py):
    """Builds the packages, and copies the demo pair into them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in demo_files(Path(self.build_lib)).items():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


def demo_files(build_folder: Path) -> dict[Path, Path]:
    """Returns the files to copy and their places in the wheel, where `parse.demo` and `deployments` look for them."""
    models = [path for path in (ROOT / "models").rglob("*") if path.suffix in COPIED_SUFFIXES]
    files = {path: build_folder / "parse" / "demo_models" / path.relative_to(ROOT / "models") for path in models}
    return files | {ROOT / "serve_config.yaml": build_folder / "deployments" / "serve_config.yaml"}


setup(cmdclass={"build_py": BuildWithDemoPair})
