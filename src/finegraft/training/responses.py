"""Unsloth's ``train_on_responses_only`` for a trainer that is already built."""

from __future__ import annotations

from typing import Any

from finegraft.core.errors import DataError
from finegraft.data.responses import detect_markers, marker_ids, mask_outside_responses
from finegraft.training.collate import IGNORED


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Mask everything outside responses in the trainer's rows.

    Args:
        trainer: An ``SFTTrainer`` whose rows are tokenised.
        instruction_part: Marker before an instruction; None: found in the chat template.
        response_part: Marker before a response; None: found in the chat template.
        force_match: Accepted because Unsloth has it; markers are always matched whole.
        tokenizer: None: the trainer's.
        return_function: Return the function for ``Dataset.map`` instead of applying it.
        num_proc: Processes for ``Dataset.map``.

    Returns:
        The trainer, or the function.

    Raises:
        DataError: FG-DATA-015 no markers; FG-DATA-021 no row holds a response.
    """
    tokenizer = tokenizer or trainer.processing_class
    if instruction_part is None or response_part is None:
        found = detect_markers(tokenizer)
        instruction_part = instruction_part or found[0]
        response_part = response_part or found[1]
    instructions = marker_ids(tokenizer, instruction_part)
    responses = marker_ids(tokenizer, response_part)

    def mask(batch: dict[str, list]) -> dict[str, list]:
        labels = batch.get("labels", batch["input_ids"])
        rows = zip(batch["input_ids"], labels, strict=True)
        return {
            "labels": [mask_outside_responses(i, lab, instructions, responses) for i, lab in rows]
        }

    if return_function:
        return mask
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name, None)
        if dataset is not None:
            masked = dataset.map(mask, batched=True, num_proc=num_proc)
            setattr(trainer, name, _learnable(masked, response_part))
    return trainer


def _learnable(dataset: Any, response_part: str) -> Any:
    kept = dataset.filter(lambda row: any(label != IGNORED for label in row["labels"]))
    if len(kept) == 0:
        raise DataError(
            "FG-DATA-021",
            f"no row contains the response marker {response_part!r} with something after it",
            allowed="the marker exactly as it stands in the rows",
            fix="pass response_part= as the template writes it",
        )
    return kept
