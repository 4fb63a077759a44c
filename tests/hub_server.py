"""A small Hugging Face Hub on loopback: serves a folder of repositories by the part of the Hub's HTTP API that
transformers, datasets and huggingface_hub ask for when they download a model, a tokenizer or a data set.

The folder holds `models/OWNER/NAME/...` and `datasets/OWNER/NAME/...`. As on the Hub, an old model such as `gpt2` goes
by its name alone and is redirected to its owner's repository, and large files are redirected to another host.
HF_ENDPOINT points the libraries at `HubServer.url`; they read it when they are imported.
"""

import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from datasets import ClassLabel, Dataset, Features, Value

FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repository>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repository>[^/]+(/[^/]+)??)"
    r"(/(?P<call>revision|tree|paths-info)/(?P<revision>[^/]+)(/(?P<path>.+))?)?"
)
LARGE = (".safetensors", ".parquet")
LABELS = ["sadness", "joy", "love", "anger", "fear", "surprise"]  # of dair-ai/emotion, in its order
EMOTION_CARD = """---
configs:
- config_name: split
  data_files:
  - split: train
    path: split/train-*
  - split: validation
    path: split/validation-*
  - split: test
    path: split/test-*
  default: true
- config_name: unsplit
  data_files:
  - split: train
    path: unsplit/train-*
---
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def object_id(content: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_emotion(repositories: Path, files: dict[str, list[tuple[str, str]]]) -> None:
    """Write dair-ai/emotion as it lies on the Hub.

    Args:
        repositories: the folder that a `HubServer` serves.
        files: text and label of each row of split/train, split/validation, split/test, and unsplit/train.
    """
    folder = repositories / "datasets" / "dair-ai" / "emotion"
    features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS)})
    for name, rows in files.items():
        columns = {"text": [text for text, _ in rows], "label": [LABELS.index(label) for _, label in rows]}
        path = folder / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(path)
    (folder / "README.md").write_text(EMOTION_CARD, encoding="utf-8")


class Handler(BaseHTTPRequestHandler):
    server: "HubServer"
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # noqa: N802
        self.answer()

    def do_GET(self) -> None:  # noqa: N802
        self.answer()

    def do_POST(self) -> None:  # noqa: N802
        self.answer()

    def log_message(self, *args: object) -> None:
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = unquote(urlsplit(self.path).path)
        match = FILE.fullmatch(path) or API.fullmatch(path)
        if self.server.status:
            self.send(self.server.status, self.server.page, Content_Type="text/html")
        elif path == "/":
            self.send(200, b"a Hub")
        elif not match:
            self.send(404)
        else:
            self.answer_about(match)

    def answer_about(self, match: re.Match[str]) -> None:
        """Answer a request about a repository or a file in it."""
        name = match["repository"]
        repositories = self.server.folder / ("datasets" if match["kind"] else "models")
        if match.re is API:
            repositories = self.server.folder / match["kind"]
        if "/" not in name:
            for owned in repositories.glob(f"*/{name}"):
                location = self.path.replace(name, f"{owned.parent.name}/{name}", 1)
                return self.send(307, Location=location)
        if "/" not in name or not (repositories / name).is_dir():
            return self.send(401, error="RepoNotFound")

        for root in [repositories / name, *repositories.glob(f"{name}@*")]:
            files = {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.is_file()}
            ids = "".join(sorted(f"{path} {self.server.id_of(file)}\n" for path, file in files.items()))
            self.commit = hashlib.sha1(ids.encode()).hexdigest()
            branch = root.name.partition("@")[2] or "main"
            if (match["revision"] or "main") in (branch, self.commit):
                break
        else:
            return self.send(404, error="RevisionNotFound")
        if match.re is FILE:
            return self.send_file(match["path"], files)
        if match["call"] in ("tree", "paths-info"):
            return self.send_entries(match, files)
        siblings = [{"rfilename": path} for path in files]
        return self.send_json({"id": name, "sha": self.commit, "private": False, "tags": [], "siblings": siblings})

    def send_file(self, path: str, files: dict[str, Path]) -> None:
        if path not in files:
            return self.send(404, error="EntryNotFound", X_Repo_Commit=self.commit)
        etag = f'"{self.server.id_of(files[path])}"'
        if path.endswith(LARGE) and not self.headers["Host"].startswith("localhost"):
            # "localhost" is another host to the client: it takes what it knows of the file from this answer.
            return self.send(
                302,
                Location=f"http://localhost:{self.server.server_port}{self.path}",
                X_Repo_Commit=self.commit,
                X_Linked_Size=str(files[path].stat().st_size),
                X_Linked_ETag=etag,
            )
        return self.send(200, files[path].read_bytes(), X_Repo_Commit=self.commit, ETag=etag)

    def send_entries(self, match: re.Match[str], files: dict[str, Path]) -> None:
        """Send the files and folders in a folder, or those with the paths that the body of the request lists."""
        folders = {parent for path in files for parent in PurePosixPath(path).parents}
        entries = [
            {"type": "file", "path": path, "size": file.stat().st_size, "oid": self.server.id_of(file)}
            for path, file in files.items()
        ] + [{"type": "directory", "path": str(path), "size": 0, "oid": object_id(bytes(path))} for path in folders]
        if match["call"] == "paths-info":
            wanted = parse_qs(self.body)["paths"]
            return self.send_json([entry for entry in entries if entry["path"] in wanted])
        folder = PurePosixPath(match["path"] or ".")
        if folder not in folders:
            return self.send(404, error="EntryNotFound")
        recursive = "recursive=true" in self.path.lower()

        def is_in_folder(entry: dict[str, object]) -> bool:
            parents = list(PurePosixPath(str(entry["path"])).parents)
            return folder in parents if recursive else [folder] == parents[:1]

        return self.send_json([entry for entry in entries if is_in_folder(entry)])

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def send(self, status: int, content: bytes = b"", error: str = "", **headers: str) -> None:
        first, last = 0, len(content) - 1
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(last, int(part[2] or last))
            status, headers["Content_Range"] = 206, f"bytes {first}-{last}/{len(content)}"
        self.send_response(status)
        if error:
            headers["X_Error_Code"] = error
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if self.command != "HEAD":
            content = content[first : last + 1]
            if self.server.cuts and len(content) > self.server.cuts:
                content, self.close_connection = content[: self.server.cuts], True
            with suppress(ConnectionError):
                self.wfile.write(content)


class HubServer(ThreadingHTTPServer):
    """Serves `folder` until its `with` block ends; `requests` lists what it was asked.

    A folder NAME@REVISION beside that of a repository holds a branch of it.
    """

    def __init__(self, folder: Path, port: int, status: int = 0, page: bytes = b"", cuts: int = 0) -> None:
        """Open it.

        Args:
            folder: of the repositories.
            port: of loopback.
            status: if given, all that it ever answers, with this page.
            page: see status.
            cuts: a line that breaks after so many bytes of a file (0: never).
        """
        self.folder, self.status, self.page, self.cuts = folder, status, page, cuts
        self.requests: list[str] = []
        self.ids: dict[tuple[Path, int, int], str] = {}  # of files, with their sizes and times
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def id_of(self, file: Path) -> str:
        """The name that git gives a file; that of a large one is computed once."""
        state = file.stat()
        key = (file, state.st_size, state.st_mtime_ns)
        if key not in self.ids:
            self.ids[key] = object_id(file.read_bytes())
        return self.ids[key]

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()  # from now on connections are refused
