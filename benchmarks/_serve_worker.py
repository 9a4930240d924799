"""llama.cpp's own server, as ``xllamacpp`` ships it, with finegraft's settings for it.

What: serves a GGUF file until its standard input closes. Constraint: same threads, slots, context
and template as ``finegraft serve``, and a thread for each client, so that none waits for another.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def main(path: str, slots: str, context: str, threads: str, clients: str) -> None:
    """See the module."""
    out = xllamacpp.CommonParams()
    out.model.path, out.n_parallel, out.n_ctx = path, int(slots), int(slots) * int(context)
    out.cpuparams.n_threads = out.cpuparams_batch.n_threads = int(threads)
    out.n_threads_http = int(clients) + 2
    out.warmup, out.use_jinja, out.ui, out.verbosity = False, True, False, 0
    server = xllamacpp.Server(out)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
