"""A Hub on the loopback address with one data set at several commits: the calls that `datasets` makes to read it."""

from __future__ import annotations

import hashlib
import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import Answering, Loopback


class Handler(Answering):
    server: DatasetHub

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pattern = r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/([^/]+)(?:/(.*))?)?"
        found = re.fullmatch(pattern, unquote(urlsplit(self.path).path))
        commit = self.server.newest if found is None or found[3] in (None, "main") else found[3]
        files = self.server.commits.get(commit)
        if found is None or files is None:
            self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        elif found[2] == "tree":
            self.tree(files, f"{found[4]}/" if found[4] else "")
        elif found[2] == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self.answer([entry for path in asked for entry in entries(files, path)])
        elif found[2] == "resolve":
            self.resolve(files.get(found[4]), commit)
        else:
            info = {"id": found[1], "sha": commit, "siblings": [{"rfilename": path} for path in files]}
            self.answer({**info, "private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0})

    do_HEAD = do_POST = do_GET

    def tree(self, files, prefix):
        inside = {path.removeprefix(prefix) for path in files if path.startswith(prefix)}
        if "recursive=true" not in self.path.lower():
            inside = {path.split("/")[0] for path in inside}
        if inside:
            self.answer([entry for path in sorted(inside) for entry in entries(files, prefix + path)])
        else:
            self.answer({"error": "no such entry"}, 404, X_Error_Code="EntryNotFound")

    def resolve(self, data, commit):
        if data is None:
            self.answer({"error": "no such entry"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            self.answer(data, **headers)
            return
        first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
        self.answer(data[first : last + 1], 206, Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)


class DatasetHub(Loopback):
    """Files by path for each commit; ``newest`` is the commit of ``main``. Every name is that of the data set."""

    handler = Handler

    def __init__(self):
        super().__init__()
        self.commits: dict[str, dict[str, bytes]] = {}
        self.newest = ""


def entries(files, path):
    """The entry of a file or a folder, if there is one."""
    if path in files:
        return [{"type": "file", "path": path, "oid": hashlib.sha1(files[path]).hexdigest(), "size": len(files[path])}]
    folder = any(other.startswith(f"{path}/") for other in files)
    return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0}] if folder else []
