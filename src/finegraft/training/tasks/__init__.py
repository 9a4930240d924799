"""Kinds of training, one file each: ``task:`` in a configuration is the file's name."""

from __future__ import annotations

from finegraft.core.registry import Registry
from finegraft.training.tasks._contract import Task

TASKS: Registry[Task] = Registry("finegraft.training.tasks", "TASK", "task")
