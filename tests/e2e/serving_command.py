"""``finegraft serve`` as a process, and an adapter to serve."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path

from command_line import COMMAND, environment


@contextlib.contextmanager
def served(*words, cwd, **env):
    """Run the command; yields its address and the process."""
    command = [*COMMAND, "serve", *map(str, words), "--port", "0", "--threads", "1", "--json"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(**env),
            text=True,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        try:
            line = process.stdout.readline()
            errors.seek(0)
            assert "url" in line, line + errors.read()
            process.errors = errors
            yield json.loads(line)["url"], process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def make_adapter(folder: Path, strength: float = 0.05) -> Path:
    """A random LoRA on the demo model that says something else."""
    import torch

    from finegraft import FastLanguageModel, opening

    model, tokenizer = FastLanguageModel.from_pretrained("demo", dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=strength)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    opening.write_note(model, folder)
    return folder
