"""Records which files a start reads, so that later starts can read them ahead.

python -m builder.record_start --output src/start_files.txt
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def record() -> list[str]:
    """Starts the worker with the embedded model; returns the files of Python and its packages that it reads.

    First come the shared libraries, then all others in the order in which they are opened. Must run in a fresh process,
    in which nothing is imported yet.
    """
    opened: dict[str, None] = {}

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            opened.setdefault(arguments[0])

    sys.addaudithook(note)
    import handler
    from src.settings import DEMO_MODEL_ID, Settings

    handler.build_job_handler(Settings(model_id=DEMO_MODEL_ID))
    # the linker opens libraries without an audit event; their paths there have no links
    mapped = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    read = dict.fromkeys([*mapped, *opened])
    places = (sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix))
    return [file for file in read if file.startswith(places) and Path(file).is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Record which files a start reads.")
    parser.add_argument("--output", type=Path, required=True, help="file to write, one path per line")
    output: Path = parser.parse_args().output
    files = record()
    output.write_text("".join(f"{file}\n" for file in files))
    print(f"{output}: {len(files)} files, {sum(Path(file).stat().st_size for file in files) / 2**20:.0f} MiB")
    sys.stdout.flush()
    # a normal exit would wait for threads that have nothing left to do
    os._exit(0)


if __name__ == "__main__":
    main()
