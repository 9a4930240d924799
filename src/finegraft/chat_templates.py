"""The names that Unsloth's ``chat_templates`` module has, for scripts that import them there."""

from finegraft.data.chat_templates import get_chat_template, standardize_sharegpt
from finegraft.training.responses import train_on_responses_only

__all__ = ["get_chat_template", "standardize_sharegpt", "train_on_responses_only"]
