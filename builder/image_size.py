"""What an image's bytes are: its parts, and the container disk that the endpoint needs.

Runs inside the image, with nothing but Python's own library:

    docker run --rm -v "$PWD/builder:/builder:ro" IMAGE python /builder/image_size.py
"""

import math
import os
import stat
import sysconfig
from collections import Counter
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


def sizes(root: Path = Path("/")) -> Counter[str]:
    """The bytes of each part of what lies beneath ``root``."""
    found: Counter[str] = Counter()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if str(Path(folder, name)) not in ELSEWHERE]
        for name in files:
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                part = next(part for part, place in PARTS.items() if path.is_relative_to(place))
                found[part] += status.st_size
    return found


def container_disk(size: int) -> int:
    """The container disk in GB for an image of ``size`` bytes: with headroom, in steps of 5."""
    return 5 * math.ceil((size + HEADROOM) / 5e9)


def main() -> None:
    found = sizes()
    print("| part | GB |\n|---|---|")
    for part in PARTS:
        print(f"| {part} | {found[part] / 1e9:.2f} |")
    print(f"| all | {found.total() / 1e9:.2f} |")
    print(f"\ncontainer disk: {container_disk(found.total())} GB")


if __name__ == "__main__":
    main()
