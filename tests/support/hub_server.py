"""A Hub on the loopback address: the calls that huggingface_hub makes to create, fill and read a model repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re

from huggingface_hub import ModelCard
from loopback import Answering, Loopback

GOOD_TOKEN = "hf_good"
COMMIT = "0" * 39 + "1"
LARGE = (".safetensors", ".png", ".bin")


class Handler(Answering):
    server: Hub

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refused(self):
        if self.headers.get("Authorization") == f"Bearer {GOOD_TOKEN}":
            return False
        self.answer({"error": "Invalid username or password."}, 401, X_Error_Message="Invalid username or password.")
        return True

    def do_POST(self):
        body, hub = self.body(), self.server
        if self.path.startswith("/verify"):
            self.answer({})
        elif self.path == "/recover":
            hub.failures = 0
            self.answer({})
        elif self.refused():
            pass
        elif self.path == "/api/validate-yaml":
            card = ModelCard(json.loads(body)["content"], ignore_metadata_errors=False)
            hub.validated.append(card.data.to_dict())
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            hub.repos.setdefault(name, {})
            hub.created.append({**asked, "id": name})
            self.answer({"url": f"{hub.endpoint}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in files
            ]
            self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **wanted,
                    "actions": {
                        "upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"},
                        "verify": {"href": f"{hub.endpoint}/verify"},
                    },
                }
                for wanted in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/[^/]+", self.path):
            self.commit(hub.repos[found[1]], [json.loads(line) for line in body.splitlines()], found[1])
        else:
            self.answer({"error": f"unknown: {self.path}"}, 404)

    def commit(self, repo, lines, name):
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                repo[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo[value["path"]] = self.server.objects[value["oid"]]
        self.server.history.append((name, dict(repo)))
        url = f"{self.server.endpoint}/{name}/commit/{COMMIT}"
        self.answer({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    def do_PUT(self):
        body, hub = self.body(), self.server
        if hub.failed < hub.failures:
            hub.failed += 1
            self.answer({"error": "come back later"}, 503)
            return
        name = self.path.rpartition("/")[2]
        intact = hashlib.sha256(body).hexdigest() == name
        if intact:
            hub.objects[name] = body
        self.answer({}, 200 if intact else 400)

    def do_GET(self):
        hub = self.server
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(resolve|revision|tree)/[^/]+(?:/(.+))?)?", self.path)
        if self.path == "/api/whoami-v2":
            if not self.refused():
                self.answer({"name": "tester", "type": "user"})
        elif found is None or found[1] not in hub.repos:
            self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        elif found[2] == "resolve" and found[3] in hub.repos[found[1]]:
            content = hub.repos[found[1]][found[3]]
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif self.path.startswith("/api/") and found[2] != "tree":
            files = [{"rfilename": path} for path in hub.repos[found[1]]]
            self.answer({"id": found[1], "sha": COMMIT, "siblings": files, "tags": [], "private": False})
        else:
            self.answer({"error": "no such entry"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


class Hub(Loopback):
    """Repositories by name, each with its files by path; ``failures`` uploads of large files fail at first.

    POST to ``/recover`` ends the failures.
    """

    handler = Handler

    def __init__(self, failures=0):
        super().__init__()
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.history: list[tuple[str, dict[str, bytes]]] = []  # name and files after each commit
        self.validated: list[dict[str, object]] = []  # metadata of cards
        self.created: list[dict[str, object]] = []  # what was asked for each repository
        self.failures, self.failed = failures, 0
