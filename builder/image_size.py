"""What an image's bytes are: its parts, its largest files, and the container disk that the endpoint needs.

Runs inside the image, with nothing but Python's own library:

    docker run --rm -v "$PWD/builder:/builder:ro" IMAGE python /builder/image_size.py
"""

import math
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = Path(sysconfig.get_path("purelib"))
PARTS = {
    "CUDA libraries": PACKAGES / "nvidia",
    "PyTorch": PACKAGES / "torch",
    "other packages": PACKAGES,
    "the model": Path("/model"),
    "the worker": Path("/app"),
    "Python and Debian": Path("/"),
}
"""Where each part lies; a file belongs to the first part that it lies in."""
ELSEWHERE = ("/dev", "/proc", "/run", "/sys", "/tmp", "/builder")
HEADROOM = 4 * 10**9
"""Bytes for what is not in the image: logs, temporary files, the parts of an image that is being replaced."""


def files(root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """The files beneath ``root`` and their bytes."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if str(Path(folder, name)) not in ELSEWHERE]
        for name in names:
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield path, status.st_size


def sizes(found: Iterable[tuple[Path, int]]) -> Counter[str]:
    """The bytes of each part of the files that were found."""
    parts: Counter[str] = Counter()
    for path, size in found:
        parts[next(part for part, place in PARTS.items() if path.is_relative_to(place))] += size
    return parts


def container_disk(size: int) -> int:
    """The container disk in GB for an image of ``size`` bytes: with headroom, in steps of 5."""
    return 5 * math.ceil((size + HEADROOM) / 5e9)


def main() -> None:
    found = list(files())
    parts = sizes(found)
    print("| part | GB |\n|---|---|")
    for part in PARTS:
        print(f"| {part} | {parts[part] / 1e9:.2f} |")
    print(f"| all | {parts.total() / 1e9:.2f} |")
    print("\nover 100 MB:")
    for path, size in sorted(found, key=lambda file: -file[1]):
        if size > 100e6:
            print(f"{size / 1e6:.0f} MB {path.name}")
    print(f"\ncontainer disk: {container_disk(parts.total())} GB")


if __name__ == "__main__":
    main()
