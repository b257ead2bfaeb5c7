"""The arithmetic behind ``llmkit plan``: how many bytes a training run needs, term by term, for one process.

Pure arithmetic on the sizes of :class:`Architecture`; nothing is loaded or measured here. Every term is what llmkit's own
trainer holds (training/kernels.py, attention.py, loss.py keep less than the usual layers), or what DeepSpeed holds.
Where the numbers come from, and how far they are off, is in docs/memory.md:

- weights, gradients, optimizer states and how ZeRO divides them: arXiv 1910.02054, section 3 and 5
- activations, with and without recomputation: the method of arXiv 2205.05198, section 4, with llmkit's own layers
- buckets and what is gathered at once: DeepSpeed's configuration reference (deepspeed.ai/docs/config-json)
- 4-bit weights: arXiv 2305.14314, section 3
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llmkit.modeling.architecture import BYTES, Architecture, Tensor
from llmkit.modeling.settings import AdapterSettings

Offload = Literal["none", "cpu", "nvme"]

ROUND = 32
"""As training/shapes.py: flat sequences and chunks of the loss are a multiple of this."""
CHUNK_ELEMENTS = 1 << 23
"""As training/loss.py: logits held at once."""
QUERY_BLOCK = 128
"""As training/attention.py: queries scored at once on a CPU."""
MAPPED = 32 << 20
"""As training/allocator.py: blocks of this size are mapped one by one by the C library, smaller ones lie in its heap."""
KERNEL = 0.68e6
"""Bytes of a bfloat16 product's compiled kernel in oneDNN, which a CPU multiplies with: measured over 64 shapes (docs/memory.md).
float32 goes through MKL, which keeps none."""
KERNELS_KEPT = 1024
"""Kernels that oneDNN keeps (ONEDNN_PRIMITIVE_CACHE_CAPACITY)."""
ON_THE_WAY = 0.18e9
"""What a process on a CPU takes beyond its imports until a run has ended: tokenizer and Arrow, the first kernels of the
matrix library, autograd, checkpoint and plots. Measured with the smallest model (benchmarks/plan_accuracy.py)."""
CUDA_CONTEXT = 600 << 20
"""What a process holds on a GPU before its first tensor: the context and the libraries' kernels. nvidia-smi shows 400
to 700 MB, depending on the card and on the libraries."""


@dataclass(frozen=True)
class Sharding:
    """What the processes divide among them. ``stage`` 0 is plain data parallel (DDP).

    Buckets are in elements; the defaults are DeepSpeed's own. ``max_live`` bounds what ZeRO 3 holds gathered.
    """

    stage: int = 0
    optimizer: Offload = "none"
    parameters: Offload = "none"
    reduce_bucket: float = 5e8
    overlap: bool = False
    prefetch_bucket: float = 5e7
    max_live: float = 1e9
    fsdp: bool = False

    @property
    def engine(self) -> bool:
        """DeepSpeed holds the optimizer (float32 master weights, flat buffers)."""
        return self.stage > 0 and not self.fsdp

    @property
    def name(self) -> str:
        if self.fsdp:
            return "fsdp" + ("_offload" if self.parameters != "none" else "")
        if not self.stage:
            return "none"
        kind = {"cpu": "_offload", "nvme": "_nvme", "none": ""}
        offload = self.parameters if self.parameters == "nvme" else self.optimizer
        return f"zero{self.stage}{kind[offload]}"


@dataclass(frozen=True)
class Setup:
    """One process of a training run. Tokens are positions, padding included.

    ``part_tokens`` go through the model at once, in rows of at most ``row_tokens``; ``passes`` forward passes add up
    their gradients before a step. ``supervised`` is the share of positions that is learned.
    """

    architecture: Architecture
    cpu: bool
    dtype: str
    part_tokens: int
    row_tokens: int
    passes: int = 1
    supervised: float = 1.0
    mixed: str = ""
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = False
    adapter: AdapterSettings | None = None
    quantization: str | None = None
    double_quant: bool = True
    lean: bool = True
    flash: bool = True
    fused_loss: bool = True
    processes: int = 1
    sharding: Sharding = Sharding()
    totals: int = 1
    """Different numbers of tokens of a pass in the run."""
    blocks: int = 0
    """Different shapes of blocks of attention in the run."""

    @property
    def element(self) -> int:
        """Bytes of an activation: the product's type in mixed precision, else the weights'."""
        return BYTES[self.mixed or self.dtype]

    @property
    def residual(self) -> int:
        """Bytes of an element of the residual stream: mixed precision keeps it in float32."""
        return 4 if self.mixed else BYTES[self.dtype]

    @property
    def all_lean(self) -> bool:
        """Norms and gates are llmkit's own (CPU) or Liger's (GPU), which keep their input only."""
        return self.lean and self.architecture.lean_norm and self.architecture.swiglu


@dataclass(frozen=True)
class Term:
    """``size`` in bytes; ``at_peak`` is what of it is there when the most is held; ``host`` puts it beside the device."""

    name: str
    size: float
    at_peak: float
    why: str
    host: bool = False


@dataclass(frozen=True)
class Memory:
    """The terms of one process; ``device`` and ``host`` are the peaks in bytes. On a CPU both are one memory."""

    terms: tuple[Term, ...]
    cpu: bool

    @property
    def device(self) -> float:
        return sum(t.at_peak for t in self.terms if self.cpu or not t.host)

    @property
    def host(self) -> float:
        return sum(t.at_peak for t in self.terms if t.host or self.cpu)

    def size(self, name: str) -> float:
        return sum(term.size for term in self.terms if term.name == name)


# Weights


def is_adapted(tensor: Tensor, settings: AdapterSettings) -> bool:
    """Whether this matrix gets an adapter, by PEFT's rules."""
    if not tensor.is_linear:
        return False
    targets = settings.target_modules
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, tensor.module) is not None
    return any(tensor.module == name or tensor.module.endswith(f".{name}") for name in targets)


def _is_saved(tensor: Tensor, settings: AdapterSettings) -> bool:
    """Trained in full beside the adapter."""
    parts = tensor.module.split(".")
    return any(name in parts for name in settings.modules_to_save)


def adapter_parameters(architecture: Architecture, settings: AdapterSettings) -> int:
    """``r (in + out)`` for each adapted matrix (arXiv 2106.09685); DoRA adds ``out`` magnitudes (arXiv 2402.09353)."""
    total = 0
    for tensor in architecture.tensors:
        if is_adapted(tensor, settings):
            rows, columns = tensor.shape
            total += settings.r * (rows + columns) + (rows if settings.use_dora else 0)
    return total


def full_parameters(architecture: Architecture, settings: AdapterSettings | None) -> int:
    """Weights of the model itself that are trained: all, or what the adapter names in ``modules_to_save`` and ``bias``."""
    if settings is None:
        return architecture.parameters
    saved = sum(t.count for t in architecture.tensors if _is_saved(t, settings))
    if settings.bias != "none":
        saved += sum(t.count for t in architecture.tensors if t.name.endswith(".bias"))
    return saved


def trainable_parameters(architecture: Architecture, settings: AdapterSettings | None) -> int:
    """Weights that get a gradient."""
    own = full_parameters(architecture, settings)
    return own if settings is None else own + adapter_parameters(architecture, settings)


def base_weights(setup: Setup) -> float:
    """Bytes of the model's weights, quantized or not.

    nf4: 4 bits a weight, and constants of 0.127 bits with double quantization, of 0.5 bits (a float32 for 64 weights)
    without (arXiv 2305.14314, section 3); int8: a byte, and a float32 for each row. Embeddings, norms and the output layer stay as they are.
    """
    a, wide = setup.architecture, BYTES[setup.dtype]
    if setup.quantization is None:
        return float(a.parameters * wide)
    total = 0.0
    for tensor in a.tensors:
        if not (tensor.is_linear and tensor.in_layer):
            total += tensor.count * wide
        elif setup.quantization == "nf4":
            total += tensor.count * (4 + (0.127 if setup.double_quant else 0.5)) / 8
        else:
            total += tensor.count + 4 * tensor.shape[0]
    return total


@dataclass(frozen=True)
class _Trained:
    """Numbers and bytes of what is trained: the adapter's weights are float32, the model's in their own type."""

    count: int
    size: float
    largest: float


def _trained(setup: Setup) -> _Trained:
    a, wide = setup.architecture, BYTES[setup.dtype]
    own = full_parameters(a, setup.adapter)
    extra = adapter_parameters(a, setup.adapter) if setup.adapter is not None else 0
    largest = max((t.count for t in a.tensors), default=0) * wide if own else 0
    return _Trained(own + extra, own * wide + extra * 4, float(largest))


def optimizer_states(setup: Setup) -> float:
    """Bytes of the optimizer's states without sharding: AdamW keeps two numbers in the type of the weight."""
    trained = _trained(setup)
    if setup.optimizer.startswith("adamw"):
        return 2 * trained.size
    if setup.optimizer == "adafactor":  # one row and one column for each matrix (arXiv 1804.04235), float32
        return float(sum(4 * (sum(t.shape[-2:]) if len(t.shape) > 1 else t.count) for t in _trained_tensors(setup)))
    return 0.0


def _trained_tensors(setup: Setup) -> Iterator[Tensor]:
    a = setup.architecture
    if setup.adapter is None:
        yield from a.tensors
        return
    for tensor in a.tensors:
        if _is_saved(tensor, setup.adapter):
            yield tensor
        elif is_adapted(tensor, setup.adapter):
            yield Tensor(tensor.name, (setup.adapter.r, tensor.shape[1]))
            yield Tensor(tensor.name, (tensor.shape[0], setup.adapter.r))


# Activations

_GROUPS = (
    ("attention in", re.compile(r"(q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn|attention\.q|Attention\.[qkv])\b")),
    ("attention out", re.compile(r"(o_proj|attn\.c_proj|out_proj|attention\.dense|Attention\.o)\b")),
    ("mlp in", re.compile(r"(gate_proj|up_proj|gate_up_proj|c_fc|fc1|wi_0|wi_1|DenseReluDense\.wi|dense_h_to_4h)\b")),
    ("mlp out", re.compile(r"(down_proj|mlp\.c_proj|fc2|wo|dense_4h_to_h)\b")),
)  # fmt: skip


def _learning(setup: Setup) -> dict[str, list[Tensor]]:
    """The matrices of one layer, by what they read, of those that need their input for a gradient of their own."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in _GROUPS}
    seen: set[str] = set()
    for tensor in setup.architecture.linears:
        name = re.sub(r"\.\d+\.", ".N.", tensor.name)
        if name in seen or not tensor.in_layer:
            continue
        seen.add(name)
        if setup.adapter is not None and not is_adapted(tensor, setup.adapter):
            continue
        for group, pattern in _GROUPS:
            if pattern.search(tensor.module):
                found[group].append(tensor)
                break
    return found


def layer_activations(setup: Setup) -> float:
    """Bytes that one decoder layer keeps for its backward pass, for each position.

    The counting of arXiv 2205.05198, section 4.1, for the layers that really run: with llmkit's own, the residual
    stream twice, the inputs of the matrix products once, queries, keys and values, gate and up. Everything else is
    computed again. Eager attention adds the scores.
    """
    a, e = setup.architecture, setup.element
    learning = _learning(setup)
    kept = 2 * _norm(setup) + _attention(setup) + _mlp(setup)
    kept += _inputs(setup, learning)
    if a.qk_norm:
        width = a.queries + a.keys
        kept += e * width + 4 * (a.heads + a.kv_heads) if setup.all_lean else (4 + e) * width
    return kept


def _norm(setup: Setup) -> float:
    """Own: the input and a float32 for each position. Plain: the input in float32, and normed before the weight."""
    a, r = setup.architecture, setup.residual
    if setup.all_lean:
        return r * a.hidden + 4
    return 4 * a.hidden + (r * a.hidden if setup.adapter is None else 0) + 8


def _inputs(setup: Setup, learning: dict[str, list[Tensor]]) -> float:
    """Inputs of the matrix products that learn, and what their adapters keep.

    One tensor serves all that read it; mixed precision casts the float32 output of a norm once for each of them.
    """
    a, e = setup.architecture, setup.element
    width = {"attention in": a.hidden, "attention out": a.queries, "mlp in": a.hidden, "mlp out": a.inner * a.experts}
    total = 0.0
    for group, members in learning.items():
        copies = len(members) if setup.mixed and group in ("attention in", "mlp in") else min(len(members), 1)
        if group == "attention out" and not setup.cpu:
            copies = 0  # it is the output that the flash kernel keeps anyway
        total += copies * e * width[group]
        if setup.adapter is not None:
            each = setup.adapter.r * e
            if setup.adapter.lora_dropout:
                each += width[group] * (e if _own_adapters(setup) else e + 1)
            if setup.adapter.use_dora:
                each += 2 * e * max((t.shape[0] for t in members), default=0)
            total += len(members) * each
    return total


def _own_adapters(setup: Setup) -> bool:
    """training/lora_layer.py serves plain LoRA, over quantized layers too, without mixed precision."""
    adapter = setup.adapter
    return adapter is not None and not adapter.use_dora and not setup.mixed


def _attention(setup: Setup) -> float:
    a, e = setup.architecture, setup.element
    if setup.cpu and setup.flash:
        return e * (a.queries + 2 * a.keys)
    if setup.flash:  # keys and values repeated for each query head; the output; a float32 for each head
        return e * 4 * a.queries + 4 * a.heads
    scores = a.heads * setup.row_tokens * (4 + e + (1 + e if a.dropout else 0))
    return e * (a.queries + 2 * a.keys) + scores


def _mlp(setup: Setup) -> float:
    a, e = setup.architecture, setup.element
    inner = a.inner * a.experts
    routed = 2 * e * a.hidden * a.experts if a.all_experts > 1 else 0
    if a.swiglu and setup.all_lean:
        return 2 * e * inner + routed
    return (3 if a.gated else 2) * e * inner + routed


def activations(setup: Setup) -> float:
    """Bytes of activations at the end of a forward pass over ``part_tokens`` positions.

    With checkpointing: each layer's input, and all of one layer (arXiv 2205.05198, section 5). A sequence-to-sequence
    model's decoder attends twice; half of the positions are taken to be the encoder's.
    """
    a, tokens = setup.architecture, rounded_up(setup.part_tokens) if setup.part_tokens else 0
    layers = a.layers if not a.seq2seq else (a.layers + 1.5 * a.decoder_layers) / 2
    layer = layer_activations(setup)
    inside = layers * layer
    if setup.checkpointing:
        inside = layers * setup.residual * a.hidden + layer
    ends = 2 * setup.residual * a.hidden + 2 * setup.residual * a.head_dim + 3 * 8
    return tokens * (inside + ends)


def working_space(setup: Setup) -> float:
    """Bytes of the gradients that flow while the last layer's backward pass begins, when all activations are there."""
    a, tokens = setup.architecture, rounded_up(setup.part_tokens)
    flowing = setup.element * (3 * a.inner * a.experts + 2 * a.hidden)
    scores = 0.0
    if setup.cpu and setup.flash:
        scores = 3 * setup.element * a.heads * QUERY_BLOCK * setup.row_tokens
    return tokens * flowing + scores


def logits(setup: Setup) -> float:
    """Bytes around the output layer: a chunk of logits in float32, and the gradients that outlive it.

    Unfused (a model that changes its logits), the logits of every learned position are held four times.
    """
    a, e = setup.architecture, setup.residual
    tokens = rounded_up(setup.part_tokens)
    learned = tokens * setup.supervised
    if not setup.fused_loss:
        return a.vocabulary * (tokens * e + learned * (e + 4 + 4 + 4))
    rows = min(max(ROUND, CHUNK_ELEMENTS // a.vocabulary // ROUND * ROUND), rounded_up(math.ceil(learned)))
    chunk = rows * a.vocabulary * (e + 4 + (4 if setup.cpu and e < 4 else 0))
    return chunk + 3 * learned * a.hidden * e


def head_gradient(setup: Setup) -> float:
    """Bytes of the output layer's gradient, which the loss computes in the forward pass."""
    a = setup.architecture
    frozen = setup.adapter is not None and not {"lm_head", "embed_tokens"} & set(setup.adapter.modules_to_save)
    return 0.0 if frozen or not setup.fused_loss else float(a.vocabulary * a.hidden * BYTES[setup.dtype])


def cast_weights(setup: Setup) -> float:
    """Mixed precision multiplies with a copy of the weights in the lower type, kept until the backward pass."""
    if not setup.mixed:
        return 0.0
    size = sum(t.count for t in setup.architecture.linears) * BYTES[setup.mixed]
    return size / max(setup.architecture.layers, 1) if setup.checkpointing else float(size)


def kernels(setup: Setup) -> float:
    """Bytes of the kernels that oneDNN compiles for each shape of a product in a half type, and keeps.

    Each matrix has three products for every number of tokens (output, two gradients; adapted ones eight), the output layer
    three for every size of chunk, each block of attention six, for its strides follow the number of tokens too.
    """
    if not setup.cpu or setup.element == 4:
        return 0.0
    shapes = {t.shape for t in setup.architecture.linears if t.in_layer}
    products = len(shapes) * (3 if setup.adapter is None else 8)
    attention = 6 * setup.blocks if setup.flash else 0
    return min(KERNELS_KEPT, setup.totals * (products + 3) + attention) * KERNEL


# All together


def predict(setup: Setup, *, base: float, data: float = 0.0, host_base: float | None = None) -> Memory:
    """The terms of one process.

    ``base`` is what the process holds on the device before the model (on a CPU: the interpreter and its libraries);
    ``host_base`` the same beside a GPU; ``data`` the bytes of the token cache that are mapped into memory.
    """
    terms = [*_states(setup), *_passing(setup)]
    if setup.cpu:
        held = base + ON_THE_WAY
        terms.append(Term("process", held, held, "interpreter and libraries, before and beside the model", host=True))
    else:
        terms.append(Term("process", base, base, "CUDA context and the libraries' kernels"))
        host = host_base or 0.0
        terms.append(Term("process (host)", host, host, "interpreter and libraries", host=True))
        loading = base_weights(setup) / (setup.processes if setup.sharding.stage == 3 else 1)
        held = sum(term.at_peak for term in terms if term.host and term.name != "process (host)")
        more = max(0.0, loading - held)
        terms.append(
            Term("loading (host)", loading, more, "the weights, before they are moved to the device", host=True)
        )
    if data:
        terms.append(Term("data", data, data, "the token cache, mapped", host=True))
    return Memory(tuple(terms), setup.cpu)


def _states(setup: Setup) -> Iterator[Term]:
    """Weights, gradients and optimizer states. ZeRO divides by the processes: optimizer (1), gradients (2), weights (3)."""
    shard, trained = setup.sharding, _trained(setup)
    weights = base_weights(setup) + (adapter_parameters(setup.architecture, setup.adapter) * 4 if setup.adapter else 0)
    divided = weights / setup.processes if shard.stage == 3 else weights
    where = "of the weights, divided among the processes" if shard.stage == 3 else ""
    kind = setup.quantization or setup.dtype
    yield Term("weights", divided, divided, f"{kind} {where}".strip(), host=shard.parameters == "cpu")
    if shard.parameters == "nvme":  # held on disk; buffers stand for them (see _buffers)
        divided = 0.0
    yield _gradient_term(setup, trained)
    states = 12.0 * trained.count if shard.engine else optimizer_states(setup)
    if shard.stage:
        states /= setup.processes
    at_peak = 0.0 if shard.optimizer == "nvme" else states
    why = "float32 weights and two moments" if shard.engine else f"{setup.optimizer}, in the type of the weights"
    yield Term("optimizer", states, at_peak, why, host=shard.optimizer != "none")


def _gradient_term(setup: Setup, trained: _Trained) -> Term:
    """Without accumulation gradients appear while activations go: only what they are more counts.

    Not so in the C library's heap: what freed gradients leave lies between optimizer states, in pieces too small for
    activations. Tensors of 32 MB and more are mapped one by one, and given back.
    """
    shard = setup.sharding
    size = trained.size / (setup.processes if shard.stage >= 2 else 1)
    if setup.passes > 1 or shard.engine:
        return Term(
            "gradients", size, size, "they stay while passes add up" if setup.passes > 1 else "in DeepSpeed's buffers"
        )
    if setup.cpu:
        left = min(size, _on_the_heap(setup))
        return Term("gradients", size, left, "freed between two steps, but for what holes in the heap keep")
    head = head_gradient(setup)
    room = activations(setup) + logits(setup) + head  # what the backward pass frees on its way
    at_peak = max(0.0, size + _tied_extra(setup) - room)
    return Term("gradients", size, at_peak, "they take the place of activations, one pass a step")


def _on_the_heap(setup: Setup) -> float:
    """Bytes of the gradients that the C library's allocator serves from its heap (training/allocator.py)."""
    own = 4 if setup.adapter is not None else BYTES[setup.dtype]
    return float(sum(t.count * own for t in _trained_tensors(setup) if t.count * own < MAPPED))


def _tied_extra(setup: Setup) -> float:
    """A tied embedding gets its gradient from two sides, the second one dense."""
    return head_gradient(setup) if setup.architecture.tied else 0.0


def _passing(setup: Setup) -> Iterator[Term]:
    kept = activations(setup)
    how = "each layer's input, and one layer" if setup.checkpointing else "kept for the backward pass"
    yield Term("activations", kept, kept, f"{how}, {setup.part_tokens:,} tokens at once")
    outer = logits(setup) + head_gradient(setup)
    yield Term(
        "logits", outer, outer, "a chunk at a time, and the output layer's gradient" if setup.fused_loss else "whole"
    )
    if compiled := kernels(setup):
        yield Term("kernels", compiled, compiled, "compiled by oneDNN for each shape that it meets, and kept")
    space = working_space(setup) + cast_weights(setup) + _step_space(setup)
    yield Term(
        "working space", space, space, "gradients on their way" + (", weights in the lower type" if setup.mixed else "")
    )
    buffers, why = _buffers(setup)
    if buffers:
        yield Term("communication", buffers, buffers, why)


def _step_space(setup: Setup) -> float:
    """Temporaries of the optimizer beyond what the backward pass left room for: only the unfused one on a GPU has any."""
    if setup.optimizer == "adamw_torch" and not setup.cpu:
        return max(0.0, _trained(setup).size - activations(setup))
    return 0.0


def _buffers(setup: Setup) -> tuple[float, str]:
    shard, trained, e = setup.sharding, _trained(setup), BYTES[setup.dtype]
    if shard.stage == 0:
        return (trained.size, "DDP's gradient buckets") if setup.processes > 1 else (0.0, "")
    bucket = min(shard.reduce_bucket, trained.count) * e * (2 if shard.overlap else 1)
    if shard.stage < 3:
        return bucket + 4.0 * trained.count / setup.processes, "reduce bucket, and the step's float32 gradients"
    a = setup.architecture
    live = min(shard.max_live, a.parameters, 2 * a.layer_parameters + shard.prefetch_bucket + a.embedding) * e
    step = 0.0 if shard.fsdp else 4.0 * trained.count / setup.processes
    return bucket * (
        not shard.fsdp
    ) + live + step, "gathered layers, prefetched ones, reduce bucket, the step's float32 gradients"


# Disk


def checkpoint_bytes(setup: Setup) -> float:
    """One checkpoint: the trained weights (all, without an adapter) and the optimizer's states."""
    trained = _trained(setup)
    states = 12.0 * trained.count if setup.sharding.engine else optimizer_states(setup)
    return trained.size + states


def disk(setup: Setup, keep: int | None, checkpoints: int) -> float:
    """Checkpoints kept (and the one being written beside them), and the exported model."""
    held = checkpoints if keep is None else min(keep + 1, checkpoints)
    return held * checkpoint_bytes(setup) + _trained(setup).size


# Arithmetic


def flops_per_token(setup: Setup, length: int) -> float:
    """As modeling/flops.py, from shapes: 6 for a trained weight, 4 for a frozen one, 12·L·H·Q·T for attention."""
    a = setup.architecture
    total = 0.0
    for tensor in a.tensors:
        cost = tensor.count * (6 if setup.adapter is None or _is_saved(tensor, setup.adapter) else 4)
        if tensor.in_layer and len(tensor.shape) == 3:
            total += cost * a.experts / a.all_experts
        elif tensor.in_layer and len(tensor.shape) == 2:
            total += cost * (a.experts / a.all_experts if ".experts." in tensor.name else 1)
    head = a.embedding * (6 if setup.adapter is None else 4)
    total += head * setup.supervised
    if setup.adapter is not None:
        total += 6 * adapter_parameters(a, setup.adapter)
    layers = a.layers + 2 * a.decoder_layers
    return total + 12.0 * layers * a.queries * length


def rounded_up(count: float) -> int:
    return -(-math.ceil(count) // ROUND) * ROUND


def with_checkpointing(setup: Setup, on: bool) -> Setup:
    """The same run with or without recomputation."""
    return replace(setup, checkpointing=on)
