"""Build the distribution `rwkv-vision`; the import name is `vision`."""

import hashlib
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vision" / "version.py").read_text())[1]

EXPORT = ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"]
DEMO = ["scikit-learn>=1.4"]
DETECTION = ["mmdet>=3.3,<3.4"]

SOURCES = sorted(
    [
        *ROOT.glob("kernels/csrc/*.c"),
        *ROOT.glob("kernels/csrc/*.h"),
        *ROOT.glob("kernels/*/csrc/*_cpu.h"),
    ]
)
# kernels/cpu.py compares it with the sources, so that nobody tests an old build.
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]


class BuildKernels(build_ext):
    """Compile the CPU kernels with OpenMP, with one thread where the compiler has none."""

    def build_extension(self, ext: Extension) -> None:
        flags = ["-O3", "-fwrapv", "-fvisibility=hidden"]
        try:
            ext.extra_compile_args, ext.extra_link_args = [*flags, "-fopenmp"], ["-fopenmp"]
            super().build_extension(ext)
        except CompileError:
            ext.extra_compile_args, ext.extra_link_args = flags, []
            super().build_extension(ext)


KERNELS = Extension(
    "vision.kernels._cpu",
    [str(path.relative_to(ROOT)) for path in SOURCES if path.suffix == ".c"],
    depends=[str(path.relative_to(ROOT)) for path in SOURCES],
    define_macros=[("VISION_SOURCE_DIGEST", f'"{DIGEST}"')],
    libraries=["m"],
    # Without a compiler the installation goes on; `python -m vision.kernels` says what is missing.
    optional=True,
)

setup(
    name="rwkv-vision",
    version=VERSION,
    description="Vision models of the RWKV family: fast, tested, in timm and OpenMMLab",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # vision/kernels is a link to kernels/, which lies at the top for people.
    packages=find_packages(include=["vision", "vision.*"]),
    package_data={"vision": ["py.typed", "kernels/*/csrc/*.cu", "kernels/*/csrc/*.h"]},
    ext_modules=[KERNELS],
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "triton>=3.2; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "timm>=1.0.20,<2",
        "mmengine>=0.10.7,<0.11",
        # mmcv-lite has no compiled operators: vision/mm/mmcv_ext.py maps those that mmseg needs.
        "mmcv-lite>=2.1,<2.2",
        "mmsegmentation>=1.2.2,<1.3",
        # mmseg imports these two without asking for them.
        "ftfy>=6",
        "regex>=2023.0",
        "pycocotools>=2.0.7",
        "albumentations>=2.0.8,<2.1",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10",
        "matplotlib>=3.8",
        "safetensors>=0.4",
        "huggingface-hub>=0.25",
        "tqdm>=4.65",
    ],
    extras_require={
        "demo": DEMO,
        "detection": DETECTION,
        "export": EXPORT,
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "segment-anything==1.0",
            *DEMO,
            *DETECTION,
            *EXPORT,
        ],
        "dev": ["ruff>=0.9", "mypy>=1.14"],
    },
)
