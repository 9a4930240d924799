"""Tuning methods, one file each, and what can be done with adapters.

``attach`` makes an adapter of any method by its name, ``get_peft_model`` takes a configuration,
``named`` keeps several adapters on one model, ``merge_to_16bit`` merges one, ``add_new_tokens``
gives the model more tokens.
"""

from finegraft.adapters import _named as named
from finegraft.adapters._configs import get_peft_model
from finegraft.adapters._contract import CAUSAL, SEQUENCE, TASKS, TOKEN, Method
from finegraft.adapters._merge import Merged, check_mergeable, merge_to_16bit, original_weights
from finegraft.adapters._methods import (
    METHODS,
    accelerate,
    attach,
    check,
    check_bare,
    find,
    method_of,
    name_of,
    names,
)
from finegraft.adapters._tokens import add_new_tokens, make_rows, train_new_rows

__all__ = [
    "CAUSAL",
    "METHODS",
    "SEQUENCE",
    "TASKS",
    "TOKEN",
    "Merged",
    "Method",
    "accelerate",
    "add_new_tokens",
    "attach",
    "check",
    "check_bare",
    "check_mergeable",
    "find",
    "get_peft_model",
    "make_rows",
    "merge_to_16bit",
    "method_of",
    "name_of",
    "named",
    "names",
    "original_weights",
    "train_new_rows",
]
