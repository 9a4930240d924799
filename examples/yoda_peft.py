"""Teach a 4-bit model to speak like Yoda, with transformers, peft and finegraft's SFTTrainer.

What: the usual tutorial from end to end: load quantized, attach a LoRA, format rows, train, ask,
save. Where such a script imports ``trl``, this one imports ``finegraft``; nothing else is special.
Constraint: runs as it is on a machine without a GPU. Trade-off: 4-bit weights save memory that a
small model does not need and cost time on a CPU; ``--bits 16`` is the quicker way there.

    python examples/yoda_peft.py
    python examples/yoda_peft.py --bits 16 --epochs 5
"""

import argparse
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

import finegraft
from finegraft import SFTConfig, SFTTrainer
from finegraft.core.paths import require_writable
from finegraft.data import yoda

HELD_OUT = 60
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(bits):
    """The demo model in NF4 with double quantization, or in 16 bits."""
    repo_id = finegraft.local_model("demo")
    # bfloat16 products take half the time of float32 ones where the machine has them.
    native = torch.bfloat16 if finegraft.is_bfloat16_supported() else torch.float32
    if bits == 16:
        model = AutoModelForCausalLM.from_pretrained(repo_id, dtype=native, device_map="auto")
        return repo_id, model
    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=native,
    )
    model = AutoModelForCausalLM.from_pretrained(
        repo_id, quantization_config=bnb_config, device_map="auto"
    )
    return repo_id, model


def with_adapter(model, bits):
    """The same model with a LoRA beside every linear layer of its blocks."""
    if bits == 4:
        # Also turns every layer that is not quantized into float32, for stable training.
        model = prepare_model_for_kbit_training(model)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        # 0.05 is usual; on a CPU its random numbers take a good third of a step.
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=TARGETS,
    )
    model = get_peft_model(model, config)
    print(f"Memory with the adapter: {model.get_memory_footprint() / 1e6:.1f} MB")
    train_p, tot_p = model.get_nb_trainable_parameters()
    print(f"Trainable parameters: {train_p / 1e6:.2f}M")
    print(f"Total parameters: {tot_p / 1e6:.2f}M")
    print(f"% of trainable parameters: {100 * train_p / tot_p:.2f}%")
    return model


def sentences():
    """Sentences, how Yoda would say them, and the same with his interjections."""
    rows = yoda.rows(720)
    return Dataset.from_dict(
        {
            "sentence": [row["prompt"] for row in rows],
            "translation": [re.match(r".*?[.?!]", row["completion"])[0] for row in rows],
            "translation_extra": [row["completion"] for row in rows],
        }
    )


def prompts_and_completions(dataset):
    """The columns under the names that the trainer knows."""
    dataset = dataset.rename_column("sentence", "prompt")
    dataset = dataset.rename_column("translation_extra", "completion")
    return dataset.remove_columns(["translation"])


def settings(options):
    """How to train."""
    return SFTConfig(
        # Memory: recompute activations, and halve the batch should it not fit.
        gradient_checkpointing=options.bits == 4,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        gradient_accumulation_steps=1,
        per_device_train_batch_size=16,
        auto_find_batch_size=True,
        # Rows: at most 64 tokens; a row here has about 40.
        max_length=64,
        packing=True,
        packing_strategy="wrapped",
        # Training.
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        learning_rate=options.learning_rate,
        optim="paged_adamw_8bit",
        # Where to, and how much to say.
        logging_steps=5,
        logging_dir="./logs",
        output_dir=options.output + "-checkpoints",
        report_to="none",
        bf16=finegraft.is_bfloat16_supported(),
    )


def gen_prompt(tokenizer, sentence):
    """The sentence as the user's turn, with the header of the answer."""
    converted_sample = [{"role": "user", "content": sentence}]
    return tokenizer.apply_chat_template(
        converted_sample, tokenize=False, add_generation_prompt=True
    )


def generate(model, tokenizer, prompt, max_new_tokens=64, skip_special_tokens=False):
    """The prompt and the model's most likely answer, as text."""
    tokenized_input = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    tokenized_input = tokenized_input.to(model.device)
    model.eval()
    half = model.dtype in (torch.float16, torch.bfloat16)
    ctx = torch.autocast(model.device.type, dtype=model.dtype) if half else nullcontext()
    with ctx:
        generation_output = model.generate(
            **tokenized_input,
            eos_token_id=tokenizer.eos_token_id,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return tokenizer.batch_decode(generation_output, skip_special_tokens=skip_special_tokens)[0]


def ask(model, tokenizer, rows):
    """Answer sentences that training has not seen; count the exact ones."""
    right = 0
    for row in rows:
        prompt = gen_prompt(tokenizer, row["prompt"])
        answer = generate(model, tokenizer, prompt, max_new_tokens=40)
        answer = answer.removeprefix(prompt).removesuffix(tokenizer.eos_token).strip()
        right += answer == row["completion"]
        print(f"  {row['prompt']}\n    -> {answer}")
    print(f"Exactly right: {right} of {len(rows)} held-out sentences")


def main():
    """Load, adapt, train, ask, save."""
    options = arguments()
    require_writable(Path(options.output))
    set_seed(3407)
    repo_id, model = load(options.bits)
    print(f"Memory of the model: {model.get_memory_footprint() / 1e6:.1f} MB")
    print(model)
    model = with_adapter(model, options.bits)

    dataset = sentences()
    print(dataset, dataset[0])
    dataset = prompts_and_completions(dataset)
    print(dataset, dataset[0])

    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    # The model's own template adds a system message of 20 tokens to every row; this one does not.
    tokenizer = finegraft.get_chat_template(tokenizer, "chatml")
    messages = [
        {"role": "user", "content": dataset[0]["prompt"]},
        {"role": "assistant", "content": dataset[0]["completion"]},
    ]
    print(tokenizer.apply_chat_template(messages, tokenize=False))

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=settings(options),
        train_dataset=dataset.select(range(len(dataset) - HELD_OUT)),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    print(batch["input_ids"][0], batch["labels"][0])
    trainer.train()

    prompt = gen_prompt(tokenizer, "The Force is strong in you!")
    print(prompt)
    print(generate(model, tokenizer, prompt))
    heldout = dataset.select(range(len(dataset) - HELD_OUT, len(dataset)))
    ask(model, tokenizer, heldout.select(range(options.ask)))

    trainer.save_model(options.output)
    print(os.listdir(options.output))


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4, help="of the base")
    parser.add_argument(
        "--epochs", type=positive(float), default=1.0, help="passes over the 660 rows"
    )
    parser.add_argument("--steps", type=positive(int), help="stop after this many steps")
    parser.add_argument("--learning-rate", type=positive(float), default=2e-3)
    parser.add_argument(
        "--ask",
        type=int,
        choices=range(1, HELD_OUT + 1),
        default=6,
        metavar="N",
        help="sentences to answer",
    )
    parser.add_argument("--output", default="outputs/yoda-adapter", help="folder of the adapter")
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
