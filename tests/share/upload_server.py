"""A small Hugging Face Hub on loopback that takes uploads: the part of its HTTP API that huggingface_hub asks for."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OID = "1" * 40  # of each commit


class Handler(BaseHTTPRequestHandler):
    server: "UploadServer"
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:  # noqa: N802
        self.answer()

    def do_POST(self) -> None:  # noqa: N802
        self.answer()

    def do_PUT(self) -> None:  # noqa: N802
        self.answer()

    def answer(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for place, status in hub.fails.items():
            if place in self.path:
                if status == 0:  # the link is cut
                    self.close_connection = True
                    self.connection.close()
                    return None
                return self.send(status, {"error": "no"})
        hub.requests.append(f"{self.command} {self.path}")
        if "/api/repos/create" in self.path or "/commit/" in self.path:
            hub.tokens.add(self.headers.get("Authorization", ""))
        if self.path.endswith("/api/repos/create"):
            asked = json.loads(body)
            hub.visibility = asked.get("visibility", "public")
            return self.send(200, {"url": f"{hub.url}/{asked['organization']}/{asked['name']}"})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                 "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self.send(200, {"files": files})
        if self.path.endswith("/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if self.path.startswith("/put/"):
            hub.large[hashlib.sha256(body).hexdigest()] = body
            return self.send(200, {})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = hub.large[line["value"]["oid"]]
            return self.send(200, {"commitUrl": f"{hub.url}/me/model/commit/{OID}", "commitOid": OID})
        return self.send(200, {"id": "me/model", "sha": OID, "siblings": [], "tags": [], "private": False})

    def send(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


class UploadServer(ThreadingHTTPServer):
    """Takes uploads until its `with` block ends: `files` are those of the last commit."""

    def __init__(self, fails: dict[str, int]) -> None:
        """Open it.

        Args:
            fails: by a part of the path, the status that it answers with; 0 cuts the link.
        """
        self.fails = fails
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.visibility = ""
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()
