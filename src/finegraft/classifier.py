"""``FastClassifier``: the front door to models that label texts, or the words in them.

What: loading with label names, adapting, mode switching and predicting, under the names that
``FastLanguageModel`` has. How: thin composition; everything it does is a function below.
Constraint: an adapter folder brings its own labels; a new head is the same on every loading.
Trade-off: weights are never quantized unasked, because most classifiers are small.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from finegraft import adapters, opening
from finegraft.core.arguments import translate
from finegraft.core.errors import ConfigError, did_you_mean
from finegraft.core.hardware import facts
from finegraft.inference import classify, modes, tag
from finegraft.inference.classify import Prediction
from finegraft.inference.tag import Tagging
from finegraft.models import classifier, families, swap
from finegraft.models.locate import Located, locate

_LOAD_EXTRAS = {"quantization_config", "attn_implementation", "rope_scaling"}


class FastClassifier:
    """Load, adapt, switch and ask models that classify texts; every method is static."""

    @staticmethod
    def from_pretrained(
        model_name: str = "demo-encoder",
        num_labels: int | None = None,
        id2label: Mapping[int, str] | Sequence[str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        max_seq_length: int | None = None,
        dtype: Any = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        truncation_side: str | None = None,
        revision: str | None = None,
        task: str | None = None,
        **more: Any,
    ) -> tuple[Any, Any]:
        """Load a model with a classification head, and its tokenizer.

        Args:
            model_name: Hub name, folder, adapter or run folder, ``demo-encoder``; an encoder or a
                decoder. A model without such a head gets a new one, to be trained.
            num_labels: Outputs of the head; unset, as many as there are names, or those that the
                model was saved with, or 2.
            id2label: Names of the labels by id, or in their order.
            label2id: The same the other way round; one of the two is enough.
            problem_type: ``single_label_classification``, ``multi_label_classification`` or
                ``regression``, as in transformers.
            max_seq_length: In tokens; longer than the model knows is cut to that.
            dtype: Of the weights; None: bfloat16 where it is native, else float32 on CPUs.
            load_in_4bit: NF4 through bitsandbytes, the head left as it is.
            load_in_8bit: LLM.int8 through bitsandbytes, the head left as it is.
            full_finetuning: Every weight trains, no adapter needed.
            truncation_side: ``left`` or ``right``; unset, as the tokenizer was saved.
            task: ``sequence-classification`` or ``token-classification``, which tags words; unset,
                what the folder was saved for, else the former.
            more: ``quantization_config``, ``attn_implementation``, ``rope_scaling``.

        Returns:
            A transformers (or peft) model and its tokenizer, which knows the model's length.

        Raises:
            ModelError: FG-MODEL-001 to FG-MODEL-013, FG-CLASS-015 an adapter of another task;
                AdapterError: FG-ADAPT-003.
            ConfigError: FG-CLASS-012 and FG-CLASS-013, labels that contradict one another;
                FG-CLASS-023, an unknown problem type or truncation side; FG-CLASS-043, an unknown
                task.
            ArgumentError: FG-ARG-001, an unknown name.
        """
        own = set(inspect.signature(FastClassifier.from_pretrained).parameters) - {"more"}
        extra = translate("from_pretrained", more, own | _LOAD_EXTRAS, {})
        classifier.check_choices(problem_type, truncation_side)
        labels = classifier.label_settings(num_labels, id2label, label2id, problem_type)
        located = locate(model_name, revision=revision, token=token)
        task = _task(task, located)
        tokenizer = opening.open_text_tokenizer(
            located,
            max_seq_length=max_seq_length,
            truncation_side=truncation_side,
            trust_remote_code=trust_remote_code,
        )
        opened = opening.open_model(
            model_name,
            revision=revision,
            token=token,
            trainable=True,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            device_map=device_map,
            task=task,
            **labels,
            **extra,
        )
        families.apply(opened.model)
        adapters.accelerate(opened.model)
        if full_finetuning:
            opened.model.requires_grad_(True)
        elif opened.located.kind != "adapter":
            opened.model.requires_grad_(False)
        return opened.model, opened.tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        method: str = "lora",
        *,
        task_type: str | None = None,
        use_gradient_checkpointing: bool | str = False,
        random_state: int = 3407,
        **settings: Any,
    ) -> Any:
        """Attach a new adapter; the head trains with it.

        Args:
            method: One of ``finegraft methods``.
            task_type: ``SEQ_CLS`` or ``TOKEN_CLS``; unset, what the model's head is for.
            use_gradient_checkpointing: True recomputes activations; "unsloth" does so on a GPU.
            random_state: Seed of the adapter's start; the global random state is left alone.
            settings: The method's own: ``r``, ``lora_alpha``, ``target_modules`` ... for LoRA.

        Returns:
            A peft model; only the adapter and the head train.

        Raises:
            AdapterError: FG-ADAPT-010 unknown method, FG-ADAPT-011 not for this task, and those
                of the method.
        """
        with torch.random.fork_rng():
            torch.manual_seed(random_state)
            model = adapters.attach(model, method, task_type=task_type, **settings)
        wanted = use_gradient_checkpointing
        if wanted is True or (wanted == "unsloth" and facts().gpus):
            how = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            model.enable_input_require_grads()
        return model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Eval mode; ``for_training`` takes it back."""
        return model.eval()

    @staticmethod
    def for_training(model: Any) -> Any:
        """Training mode."""
        return modes.for_training(model)

    @staticmethod
    def predict(
        model: Any,
        tokenizer: Any,
        texts: str | Sequence[str],
        *,
        pairs: Sequence[str] | None = None,
        batch_size: int = 32,
        threshold: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Prediction] | list[Tagging]:
        """Label and probability of each text; see ``inference.classify.predict``.

        A model that tags words gives the spans it finds; see ``inference.tag.predict``.

        Args:
            texts: One or several.
            pairs: The second text of each pair.
            batch_size: Texts at a time.
            threshold: Probability from which one of several labels is said, unset 0.5; from which
                a span is said, unset 0.
            on_progress: Called with how many texts are done, and of how many.

        Raises:
            DataError: FG-CLASS-020; ConfigError: FG-CLASS-021, FG-CLASS-022, FG-CLASS-044 pairs
                for a model that tags words.
        """
        if tag.takes(swap.core(model)):
            if pairs is not None:
                raise ConfigError(
                    "FG-CLASS-044",
                    "pairs for a model that tags the words of one text",
                    allowed="one text a row",
                    fix="leave pairs out, or put both texts into one",
                )
            return tag.predict(
                model,
                tokenizer,
                texts,
                batch_size=batch_size,
                threshold=threshold,
                on_progress=on_progress,
            )
        return classify.predict(
            model,
            tokenizer,
            texts,
            pairs=pairs,
            batch_size=batch_size,
            threshold=0.5 if threshold is None else threshold,
            on_progress=on_progress,
        )


def _task(task: str | None, located: Located) -> str:
    """The task asked for, else what was located is saved for.

    Raises:
        ConfigError: FG-CLASS-043, no task of classifiers.
    """
    known = (classifier.SEQUENCE, classifier.TOKEN)
    asked = (task or classifier.kind_of(located) or classifier.SEQUENCE).replace("_", "-")
    if asked in known:
        return asked
    if task is None:  # a language model, which gets a new head
        return classifier.SEQUENCE
    raise ConfigError(
        "FG-CLASS-043",
        f"task is {task!r}",
        allowed=", ".join(known),
        fix=did_you_mean(task, known),
    )
