"""From rows to an API: train, reload, GGUF in two types, a Modelfile, a server, an answer from it.

What: what guides for Unsloth do with llama.cpp, Ollama and vLLM, in one file. How: both GGUF files
come from one pass over the weights and are compared with the trained model before they count; the
server is `finegraft serve` on a free port, asked through the official openai client. Constraint:
needs the extra: pip install "finegraft[serve,gguf]". Trade-off: a small model and few steps.

    python examples/train_to_api.py
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from openai import OpenAI

from finegraft import FastLanguageModel, FinegraftError, SFTConfig, SFTTrainer
from finegraft.core.paths import require_writable
from finegraft.data import yoda
from finegraft.export import ollama

QUESTION = "The young farmer carried the heavy basket."


def train(folder, options):
    """Teach the demo model to speak like Yoda and save the adapter."""
    model, tokenizer = FastLanguageModel.from_pretrained("demo", max_seq_length=256)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    rows = yoda.rows(720)  # the question is none of them
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        args=SFTConfig(
            f"{folder}-checkpoints",
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=options.learning_rate,
            logging_steps=5,
            save_strategy="no",
        ),
    )
    trainer.train()
    trainer.save_model(str(folder))


def export(folder, output):
    """Two GGUF files and an Ollama folder of the adapter as it is on the disk."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder))
    files = model.save_pretrained_gguf(
        output / "gguf", tokenizer, quantization_method=["q8_0", "f16"]
    )
    for file in files:
        print(f"{file.name}: {file.stat().st_size / 1e6:.0f} MB, verified")
    ollama.write(str(folder), output / "ollama", ["q8_0"], temperature=0.0)
    print((output / "ollama" / "Modelfile").read_text())
    return files[0]


def ask(file):
    """Serve the file on a free port, ask it through the API, and end the server."""
    command = [sys.executable, "-m", "finegraft.cli.main", "serve", str(file)]
    command += ["--port", "0", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        told = json.loads(server.stdout.readline())
        client = OpenAI(base_url=f"{told['url']}/v1", api_key="none")
        answer = client.chat.completions.create(
            model=told["models"][0],
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=40,
        )
        return answer.choices[0].message.content
    finally:
        server.terminate()
        server.wait(timeout=30)


def main():
    """Train, export, serve, ask."""
    options = arguments()
    output = Path(options.output)
    require_writable(output)
    train(output / "adapter", options)
    file = export(output / "adapter", output)
    print(f"{QUESTION}\n  {ask(file)}")


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive(int), default=60)
    parser.add_argument("--learning-rate", type=positive(float), default=1e-3)
    parser.add_argument("--output", default="outputs/train_to_api", help="folder of everything")
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
