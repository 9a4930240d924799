"""One OpenAI-compatible endpoint over several engines.

What: ``serve`` runs the server, ``app.build`` makes the web application alone. How: an engine
(``engines/<name>.py``) turns one ``Ask`` into pieces of an answer; everything that HTTP clients see
(requests, replies, queue, limits, keys) is made here, once, for all engines. Constraint: a request
can never make the server answer 5xx. Trade-off: what only one engine understands is not passed
through unless it has a place in ``requests``.
"""
