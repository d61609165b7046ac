"""A CUDA device without a GPU, for tests: see README.md in this folder.

`environment()` gives the variables under which a Python process has fake GPUs; it compiles the two small libraries on
first use and keeps them by the hash of their sources.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIBRARIES = {  # name: source, compiler, flags
    "libfakecudart.so": ("runtime.cpp", "g++", ["-ldl", "-lpthread"]),
    "libcuda.so.1": ("driver.c", "gcc", ["-Wl,-soname,libcuda.so.1"]),
}


def missing() -> str | None:
    """What this machine lacks for fake GPUs; None: nothing."""
    if platform.system() != "Linux":
        return f"fake GPUs need Linux, and this is {platform.system()}"
    if compilers := [name for name in ("g++", "gcc") if shutil.which(name) is None]:
        return f"fake GPUs need {compilers[0]}, which is not on the PATH"
    return None if _headers() else "fake GPUs need CUDA's headers, which come with torch's triton package"


def _headers() -> list[Path]:
    """Folders with CUDA's headers, as torch's wheels for Linux bring them: the runtime's own, and triton's copy."""
    found = [Path(path) for path in _folders("nvidia", "*/include/cuda_runtime_api.h")]
    more = [Path(path).parent for path in _folders("triton", "**/crt/host_defines.h")]  # which the runtime's lack
    return [path.parent for path in (*found, *more)] if more else []


def _folders(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return [path for place in places or [] for path in sorted(Path(place).glob(pattern))]


def libraries() -> Path:
    """The folder of the compiled libraries; made if it is not there.

    Raises:
        RuntimeError: with `missing`'s reason.
    """
    if reason := missing():
        raise RuntimeError(reason)
    flags = [f"-I{folder}" for folder in _headers()]
    digest = hashlib.sha256(repr(flags).encode())
    for source, *_ in LIBRARIES.values():
        digest.update((HERE / source).read_bytes())
    folder = Path(tempfile.gettempdir()) / f"gengap_fake_cuda.{os.getuid()}.{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        for name, (source, compiler, links) in LIBRARIES.items():
            command = [compiler, "-O2", "-shared", "-fPIC", *flags, "-o", part / name, HERE / source, *links]
            subprocess.run(command, check=True)
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(part)
    return folder


def environment(num_gpus: int = 1, *, mib: int | None = None) -> dict[str, str]:
    """Variables for a Python process, and its children, that is to have fake GPUs.

    Args:
        num_gpus: how many.
        mib: memory of each, in MiB; None: 80 GiB, of which nothing is taken before it is used.
    """
    folder, read = libraries(), os.environ.get
    paths = [str(HERE), str(ROOT), *filter(None, [read("PYTHONPATH")])]
    return {
        "FAKE_CUDA": "1",
        "FAKE_CUDA_COUNT": str(num_gpus),
        "TORCH_DIST_USE_NCCL2": "0",  # torch 2.15's other ProcessGroupNCCL connects when it is made
        **({} if mib is None else {"FAKE_CUDA_MIB": str(mib)}),
        "LD_PRELOAD": str(folder / "libfakecudart.so"),
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder), *filter(None, [read("LD_LIBRARY_PATH")])]),
        "PYTHONPATH": os.pathsep.join(paths),
    }
