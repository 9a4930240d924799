"""The web page of ``finegraft ui``: a small server of this machine over a folder of runs.

Layers of its own: ``workspace``, ``record`` and ``jobs`` know files and processes, ``desk`` holds
one of each, ``routes`` are the addresses by page, ``guard`` stands before all of them.
"""
