"""Fixtures that the whole test suite shares: small real models, the demo model, shared data, the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Before torch, the hub client or a worker thread can read them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What test runs needed is not what the user's runs need.
os.environ.setdefault("LLMKIT_CACHE", tempfile.mkdtemp(prefix="llmkit-tests-"))
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
    os.environ.pop(_name, None)

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "tests" / "toys"))  # modules that tests share
DEMO_MODEL = REPO / "models" / "smollm2-135m-instruct"

# A test that skips on CI for another reason than these fails the run: a skip must never hide a broken set-up.
ALLOWED_SKIPS = re.compile(
    r"\b(GPU|CUDA|hub|shared data|memory|root|AVX512|bf16|compiler|kube-apiserver could not be built|Polyaxon)\b",
    re.IGNORECASE,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. How many legs has a spider? A spider has eight legs.",
    "user assistant system What is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
    "0 1 2 3 4 5 6 7 8 9 10 12 24 48 96 + - * / = ( ) [ ] { } < > , . ; : ! ? ' \"",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "한국어 문장도 있습니다. 中文句子也在这里。 Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
]


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder of a random Llama model (2 layers, hidden 64, 4 heads of which 2 hold keys, untied) with a real tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(folder: Path) -> None:
        tokenizer = _chat_tokenizer()
        config = LlamaConfig(**_sizes(tokenizer), tie_word_embeddings=False)
        _save(LlamaForCausalLM, config, tokenizer, folder)

    return _shared(tmp_path_factory, worker_id, "tiny-llama", build)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder of a random Qwen3 model of the same size, with tied embeddings and a vocabulary padded beyond the tokenizer's."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    def build(folder: Path) -> None:
        tokenizer = _chat_tokenizer()
        sizes = _sizes(tokenizer) | {"vocab_size": len(tokenizer) + 24}
        _save(Qwen3ForCausalLM, Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True), tokenizer, folder)

    return _shared(tmp_path_factory, worker_id, "tiny-qwen", build)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder of a random T5 model (2 + 2 layers, d_model 64) with ``<pad>`` = 0 and ``</s>`` = 1, as T5 has them."""
    from transformers import T5Config, T5ForConditionalGeneration

    def build(folder: Path) -> None:
        tokenizer = _t5_tokenizer()
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
        _save(T5ForConditionalGeneration, config, tokenizer, folder)

    return _shared(tmp_path_factory, worker_id, "tiny-t5", build)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct, made by scripts/fetch_demo_model.py."""
    if not (DEMO_MODEL / "config.json").is_file():
        reason = "the demo model is missing: python scripts/fetch_demo_model.py makes it"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return DEMO_MODEL


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the data sets that some machines have beside the checkout (GSM8K and others)."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data beside the checkout (../shared/data)")
    return folder


def _shared(factory: pytest.TempPathFactory, worker_id: str, name: str, build: Callable[[Path], None]) -> Path:
    """Build a folder once for all xdist workers; the first to come builds, the others wait."""
    base = factory.getbasetemp() if worker_id == "master" else factory.getbasetemp().parent
    folder = base / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            made = folder.with_suffix(".part")
            build(made)
            made.rename(folder)
    return folder


def _save(kind: type[PreTrainedModel], config: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _byte_level_bpe(specials: list[str]) -> Any:
    """A byte-level BPE of 500 tokens, trained on CORPUS; every string can be written in it and read back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS * 3, trainer)
    return raw


def _chat_tokenizer() -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    raw = _byte_level_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    raw = _byte_level_bpe(["<pad>", "</s>", "<unk>"])
    raw.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def kubectl() -> str:
    """kubectl, for ``kubectl kustomize``; scripts/kube_lab.sh installs it."""
    found = shutil.which("kubectl")
    if found is None:
        subprocess.run([REPO / "scripts" / "kube_lab.sh", "packages"], check=True, timeout=200)
        found = shutil.which("kubectl")
    assert found is not None
    return found


# --- the command line -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """stdout as JSON, as ``--json`` promises."""
        return json.loads(self.stdout)


RunLlmkit = Callable[..., Finished]


@pytest.fixture
def run_llmkit(tmp_path: Path) -> RunLlmkit:
    """Run the real command line in a process of its own: ``run_llmkit("sft", "recipe.yaml", cwd=..., env=..., timeout=...)``.

    Without ``cwd`` it runs in ``tmp_path``, so that the sqlite file and the token cache land there. ``env`` adds to the
    environment; a value of None takes a variable away.
    """

    def run(
        *args: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str | None] | None = None,
        timeout: float = 240,
        stdin: str = "",
    ) -> Finished:
        merged = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"} | dict(env or {})
        done = subprocess.run(
            [sys.executable, "-m", "llmkit", *map(str, args)],
            cwd=cwd or tmp_path,
            env={key: value for key, value in merged.items() if value is not None},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], str]:
    """Writes ``r.yaml`` into the working directory, so that messages begin with ``r.yaml:``."""
    monkeypatch.chdir(tmp_path)

    def to(text: str | bytes) -> str:
        Path("r.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return "r.yaml"

    return to


# --- a run of the suite that can be trusted -------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(REPO / "tests" / "integration"):
            item.add_marker(pytest.mark.integration)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU on this machine")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """On CI a skip for a reason that is not on the list counts as a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not ALLOWED_SKIPS.search(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped on CI for a reason that conftest.py does not allow: {reason}"
