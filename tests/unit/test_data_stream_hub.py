"""A data set of the hub, streamed file by file from a hub on 127.0.0.1."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from test_data_sources_hub import SHA, _Handler, _write

sys.path.insert(0, str(Path(__file__).parents[1]))
from hubserver import client_env

CLIENT = """
import itertools, json, sys
from finegraft.data import sources, stream
plan = stream.lay_out(sys.argv[1])
one = itertools.takewhile(lambda piece: not piece[0].epoch, stream.pieces(plan, 3))
rows = [row.row["prompt"] for _, rows in one for row in rows]
files = [str(f.path) for f in plan.files]
print(json.dumps([rows, files, sources.fingerprint_streamed(sys.argv[1])]))
"""


class _Ranges(_Handler):
    """Stretches of files, and facts about named ones, which streaming asks for as well."""

    def do_POST(self) -> None:
        self.asked.append(f"POST {self.path}")
        words = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        folder = self.root.joinpath(*self.path.split("/")[3:5])
        found = [folder / path for path in words["paths"]]
        self._send(
            [
                {
                    "type": "file",
                    "path": p.relative_to(folder).as_posix(),
                    "oid": "0" * 40,
                    "size": p.stat().st_size,
                }
                for p in found
                if p.is_file()
            ]
        )

    def _file(self, folder: Path, name: str) -> None:
        stretch = self.headers.get("Range")
        path = folder / name
        if not stretch or not path.is_file():
            return super()._file(folder, name)
        self.asked.append(f"{name} {stretch}")
        first, last = stretch.removeprefix("bytes=").split("-")
        content = path.read_bytes()
        part = content[int(first) : int(last or len(content)) + 1]
        end = int(first) + len(part) - 1
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": SHA}
        headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
        self._bytes(206, part, headers)


def test_the_files_of_a_split_are_read_in_stretches(tmp_path: Path) -> None:
    root, home = tmp_path / "hub", tmp_path / "home"
    home.mkdir()
    _write(root / "me/rows/data/train-00000-of-00002.parquet", 30, "first")
    _write(root / "me/rows/data/train-00001-of-00002.parquet", 20, "second")
    _write(root / "me/rows/data/test-00000-of-00001.parquet", 5, "test")
    handler = type("Handler", (_Ranges,), {"root": root, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, "hf:me/rows"],
            env=client_env(url, home),
            cwd=home,
            capture_output=True,
            text=True,
            timeout=120,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    rows, files, digest = json.loads(done.stdout.splitlines()[-1])
    names = [f"first {i}" for i in range(30)] + [f"second {i}" for i in range(20)]
    assert sorted(rows) == sorted(names) and rows != names
    assert [Path(file).name for file in files] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    assert len(digest) == 64
    assert any("bytes=" in asked for asked in handler.asked)  # type: ignore[attr-defined]
