"""Teach a text encoder to tell good reviews from bad ones, with a LoRA and finegraft's Trainer.

What: sequence classification from end to end: rows, tokens, predictions before, training with an
evaluation each epoch, predictions after. Constraint: arguments as scripts of 2024 write them
(``evaluation_strategy``, ``tokenizer=``). Trade-off: 2,000 of the 9,173 rows, so that it takes
minutes; ``--train-rows 8000`` takes longer and does a little better.

    python examples/classify_reviews.py
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    set_seed,
)

import finegraft
from finegraft import Trainer, TrainingArguments
from finegraft.core.paths import require_writable
from finegraft.data import reviews

id2label = {0: "Negative", 1: "Positive"}
label2id = {"Negative": 0, "Positive": 1}

text_list = [
    "It was good.",
    "Not a fan, don't recommed.",
    "Better than the first one.",
    "This is not worth watching even once.",
    "This one is a pass.",
]


def predict(model, tokenizer, title):
    """Print the label of each sentence in the list."""
    print(f"{title} model predictions:")
    print("-" * 28)
    model.eval()
    for text in text_list:
        inputs = tokenizer.encode(text, return_tensors="pt").to(model.device)
        with torch.no_grad():
            logits = model(inputs).logits
        print(text + " - " + id2label[torch.argmax(logits).item()])


def tokenized(tokenizer, train_rows, validation_rows):
    """Reviews as ids; of long ones the end is kept, where the verdict usually stands."""
    train, validation = reviews.split(train_rows, validation_rows)
    dataset = DatasetDict(
        {"train": Dataset.from_list(train), "validation": Dataset.from_list(validation)}
    )
    share = np.array(dataset["train"]["label"]).mean()
    print(f"{len(train)} rows to train on, {share:.1%} of them positive")

    def tokenize_function(examples):
        tokenizer.truncation_side = "left"
        return tokenizer(examples["text"], truncation=True, max_length=64)

    return dataset.map(tokenize_function, batched=True)


def compute_metrics(p):
    """Share of right labels."""
    predictions, labels = p
    return {"accuracy": float((np.argmax(predictions, axis=1) == labels).mean())}


def main():
    """Load, predict, train, predict again, save."""
    options = arguments()
    require_writable(Path(options.output))
    set_seed(3407)
    model_checkpoint = finegraft.local_model("demo-encoder")
    tokenizer = AutoTokenizer.from_pretrained(model_checkpoint)
    tokenized_dataset = tokenized(tokenizer, options.train_rows, options.validation_rows)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_checkpoint, num_labels=2, id2label=id2label, label2id=label2id
    )
    print(model)
    predict(model, tokenizer, "Untrained")

    peft_config = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=32,
        lora_dropout=0.01,
        target_modules=["query", "value"],
    )
    model = get_peft_model(model, peft_config)
    model.print_trainable_parameters()

    training_args = TrainingArguments(
        output_dir=options.output + "-checkpoints",
        learning_rate=options.learning_rate,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        weight_decay=0.01,
        evaluation_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        save_total_limit=1,
        logging_steps=10,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=tokenized_dataset["train"],
        eval_dataset=tokenized_dataset["validation"],
        tokenizer=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer=tokenizer),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    print(f"Held-out accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")
    predict(model, tokenizer, "Trained")
    trainer.save_model(options.output)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-rows", type=positive(int), default=2000)
    parser.add_argument("--validation-rows", type=positive(int), default=500)
    parser.add_argument("--epochs", type=positive(float), default=3.0)
    parser.add_argument("--steps", type=positive(int), help="stop after this many steps")
    parser.add_argument("--learning-rate", type=positive(float), default=1e-3)
    parser.add_argument("--output", default="outputs/review-classifier", help="adapter folder")
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
    except finegraft.FinegraftError as error:
        sys.exit(str(error))
