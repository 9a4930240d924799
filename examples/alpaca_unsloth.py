"""Fine-tune in Unsloth's words: FastLanguageModel, an Alpaca prompt and trainer arguments of 2024.

What: a notebook as they were written for Unsloth, from the untrained answer to the reloaded
adapter. Where it imported ``unsloth`` and ``trl``, this one imports ``finegraft``. Constraint: the
arguments are the notebook's, names and all; those with other names today are translated.
Trade-off: the whole text is learnt, prompt included, as such notebooks do.

    python examples/alpaca_unsloth.py
    python examples/alpaca_unsloth.py --no-4bit
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from transformers import TextStreamer

from finegraft import (
    FastLanguageModel,
    FinegraftError,
    SFTTrainer,
    TrainingArguments,
    is_bfloat16_supported,
)
from finegraft.core.paths import require_writable
from finegraft.data import yoda

max_seq_length = 2048
dtype = None  # None: the best one of this machine

INSTRUCTION = "Say this as Yoda would."
QUESTION = "The young farmer carried the heavy basket."

alpaca_prompt = """Below is an instruction that describes a task, paired with an input. \
Write a response that appropriately completes the request.

### Instruction:
{}

### Input:
{}

### Response:
{}"""


def rows():
    """Rows as Alpaca has them; the question that is asked is none of them."""
    pairs = [row for row in yoda.rows(720) if row["prompt"] != QUESTION]
    return Dataset.from_list(
        [
            {"instruction": INSTRUCTION, "input": row["prompt"], "output": row["completion"]}
            for row in pairs
        ]
    )


def answer(model, tokenizer):
    """Stream what the model makes of the question."""
    FastLanguageModel.for_inference(model)
    inputs = tokenizer(
        [alpaca_prompt.format(INSTRUCTION, QUESTION, "")],  # output: left blank for the model
        return_tensors="pt",
    ).to(model.device)
    text_streamer = TextStreamer(tokenizer)
    _ = model.generate(**inputs, streamer=text_streamer, max_new_tokens=48, do_sample=False)


def train(model, tokenizer, options):
    """Attach a LoRA, train it, save it."""
    EOS_TOKEN = tokenizer.eos_token

    def formatting_prompts_func(examples):
        texts = []
        for instruction, input, output in zip(
            examples["instruction"], examples["input"], examples["output"], strict=True
        ):
            # Without the end token the model would never learn to stop.
            texts.append(alpaca_prompt.format(instruction, input, output) + EOS_TOKEN)
        return {"text": texts}

    dataset = rows()
    dataset = dataset.map(formatting_prompts_func, batched=True)

    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=max_seq_length,
        dataset_num_proc=2,
        packing=False,
        args=TrainingArguments(
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=4,
            warmup_steps=5,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            fp16=not is_bfloat16_supported(),
            bf16=is_bfloat16_supported(),
            logging_steps=1,
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            output_dir=options.output + "-checkpoints",
        ),
    )
    trainer_stats = trainer.train()
    print(f"Trained in {trainer_stats.metrics['train_runtime']:.0f} s")

    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


def load(name, options):
    """A model, or an adapter with its base, and the tokenizer."""
    return FastLanguageModel.from_pretrained(
        model_name=name,
        max_seq_length=max_seq_length,
        dtype=dtype,
        load_in_4bit=not options.no_4bit,
    )


def main():
    """Ask, train, save, reload, ask again."""
    options = arguments()
    require_writable(Path(options.output))
    model, tokenizer = load("demo", options)
    print("--- before")
    answer(model, tokenizer)
    train(model, tokenizer, options)
    del model
    model, tokenizer = load(options.output, options)
    print("--- after, reloaded")
    answer(model, tokenizer)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-4bit", action="store_true", help="do not quantize the base")
    parser.add_argument("--steps", type=positive(int), default=60)
    parser.add_argument("--batch", type=positive(int), default=1, help="rows a micro-batch of four")
    parser.add_argument("--learning-rate", type=positive(float), default=1e-3)
    parser.add_argument("--output", default="outputs/lora_model", help="folder of the adapter")
    return parser.parse_args()


def positive(kind):
    """A reader of numbers above zero."""

    def number(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    number.__name__ = kind.__name__
    return number


if __name__ == "__main__":
    try:
        main()
    except FinegraftError as error:
        sys.exit(str(error))
