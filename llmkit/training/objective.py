"""The loss of a part of a batch: hidden states from the model, the output layer only where something is learned.

The output layer is taken out of the model's forward while it trains, so that ``logits`` of its output are the hidden
states that the layer would have seen; the loss applies it itself (see loss.py). Whether that gives what the model
gives (no soft cap or scale on the logits, rows that don't see each other) is found out by asking the model, not by
its name: :func:`choose` compares both on a few tokens before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkit.errors import UsageError
from llmkit.training.attention import row_attention
from llmkit.training.batching import Layout, Part, TokenRow
from llmkit.training.loss import linear_cross_entropy


class Objective:
    """``objective(model, part)`` → summed loss of the part's supervised tokens, a float32 scalar.

    ``flat`` says that several rows may lie end to end in one sequence; ``fused`` that the output layer is applied by
    the loss. ``inside`` computes the loss in the place of the output layer, within the model's forward: where weights
    are divided among processes, that is when the layer has its own. ``shift`` turns the answers of a
    sequence-to-sequence model into what its decoder reads.
    """

    def __init__(
        self, head: nn.Module, *, flat: bool, fused: bool, by_rows: bool = False, inside: bool = False,
        device: torch.device, shift: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.head, self.flat, self.fused, self.by_rows = head, flat, fused, by_rows
        self.inside = inside and fused
        self._apply = head.forward  # the layer itself, also while it is bypassed
        self._shift, self._device = shift, device
        self._wanted: tuple[Tensor, Tensor] | None = None

    def within(self, model: Any, device: torch.device) -> Objective:
        """The same for ``model``, whose weights are divided among processes; this one was chosen for its small twin."""
        bare: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
        head = bare.get_output_embeddings()
        shift = _decoder_shift(bare) if self._shift is not None else None
        return Objective(
            head, flat=self.flat, fused=self.fused, by_rows=self.by_rows, inside=True, device=device, shift=shift
        )

    def __call__(self, model: nn.Module, part: Part) -> Tensor:
        where = torch.nonzero(part.targets != -100).squeeze(1).to(self._device)
        target = part.targets.to(self._device)[where]
        if self.inside:
            self._wanted = (where, target)
            loss: Tensor = model(**self._inputs(part)).logits
            return loss
        outputs = model(**self._inputs(part)).logits
        states = outputs.reshape(-1, outputs.shape[-1]).index_select(0, where)
        if self.fused:
            return linear_cross_entropy(states, self.head, target, self._apply)
        return nn.functional.cross_entropy(states.float(), target, reduction="sum")

    def _loss_of_states(self, states: Tensor) -> Tensor:
        """Stands for the output layer: the loss of the part that is on its way through the model."""
        assert self._wanted is not None
        where, target = self._wanted
        chosen = states.reshape(-1, states.shape[-1]).index_select(0, where)
        return linear_cross_entropy(chosen, self.head, target, self._apply)

    def _inputs(self, part: Part) -> dict[str, Any]:
        inputs = {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in part.inputs.items()}
        if self._shift is not None:
            inputs["decoder_input_ids"] = self._shift(inputs.pop("labels_for_decoder"))
        return inputs | {"use_cache": False}

    @contextmanager
    def active(self, model: PreTrainedModel) -> Iterator[None]:
        """Attention by rows and a forward without the output layer, while the model trains."""
        with ExitStack() as stack:
            if self.by_rows:
                stack.enter_context(row_attention(model))
            if self.fused:
                stack.enter_context(_bypassed(self.head, self._loss_of_states if self.inside else _identity))
            yield


@contextmanager
def _bypassed(head: nn.Module, instead: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``instead`` is what the model calls for its output layer."""
    had = head.__dict__.get("forward")
    head.forward = instead
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
    shift = _decoder_shift(bare) if seq2seq else None
    plain = Objective(head, flat=False, fused=False, shift=shift, device=device)
    reference = _ask(plain, model, bare, [rows[:2]], seq2seq)
    notes = []
    lean = Objective(head, flat=False, fused=True, shift=shift, device=device)
    fused = _hands_through(plain, model, rows, seq2seq) and _agrees(lean, model, bare, rows, reference, seq2seq)
    if not fused:
        notes.append("The output layer runs at every position: this model changes its logits after it.")
    if seq2seq:
        return lean if fused else plain, notes
    for by_rows in (True, False) if own_attention else (False,):
        flat = Objective(head, flat=True, fused=fused, by_rows=by_rows, device=device)
        if _agrees(flat, model, bare, rows, reference, seq2seq):
            return flat, notes
    notes.append("Rows are padded to the longest of a batch: this model cannot keep rows apart in one sequence.")
    return Objective(head, flat=False, fused=fused, device=device), notes


def _decoder_shift(model: Any) -> Callable[[Tensor], Tensor]:
    """What the decoder reads for given answers ``[rows, longest]``: each token is predicted from those before it."""
    shift: Callable[[Tensor], Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise UsageError(f"{type(model).__name__} does not say what its decoder reads, so llmkit cannot train it.")
    return shift


def _hands_through(plain: Objective, model: Any, rows: list[TokenRow], seq2seq: bool) -> bool:
    """The model gives what its output layer gives, large values too: no soft cap or scale comes after it.

    Asked with values of our own: the logits of a model that was just initialised are too small to show a cap.
    """
    layout = Layout(flat=False, part_tokens=0, pad_id=0, seq2seq=seq2seq)
    (part,) = layout.batch([rows[:2]]).parts
    given: list[Tensor] = []

    def made_up(states: Tensor) -> Tensor:
        values = torch.linspace(-200, 200, 64, device=states.device).to(states.dtype)
        given.append(values.expand(*states.shape[:-1], -1))
        return given[-1].clone()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _bypassed(plain.head, made_up):
            found = model(**plain._inputs(part)).logits
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return False
    finally:
        model.train(was_training)
    return len(given) == 1 and found.shape == given[0].shape and torch.equal(found.float(), given[0].float())


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
    exact = next(bare.parameters()).dtype == torch.float32 and not getattr(bare, "is_quantized", False)
    tolerance = 1e-3 if exact else 2e-2
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
