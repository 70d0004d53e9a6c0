"""What a node says of itself. The function travels to the node as code, so that one without this package answers."""

from collections.abc import Mapping, Sequence
from typing import Any


def facts(
    packages: Sequence[str], variables: Sequence[str], paths: Sequence[str], models: Mapping[str, str], disk: str = ""
) -> dict[str, Any]:
    """Facts of the machine that this runs on; imports nothing that may be missing there.

    packages: whose versions are told; variables: environment variables of which it is told whether they are set;
    paths: folders of which it is told whether they are there; models: folders to hash, by name; disk: a folder on the
    disk that is measured, Ray's session by default.
    """
    import os
    import platform
    import shutil
    import socket
    import tempfile
    import time
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {"host": socket.gethostname(), "python": platform.python_version(), "packages": {}}
    for package in packages:
        try:
            found["packages"][package] = version(package)
        except PackageNotFoundError:
            found["packages"][package] = None
    try:
        from aai.version import code_version

        found["packages"]["aai"] = code_version()
    except Exception:
        found["packages"]["aai"] = None
    shm = "/dev/shm"
    found["shm_bytes"] = shutil.disk_usage(shm)[::2] if os.path.isdir(shm) else None
    found["disk"] = disk or tempfile.gettempdir()
    found["disk_bytes"] = shutil.disk_usage(found["disk"])[::2]
    found["variables"] = [name for name in variables if os.environ.get(name)]
    found["paths"] = [path for path in paths if os.path.exists(path)]
    found["models"] = {}
    for name, folder in models.items():
        try:
            from aai.foundation.identity import pinned_by

            found["models"][name] = pinned_by(folder, None, name)
        except Exception as error:
            found["models"][name] = f"cannot be read ({error})"
    found |= _gpus()
    found["clock"] = time.time()
    return found


def _gpus() -> dict[str, Any]:
    """GPUs by NVIDIA's driver, which needs no torch: names, memory, driver, the newest CUDA that it takes."""
    import contextlib
    import re
    from importlib.util import find_spec
    from pathlib import Path

    found: dict[str, Any] = {"gpus": [], "driver": None, "cuda": None, "torch_cuda": None, "gpu_error": None}
    with contextlib.suppress(Exception):  # torch says what it was built for without being imported
        text = (Path(find_spec("torch").origin).parent / "version.py").read_text()  # type: ignore[union-attr,arg-type]
        built = re.search(r"^cuda[^=]*= '([\d.]+)'", text, re.M)
        found["torch_cuda"] = built[1] if built else None
    try:
        import pynvml

        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
            found["gpus"].append({"name": str(name), "memory_gb": round(memory.total / 1e9, 1)})
        found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
        newest = pynvml.nvmlSystemGetCudaDriverVersion()
        found["cuda"] = f"{newest // 1000}.{newest % 1000 // 10}"
    except Exception as error:  # no driver, or not the library
        found["gpu_error"] = f"{type(error).__name__}: {error}"
    return found
