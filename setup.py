"""Builds the C++ kernels where torch and a compiler are at hand; the rest is in pyproject.toml.

What is built is no Python module: a library of torch operators, against torch's stable ABI, that
serves every Python and every torch from `TORCH_TARGET` on. Without it the package works, slower;
`batchnorm.backends()` then says what was missing.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = "src/batchnorm/kernels/native"

#: The oldest torch that pyproject.toml allows, 2.11, as torch's headers write it.
TORCH_TARGET = "0x020b000000000000"

#: Vector code is written out with registers' own types; the rest of -O3 only makes it longer.
COMMON = ["-std=c++17", "-O2", "-g0", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
#: GCC 12 warns of its own header's registers that are undefined on purpose.
COMMON += ["-Wno-maybe-uninitialized"]
#: A comparison with NaN may be reordered: nothing here asks the processor for its exceptions.
KERNELS = ["-ftree-vectorize", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]

#: The instructions that kernels.cpp is compiled for, and what the compiler calls them.
INSTRUCTIONS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}


def torch_folder() -> Path | None:
    """Where torch is installed, or None in an environment that pip has made for the build alone."""
    try:
        import torch
    except Exception:  # a broken torch must not keep the package from being installed
        return None
    return Path(torch.__file__).parent


class BuildKernels(build_ext):
    """Compiles one source several times, side by side, each with its own instructions."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link the one extension there is."""
        self.compiler.src_extensions.append(".cpp")
        folder = torch_folder()
        includes = ["-isystem", str(folder / "include")]
        here = Path(self.build_temp)
        levels = list(INSTRUCTIONS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
        # A prefix of them, such as "baseline" alone, builds in a third of the time.
        if os.environ.get("BATCHNORM_INSTRUCTIONS"):
            levels = os.environ["BATCHNORM_INSTRUCTIONS"].split(",")
        jobs = [("ops.cpp", "ops", [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *includes])]
        jobs += [("dispatch.cpp", "dispatch", [f"-DBATCHNORM_LEVELS={len(levels)}"])]
        jobs += [
            ("kernels.cpp", level, [f"-DBATCHNORM_KERNELS={level}", *KERNELS, *INSTRUCTIONS[level]])
            for level in levels
        ]

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, name, flags = job
            return self.compiler.compile(
                [f"{NATIVE}/{source}"],
                output_dir=str(here / name),
                extra_postargs=[*COMMON, *flags, *(ext.extra_compile_args or [])],
            )

        with ThreadPoolExecutor() as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu"],
            library_dirs=[str(folder / "lib")],
            extra_postargs=list(ext.extra_link_args or []),
            target_lang="c++",
        )


LIMITED = {"py_limited_api": "cp311"} if torch_folder() is not None else {}

extensions = []
if torch_folder() is not None and sys.platform != "win32":
    extensions.append(
        Extension(
            "batchnorm.kernels.native._kernels",
            sources=[f"{NATIVE}/{name}" for name in ("ops.cpp", "dispatch.cpp", "kernels.cpp")],
            depends=[str(path) for path in Path(NATIVE).glob("*.h")],
            py_limited_api=True,
            optional=True,  # a failed build leaves a package that works without
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    # Free-threaded Pythons have no stable ABI of their own to name.
    options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": LIMITED},
)
