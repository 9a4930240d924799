"""Seeing a run: reading its events, comparing it with another, and its page.

Nothing here but ``before_after`` imports torch, so that ``finegraft runs`` answers at once.
"""
