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


def _headers() -> Path | None:
    """The folder of cuda_runtime_api.h: the triton package, which torch's wheels for Linux bring, has a copy."""
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else []:
        for found in Path(folder).glob("**/crt/host_defines.h"):
            return found.parent.parent
    return None


def libraries() -> Path:
    """The folder of the compiled libraries; made if it is not there.

    Raises:
        RuntimeError: with `missing`'s reason.
    """
    headers = _headers()
    if reason := missing():
        raise RuntimeError(reason)
    assert headers
    digest = hashlib.sha256(str(headers).encode())
    for source, *_ in LIBRARIES.values():
        digest.update((HERE / source).read_bytes())
    folder = Path(tempfile.gettempdir()) / f"gengap_fake_cuda.{os.getuid()}.{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        for name, (source, compiler, flags) in LIBRARIES.items():
            command = [compiler, "-O2", "-shared", "-fPIC", f"-I{headers}", "-o", part / name, HERE / source, *flags]
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
        **({} if mib is None else {"FAKE_CUDA_MIB": str(mib)}),
        "LD_PRELOAD": str(folder / "libfakecudart.so"),
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder), *filter(None, [read("LD_LIBRARY_PATH")])]),
        "PYTHONPATH": os.pathsep.join(paths),
    }
