"""A hub like Hugging Face's on loopback: commits, LFS behind a redirect, ranges, and faults."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_BYTES = 1 << 12
"""Files of as many bytes are LFS's: they have a SHA-256 and lie elsewhere."""


class Hub:
    """What the hub has, how it fails, and what it was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        """Directories by ``ORG/NAME``."""
        self.commit = COMMIT
        self.token = ""
        """Who lacks it may not see the repositories that are gated or private."""
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.statuses: defaultdict[str, list[int]] = defaultdict(list)
        """What requests for a file are answered at first, by its name (``""``: the list)."""
        self.cuts: defaultdict[str, list[int]] = defaultdict(list)
        """After how many bytes a file's answers are cut off at first."""
        self.replaced: dict[str, bytes] = {}
        """Contents that are sent in place of what the list of files says."""
        self.has_ranges = True
        self.sent: defaultdict[str, int] = defaultdict(int)
        """Bytes of content by file."""
        self.asked: list[str] = []
        """Names of the files whose content was asked for."""
        self.downloads: list[str] = []
        """Of them those of which all was asked for, or all from some byte on."""
        self.url = ""


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A hub on a free port of loopback."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that leaves is no error."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = parse_qs(urlsplit(self.path).query)
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", path):
            self._modelscope(found[1], asked, is_list=bool(found[2]))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            self._list(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._content(self.served.repositories[found[1]] / found[2], found[2])
        else:
            self._refuse(404, "")

    def _list(self, name: str, revision: str | None) -> None:
        if not self._allowed(name, revision):
            return
        if self.served.statuses[""]:
            self._refuse(self.served.statuses[""].pop(0), "")
            return
        root = self.served.repositories[name]
        files = []
        for file in sorted(root.rglob("*")):
            if not file.is_file():
                continue
            data = file.read_bytes()
            entry = {"rfilename": str(file.relative_to(root)), "size": len(data), "blobId": "0"}
            if len(data) >= LFS_BYTES:
                checksum = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": checksum, "size": len(data), "pointerSize": 134}
            files.append(entry)
        body = {"id": name, "sha": self.served.commit, "siblings": files}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _modelscope(self, name: str, asked: dict[str, list[str]], *, is_list: bool) -> None:
        """The same repositories as ModelScope's API has them."""
        hub = self.served
        knows = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if name in hub.gated and not knows:
            self._refuse(403, "")
        elif name not in hub.repositories or asked["Revision"] not in (["master"], ["v1"]):
            self._refuse(404, "")
        elif is_list:
            root = hub.repositories[name]
            files = [
                {
                    "Path": str(file.relative_to(root)),
                    "Size": file.stat().st_size,
                    "Sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    "Type": "blob",
                }
                for file in sorted(root.rglob("*"))
            ]
            body = {"Code": 200, "Success": True, "Data": {"Files": files}}
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        else:
            file_name = asked["FilePath"][0]
            self._content(hub.repositories[name] / file_name, file_name)

    def _resolve(self, name: str, revision: str, file_name: str) -> None:
        if not self._allowed(name, revision):
            return
        file = self.served.repositories[name] / file_name
        if not file.is_file():
            self._refuse(404, "EntryNotFound")
            return
        data = file.read_bytes()
        headers = {"X-Repo-Commit": self.served.commit}
        if len(data) < LFS_BYTES:
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            self._content(file, file_name, headers)
            return
        # Another host, as a content network is: its answers have no X-Repo-Commit.
        content = self.served.url.replace("127.0.0.1", "localhost")
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{content}/cdn/{name}/{file_name}",
        }
        self._send(302, b"", headers)

    def _content(self, file: Path, name: str, headers: dict[str, str] | None = None) -> None:
        hub, headers = self.served, headers or {}
        if self.command == "GET":
            hub.asked.append(name)
            if hub.statuses[name]:
                self._refuse(hub.statuses[name].pop(0), "")
                return
        data = hub.replaced.get(name) or file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "GET" and not (asked and asked[2]):
            hub.downloads.append(name)
        status = 200
        if asked and hub.has_ranges:
            begin, end = int(asked[1]), int(asked[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(data) - 1)}/{len(data)}"
            data, status = data[begin : end + 1], 206
        cut = hub.cuts[name].pop(0) if self.command == "GET" and hub.cuts[name] else None
        self._send(status, data, headers, cut)
        hub.sent[name] += len(data if cut is None else data[:cut]) * (self.command == "GET")

    def _allowed(self, name: str, revision: str | None) -> bool:
        hub = self.served
        knows = hub.token and self.headers.get("Authorization") == f"Bearer {hub.token}"
        if name not in hub.repositories or (name in hub.private and not knows):
            self._refuse(401 if not knows else 404, "RepoNotFound")
        elif name in hub.gated and not knows:
            self._refuse(403, "GatedRepo")
        elif revision not in {None, "main", hub.commit}:
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(status, b"", headers | ({"Retry-After": "0"} if status == 429 else {}))

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True
