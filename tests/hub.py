"""A stand-in for the Hugging Face hub on localhost: the part of its HTTP API that downloads a repository's files."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repo_id: str, folder: Path, *, gated: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Serves ``folder`` as ``repo_id``, whose main branch and only commit is ``REVISION``.

    Yields:
        The hub's address, for ``HF_ENDPOINT``, and the paths of the files fetched so far.
    """
    fetched: list[str] = []
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

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{repo_id}"):
                if path.rpartition("/")[2] not in ("main", REVISION):
                    return self.refuse(404, "RevisionNotFound")
                if "/tree/" in path:
                    sizes = {name: (folder / name).stat().st_size for name in files}
                    listing = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]
                    return self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
                info = {"id": repo_id, "sha": REVISION, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            if path.startswith(f"/{repo_id}/resolve/"):
                if gated:
                    return self.refuse(401, "GatedRepo")
                name = path.removeprefix(f"/{repo_id}/resolve/").partition("/")[2]
                content = (folder / name).read_bytes()
                if self.command == "GET":
                    fetched.append(name)
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": REVISION}
                return self.answer(200, content, headers)
            return self.refuse(401, "RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
