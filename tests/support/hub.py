"""A stand-in for the Hugging Face hub on localhost, with the part of its HTTP API that downloads need.

``python -m tests.support.hub someone/tiny`` serves a small v1-4 under that name and prints the address.
"""

import argparse
import hashlib
import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from urllib.parse import unquote

from tests.support.v1_4 import make_repository

REVISION = "0123456789abcdef0123456789abcdef01234567"

Refusal = tuple[int, str | None, str | None]
"""The status, ``X-Error-Code`` and ``X-Error-Message`` of an answer."""


@contextmanager
def serve(
    repo_id: str,
    folder: Path,
    *,
    token: str | None = None,
    breaks_off: str | None = None,
    refuses: Mapping[str, Refusal] | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Serves ``folder`` as ``repo_id``, whose main branch and only commit is ``REVISION``.

    Args:
        repo_id: The repository's name.
        folder: Its files.
        token: If given, the repository is gated, and its files can only be read with this token.
        refuses: The answer to each request whose path begins with the key.
        breaks_off: The first download of a file whose path ends with this breaks off in the middle.

    Yields:
        The hub's address, for ``HF_ENDPOINT``, and the paths of the files fetched so far. A download that was resumed
        has the offset of its first byte after the path: ``unet/diffusion_pytorch_model.safetensors:1000``, and a
        part of one its first and last.
    """
    fetched: list[str] = []
    broken: list[str] = []
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str | None, message: str | None) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.answer(status, b"{}", {name: value for name, value in headers.items() if value})

        def break_off(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            for begin, refusal in (refuses or {}).items():
                if path.startswith(begin):
                    return self.refuse(*refusal)
            if path.startswith(f"/api/models/{repo_id}"):
                if (revision := path.rpartition("/")[2]) not in ("main", REVISION):
                    return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                if "/tree/" in path:
                    sizes = {name: (folder / name).stat().st_size for name in files}
                    listing = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]
                    return self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
                info = {"id": repo_id, "sha": REVISION, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            if path.startswith(f"/{repo_id}/resolve/"):
                if token and self.headers.get("Authorization") != f"Bearer {token}":
                    return self.refuse(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
                name = path.removeprefix(f"/{repo_id}/resolve/").partition("/")[2]
                content = (folder / name).read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": REVISION}
                begin, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
                start = int(begin)
                if end:
                    fetched.append(f"{name}:{begin}-{end}")
                    return self.answer(206, content[start : int(end) + 1], headers)
                if self.command == "GET":
                    fetched.append(f"{name}:{start}" if start else name)
                    if breaks_off and name.endswith(breaks_off) and not broken:
                        broken.append(name)
                        return self.break_off(content)
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                return self.answer(206 if start else 200, content[start:], headers)
            return self.refuse(401, "RepoNotFound", "Invalid username or password.")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for the Hugging Face hub.")
    parser.add_argument("repo_id")
    parser.add_argument("--token", help="the only token that may read it")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        make_repository(Path(folder))
        with serve(arguments.repo_id, Path(folder), token=arguments.token) as (address, _):
            print(address, flush=True)
            signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main()
