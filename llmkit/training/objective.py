"""The loss of a part of a batch: hidden states from the model, the output layer only where something is learned.

The output layer is taken out of the model's forward while it trains, so that ``logits`` of its output are the hidden
states that the layer would have seen; the loss applies it itself (see loss.py). Whether that gives what the model
gives (no soft cap or scale on the logits, rows that don't see each other) is found out by asking the model, not by
its name: :func:`choose` compares both on a few tokens before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkit.training.attention import row_attention
from llmkit.training.batching import Layout, Part, TokenRow
from llmkit.training.loss import linear_cross_entropy


class Objective:
    """``objective(model, part)`` → summed loss of the part's supervised tokens, a float32 scalar.

    ``flat`` says that several rows may lie end to end in one sequence; ``fused`` that the output layer is applied by
    the loss.
    """

    def __init__(
        self, head: nn.Module, *, flat: bool, fused: bool, by_rows: bool = False, seq2seq: bool = False,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.head, self.flat, self.fused, self.by_rows = head, flat, fused, by_rows
        self._apply = head.forward  # the layer itself, also while it is bypassed
        self._seq2seq, self._device = seq2seq, device

    def __call__(self, model: nn.Module, part: Part) -> Tensor:
        outputs = model(**self._inputs(part)).logits
        outputs = outputs.reshape(-1, outputs.shape[-1])
        where = torch.nonzero(part.targets != -100).squeeze(1).to(self._device)
        target = part.targets.to(self._device)[where]
        states = outputs.index_select(0, where)
        if self.fused:
            return linear_cross_entropy(states, self.head, target, self._apply)
        return nn.functional.cross_entropy(states.float(), target, reduction="sum")

    def _inputs(self, part: Part) -> dict[str, Any]:
        inputs = {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in part.inputs.items()}
        answers = inputs.pop("labels_for_decoder", None)
        if self._seq2seq:
            inputs["decoder_input_ids"] = answers
        else:
            inputs["use_cache"] = False
        return inputs

    @contextmanager
    def active(self, model: PreTrainedModel) -> Iterator[None]:
        """Attention by rows and a forward without the output layer, while the model trains."""
        with ExitStack() as stack:
            if self.by_rows:
                stack.enter_context(row_attention(model))
            if self.fused:
                stack.enter_context(_bypassed(self.head))
            yield


@contextmanager
def _bypassed(head: nn.Module) -> Iterator[None]:
    """The layer hands its input through when the model calls it."""
    had = head.__dict__.get("forward")
    head.forward = _identity
    try:
        yield
    finally:
        if had is None:
            del head.__dict__["forward"]
        else:
            head.forward = had


def _identity(states: Tensor) -> Tensor:
    return states


def choose(model: Any, *, seq2seq: bool, own_attention: bool, device: torch.device) -> tuple[Objective, list[str]]:
    """The leanest objective that gives what the model itself gives, and a line for each thing that it could not.

    ``model`` is a PreTrainedModel or PeftModel, already on ``device``. ``own_attention`` False keeps the attention
    that the recipe names.
    """
    bare: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    head = bare.get_output_embeddings()
    rows = _rows(int(bare.config.get_text_config().vocab_size))
    plain = Objective(head, flat=False, fused=False, seq2seq=seq2seq, device=device)
    reference = _ask(plain, model, bare, [rows[:2]], seq2seq)
    notes = []
    fused = head is not None and _agrees(
        Objective(head, flat=False, fused=True, seq2seq=seq2seq, device=device), model, bare, rows, reference, seq2seq
    )
    if not fused:
        notes.append("The output layer runs at every position: this model changes its logits after it.")
    if seq2seq:
        return Objective(head, flat=False, fused=fused, seq2seq=True, device=device), notes
    for by_rows in (True, False) if own_attention else (False,):
        flat = Objective(head, flat=True, fused=fused, by_rows=by_rows, device=device)
        if _agrees(flat, model, bare, rows, reference, seq2seq):
            return flat, notes
    notes.append("Rows are padded to the longest of a batch: this model cannot keep rows apart in one sequence.")
    return Objective(head, flat=False, fused=fused, device=device), notes


def _rows(vocabulary: int) -> list[TokenRow]:
    """Three rows of random tokens: a, b and c, with a and c of one length."""
    random = np.random.default_rng(0)
    made = [random.integers(0, vocabulary, length).astype(np.int32) for length in (9, 14, 9)]
    return [(name, ids, ids.copy()) for name, ids in zip("abc", made, strict=True)]


def _agrees(
    objective: Objective, model: Any, bare: PreTrainedModel, rows: list[TokenRow], reference: float, seq2seq: bool
) -> bool:
    """The loss is the model's own, and a row's does not depend on the row before it."""
    a, b, c = rows
    unlearned = [(name, ids, np.full_like(labels, -100)) for name, ids, labels in (a, c)]
    try:
        whole = _ask(objective, model, bare, [[a, b]], seq2seq)
        after_a = _ask(objective, model, bare, [[unlearned[0], b]], seq2seq)
        after_c = _ask(objective, model, bare, [[unlearned[1], b]], seq2seq)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return False  # the model does not take these inputs; the next objective in line is asked
    dtype = next(bare.parameters()).dtype
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    return abs(whole - reference) <= tolerance * abs(reference) and abs(after_a - after_c) <= 1e-6 * abs(after_a)


def _ask(objective: Objective, model: Any, bare: PreTrainedModel, batch: list[list[TokenRow]], seq2seq: bool) -> float:
    layout = Layout(flat=objective.flat, part_tokens=0, pad_id=0, seq2seq=seq2seq)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), objective.active(bare):
            return sum(float(objective(model, part)) for part in layout.batch(batch).parts)
    finally:
        model.train(was_training)
