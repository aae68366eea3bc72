"""A local Hugging Face hub: as much of its HTTP interface as its clients ask for sets and models."""

import contextlib
import gzip
import hashlib
import io
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pyarrow.parquet

CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files: [{split: test, path: wikitext-2-raw-v1/test-*}]
- config_name: wikitext-103-raw-v1
  data_files: [{split: test, path: wikitext-103-raw-v1/test-*}]
---
"""


def _parquet(column, rows):
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: rows}), written)
    return written.getvalue()


def repositories():
    """By name: the commit of its revision, and its files."""
    documents = "\n".join(json.dumps({"text": f"document {i}"}) for i in range(45576))
    return {
        "Salesforce/wikitext": {
            "commit": "1" * 40,
            "files": {
                "README.md": CARD.encode(),
                "wikitext-2-raw-v1/test-00000-of-00001.parquet": _parquet(
                    "text", [f"row {i}" for i in range(4358)]
                ),
                "wikitext-103-raw-v1/test-00000-of-00001.parquet": _parquet("text", ["another set"]),
            },
        },
        "ptb-text-only/ptb_text_only": {
            "commit": "2" * 40,
            "files": {
                "penn_treebank/test/0000.parquet": _parquet("sentence", [f"row {i}" for i in range(3761)])
            },
        },
        "allenai/c4": {
            "commit": "3" * 40,
            "files": {"en/c4-validation.00000-of-00008.json.gz": gzip.compress(documents.encode())},
        },
    }


@contextlib.contextmanager
def serve(repos):
    """Within: the endpoint's address. What is changed in `repos` is served at once."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
            api = parts[0] == "api"
            parts = parts[api:]
            parts = parts[parts[0] in ("datasets", "models") :]  # owner, name, what, revision, path
            repo = repos.get("/".join(parts[:2]))
            if repo is None:
                return self.answer(404, X_Error_Code="RepoNotFound")
            commit, files = repo["commit"], repo["files"]
            if api and "tree" in parts:
                return self.answer(200, json.dumps(_tree(files, "/".join(parts[4:]))).encode())
            if api:
                siblings = [{"rfilename": name} for name in files]
                found = {"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings, "private": False}
                return self.answer(200, json.dumps(found).encode())
            body = files.get("/".join(parts[4:]))
            if body is None:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _tree(files, folder):
    """What lies directly in a folder."""
    found = {}
    for name, body in files.items():
        if folder and not name.startswith(f"{folder}/"):
            continue
        rest = name[len(folder) + 1 if folder else 0 :]
        path = name[: len(name) - len(rest)] + rest.partition("/")[0]
        entry = {"oid": hashlib.sha1(name.encode()).hexdigest(), "path": path}
        kind = {"type": "directory", "size": 0} if "/" in rest else {"type": "file", "size": len(body)}
        found[path] = entry | kind
    return list(found.values())
