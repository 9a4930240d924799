"""Make tests/fixtures/gguf_hashes.json with llama.cpp's own converter and quantizer.

What: every tensor of the small models in ``tests/parity/gguf_models.py``, in every type, as
llama.cpp writes it: its type and the first 16 digits of the SHA-256 of its bytes. How: the source
distribution of llama-cpp-python on PyPI carries llama.cpp; its converter is pure Python, its
quantizer is built with cmake. Constraint: run by hand when rules change upstream, never by tests.
Trade-off: the build takes about five minutes on one core (C++ without optimization; the quantizing
code is C and keeps it).

    python tools/make_gguf_hashes.py WORK_FOLDER

The tokenizer is left out: the models have none, and tensors do not depend on it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "parity"))

import gguf_models  # noqa: E402

RELEASE = "0.3.36"
FLOATS = ("f32", "f16", "bf16", "q8_0")
QUANTS = ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s",
          "q5_k_m", "q6_k")  # fmt: skip
# Every type for the models that the rules tell apart, three for the others.
ALL = ("llama", "narrow", "phi3", "gemma2")
FEW = ("f16", "q4_k_m")
# Runs one of llama.cpp's scripts with its tokenizer part switched off.
RUNNER = """
import runpy, sys
source, script, *rest = sys.argv[1:]
sys.path[:0] = [source + "/gguf-py", source]
import conversion
conversion.load_all_models()
from conversion import base
def no_vocabulary(self):
    self.gguf_writer.add_tokenizer_model("none")
pending = [base.TextModel]
while pending:
    kind = pending.pop()
    kind.set_vocab = no_vocabulary
    pending += kind.__subclasses__()
sys.argv = [script, *rest]
runpy.run_path(source + "/" + script, run_name="__main__")
"""


def fetch(work: Path) -> Path:
    """Download and unpack the sources; return llama.cpp's folder."""
    folder = work / f"llama_cpp_python-{RELEASE}"
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, f"llama-cpp-python=={RELEASE}", "-d", str(work)], check=True)
        with tarfile.open(work / f"llama_cpp_python-{RELEASE}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    return folder / "vendor" / "llama.cpp"


def build(source: Path, work: Path) -> Path:
    """Build and return ``llama-quantize``."""
    program = work / "build" / "bin" / "llama-quantize"
    if not program.is_file():
        options = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF",
                   "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF",
                   "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG")  # fmt: skip
        subprocess.run(["cmake", "-S", source, "-B", work / "build", *options], check=True)
        target = ["cmake", "--build", work / "build", "--target", "llama-quantize", "-j1"]
        subprocess.run(target, check=True)
    return program


def hashes(file: Path) -> dict[str, str]:
    """Type and hash of every tensor of a file."""
    from gguf import GGUFReader

    return {
        tensor.name: f"{tensor.tensor_type.name} "
        + hashlib.sha256(tensor.data.tobytes()).hexdigest()[:16]
        for tensor in GGUFReader(file).tensors
    }


def run(source: Path, script: str, *arguments: object) -> None:
    command = [sys.executable, "-c", RUNNER, str(source), script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")


def main(work: Path) -> None:
    """Write the fixture."""
    work.mkdir(parents=True, exist_ok=True)
    source = fetch(work)
    quantize = build(source, work)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in gguf_models.MODELS:
        folder = gguf_models.save(name, work / "models" / name)
        # Gemma's converter cuts the embedding to the tokens that this file lists.
        listed = {"model": {"vocab": dict.fromkeys(map(str, range(320)), 0)}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(listed), encoding="utf-8")
        found[name] = {}
        for label in (*FLOATS, *QUANTS) if name in ALL else FEW:
            file = work / f"{name}-{label}.gguf"
            if label in FLOATS:
                run(source, "convert_hf_to_gguf.py", folder, "--outtype", label, "--outfile", file)
            else:
                whole = work / f"{name}-f32.gguf"
                if not whole.is_file():
                    arguments = ("--outtype", "f32", "--outfile", whole)
                    run(source, "convert_hf_to_gguf.py", folder, *arguments)
                command = [quantize, whole, file, label.upper()]
                subprocess.run(command, check=True, capture_output=True)
            found[name][label] = hashes(file)
    adapter = gguf_models.save_lora(work / "models" / "lora")
    file = work / "lora.gguf"
    base = work / "models" / "llama"
    run(source, "convert_lora_to_gguf.py", adapter, "--base", base, "--outfile", file)
    found["lora"] = {"f32": hashes(file)}
    out = ROOT / "tests" / "fixtures" / "gguf_hashes.json"
    out.write_text(json.dumps({"release": RELEASE, "models": found}, indent=0) + "\n", "utf-8")
    count = sum(len(of) for types in found.values() for of in types.values())
    print(f"{out}: {count} tensors, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
