"""What pyproject.toml cannot say: a wheel also holds configs/ and the commit it was built from."""

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """Copies configs/ to pipelines/configs and writes aai/COMMIT; an editable install reads both in the checkout."""

    def run(self) -> None:
        """See setuptools."""
        super().run()
        if self.editable_mode:
            return
        built = Path(self.build_lib)
        shutil.copytree(ROOT / "configs", built / "pipelines" / "configs", dirs_exist_ok=True)
        spec = importlib.util.spec_from_file_location("version", ROOT / "aai" / "version.py")
        version = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(version)  # not by `import aai`: what the package needs is not installed here
        (built / "aai" / version.COMMIT_FILE).write_text(version.commit(ROOT) + "\n")


setup(cmdclass={"build_py": BuildWithConfigs})
