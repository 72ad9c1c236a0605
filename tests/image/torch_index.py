"""Lays out a stand-in for PyTorch's package index: ``python -m tests.image.torch_index TORCH_WHEEL FOLDER``.

FOLDER then holds, laid out so that a plain web server serves it as PEP 503 has it, PyTorch's wheel and two CUDA
libraries that it asks for, the second by an extra of the first, as with ``cuda-toolkit``. PyPI has neither.
"""

import sys
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

REQUIRED = 'Requires-Dist: cuda-standin[nvidia]==12.6.3; platform_system == "Linux"\n'
"""What the wheel for the CPU is made to ask for."""


def write_library(folder: Path, name: str, requires: str = "") -> None:
    """Writes a wheel into the index in ``folder`` that installs one file, where NVIDIA's wheels install theirs."""
    stem = f"{name.replace('-', '_')}-12.6.3"
    (folder / name).mkdir(parents=True)
    with ZipFile(folder / name / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"nvidia/{stem}/libstandin.so", "")
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 12.6.3\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", head + requires)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def write_torch(folder: Path, source: Path) -> None:
    """Writes PyTorch's wheel ``source``, which also asks for the CUDA libraries, into the index in ``folder``."""
    (folder / "torch").mkdir(parents=True)
    with ZipFile(source) as old, ZipFile(folder / "torch" / source.name, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith(".dist-info/METADATA"):
                head, line, rest = content.partition(b"Requires-Dist: ")
                content = head + REQUIRED.encode() + line + rest
            member.compress_type = ZIP_STORED
            new.writestr(member, content)


def main(source: Path, folder: Path) -> None:
    write_torch(folder, source)
    write_library(
        folder,
        "cuda-standin",
        'Provides-Extra: nvidia\nRequires-Dist: nvidia-standin==12.6.3; extra == "nvidia"\n',
    )
    write_library(folder, "nvidia-standin")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
