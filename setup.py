"""Builds the C++ kernels, each instruction set with its own flags. Everything else is in pyproject.toml.

Without a working C++17 compiler the installation succeeds all the same, and localmoe computes in PyTorch."""

import os
import platform
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("kernels", "cpu")
# No contraction: whether a product and a sum become one operation must not depend on the compiler's mood.
COMMON = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-pthread"]
# Never -march=native: a wheel or a home directory may be used on another machine. The library looks at run time.
AVX512 = ["-mavx2", "-mfma"] + [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi", "bf16")]
SPECIAL = {
    "isa_avx2.cpp": ["-DLM_BUILD_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": ["-DLM_BUILD_AVX512", *AVX512],
    "isa_avx512_vnni.cpp": ["-DLM_BUILD_AVX512_VNNI", *AVX512, "-mavx512vnni"],
    "isa_amx.cpp": ["-DLM_BUILD_AMX", *AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-bf16"],
}


class BuildKernels(build_ext):
    """Compiles file by file; an instruction set that this compiler or machine does not know is left out."""

    def build_extension(self, ext):
        digest = runpy.run_path("kernels/digest.py")["source_digest"](FOLDER)
        flags = [*COMMON, f'-DLM_SOURCE_DIGEST="{digest}"']
        # A file for every instruction set takes a quarter of a minute.
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            objects = [object for found in pool.map(lambda s: self._compile(s, flags), ext.sources) for object in found]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            build_temp=self.build_temp,
            extra_postargs=["-pthread", "-s"],
            target_lang="c++",
        )

    def _compile(self, source, flags):
        special = SPECIAL.get(Path(source).name, [])
        if special and platform.machine() in ("x86_64", "AMD64"):
            try:
                return self.compiler.compile([source], self.build_temp, extra_postargs=[*flags, *special])
            except Exception as error:  # distutils names its errors differently in every version
                print(f"{source}: built without its instruction set ({error})")
        return self.compiler.compile([source], self.build_temp, extra_postargs=flags)


sources = sorted(str(path) for path in FOLDER.glob("*.cpp"))
headers = sorted(str(path) for path in FOLDER.iterdir() if path.suffix in (".h", ".inc"))
setup(
    ext_modules=[Extension("localmoe.kernels._cpu", sources, depends=headers, optional=True, language="c++")],
    cmdclass={"build_ext": BuildKernels},
)
