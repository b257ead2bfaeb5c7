"""Token ids to vectors: the forward passes of a job, padding-free where the model allows it.

Whether it does is found out when the model is loaded, by comparing a few rows with transformers' own forward of each row
alone; such a comparison, not the model's name, also finds where a model's positions begin. A model that fails it (T5's
position biases, for one) gets batches of rows of like lengths, padded on the right with a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmkit.inference.embedding.batches import Family, Ids, cut, distinct, families
from llmkit.inference.embedding.flat import NAME, KeysValues, Layout, groups_of
from llmkit.inference.embedding.heads import Head
from llmkit.inference.embedding.pooling import pool
from llmkit.modeling.load import embedding_rows
from llmkit.training.shapes import rounded_up

CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 16384
_PAD_MULTIPLE = 8
_PROBE_LENGTHS = (13, 13, 9, 5, 2)
_PROBE_SHARED = 8
_CLOSE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


class Encoder:
    """A loaded model with its pooling. ``tokens`` counts those that went through the model.

    ``modes`` are pooling modes (see ``pooling``), ``heads`` what comes behind them, ``skip`` how many tokens at the
    beginning of each row the pooling leaves out (a prompt's, where the model wants that).
    """

    def __init__(
        self, model: PreTrainedModel, modes: Sequence[str], heads: Sequence[Head] = (), *, skip: int = 0,
        batch_tokens: int | None = None, padding_free: bool = True, share_prefix: bool = True,
    ) -> None:  # fmt: skip
        self.model, self._modes, self._heads, self._skip = model, tuple(modes), tuple(heads), skip
        on_gpu = model.device.type != "cpu"
        self._budget = batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)
        taken = inspect.signature(type(model).forward).parameters
        self._no_cache = {"use_cache": False} if "use_cache" in taken else {}
        self.first_position: int | None = None
        self.share_prefix = False
        self.tokens = 0
        self._attention = ""
        if padding_free:
            self._probe(share_prefix)
        self._longest_flat = _smallest_window(model.config)

    @property
    def padding_free(self) -> bool:
        return self.first_position is not None

    @torch.inference_mode()
    def encode(self, sequences: Sequence[Ids]) -> np.ndarray:
        """Vectors ``[rows, dim]``, float32, of token ids ``[tokens]`` each; equal ones are computed once."""
        unique, which = distinct(sequences)
        vectors: list[Tensor | None] = [None] * len(unique)
        flat = [row for row, ids in enumerate(unique) if self.padding_free and len(ids) <= self._longest_flat]
        self._encode_flat(unique, flat, vectors)
        padded = sorted(set(range(len(unique))) - set(flat))
        for batch in cut([len(unique[row]) for row in padded], self._budget, padded=True):
            rows = [padded[i] for i in batch]
            for row, vector in zip(rows, self._padded([unique[row] for row in rows]), strict=True):
                vectors[row] = vector
        if not unique:
            return np.zeros((0, 0), dtype=np.float32)
        stacked = torch.stack([vector for vector in vectors if vector is not None])
        for head in self._heads:
            stacked = head(stacked)
        found: np.ndarray = stacked.float().cpu().numpy()[which]
        return found

    def _encode_flat(self, unique: list[Ids], rows: list[int], vectors: list[Tensor | None]) -> None:
        chosen = [unique[row] for row in rows]
        if not chosen:
            return
        for family in families(chosen) if self.share_prefix else [Family(tuple(range(len(chosen))), 0)]:
            members = [chosen[i] for i in family.rows]
            prefix, states = self._prefix(members[0][: family.shared]) if family.shared else (None, None)
            rest = [ids[family.shared :] for ids in members]
            for batch in cut([len(ids) for ids in rest], self._budget):
                pooled = self._flat([rest[i] for i in batch], family.shared, prefix, states)
                for i, vector in zip(batch, pooled, strict=True):
                    vectors[rows[family.rows[i]]] = vector

    def _prefix(self, ids: Ids) -> tuple[dict[int, KeysValues], Tensor]:
        """Keys and values of every layer, and the states ``[tokens, dim]``, of a beginning that many rows share."""
        keep: dict[int, KeysValues] = {}
        states = self._states([ids], 0, Layout(groups_of([len(ids)]), keep=keep))[: len(ids)]
        return {layer: (k[: len(ids)], v[: len(ids)]) for layer, (k, v) in keep.items()}, states

    def _flat(
        self, rows: Sequence[Ids], shared: int, prefix: dict[int, KeysValues] | None, states: Tensor | None
    ) -> list[Tensor]:
        """One vector a row; the rows are sorted by length and stand behind ``shared`` tokens."""
        groups = groups_of([len(ids) for ids in rows])
        hidden = self._states(rows, shared, Layout(groups, prefix or {}))
        found: list[Tensor] = []
        for group in groups:
            part = hidden[group.part].unflatten(0, (group.rows, group.length))
            found += pool(part, self._modes, shared=states, skip=self._skip)
        return found

    def _states(self, rows: Sequence[Ids], shared: int, layout: Layout) -> Tensor:
        """States of the last layer ``[tokens, dim]``, a few rows of nonsense behind them (see ``rounded_up``)."""
        count = sum(map(len, rows))
        size = rounded_up(count)
        ids = np.zeros(size, dtype=np.int64)
        positions = np.zeros(size, dtype=np.int64)
        ids[:count] = np.concatenate(rows)
        positions[:count] = np.concatenate([np.arange(shared, shared + len(row)) for row in rows])
        positions += self.first_position or 0
        self.tokens += count
        device = self.model.device
        self._attend_by(NAME)
        hidden: Tensor = self.model(
            input_ids=torch.from_numpy(ids)[None].to(device), position_ids=torch.from_numpy(positions)[None].to(device),
            layout=layout, **self._no_cache,
        ).last_hidden_state[0]  # fmt: skip
        return hidden

    def _padded(self, rows: Sequence[Ids]) -> list[Tensor]:
        """One vector a row, by transformers' own attention with a mask."""
        longest = -(-max(map(len, rows)) // _PAD_MULTIPLE) * _PAD_MULTIPLE
        longest = min(longest, max(_positions(self.model.config), max(map(len, rows))))
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        ids[:] = self.model.config.get_text_config().pad_token_id or 0
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        self.tokens += int(mask.sum())
        hidden = self._own_forward(ids, mask)
        return [pool(hidden[i : i + 1, : len(row)], self._modes, skip=self._skip)[0] for i, row in enumerate(rows)]

    def _attend_by(self, name: str) -> None:
        if self._attention != name:
            self.model.set_attn_implementation(name)
            self._attention = name

    def _own_forward(self, ids: np.ndarray, mask: np.ndarray) -> Tensor:
        device = self.model.device
        self._attend_by("sdpa" if getattr(self.model, "_supports_sdpa", True) else "eager")
        hidden: Tensor = self.model(
            input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device),
            **self._no_cache,
        ).last_hidden_state  # fmt: skip
        return hidden

    @torch.inference_mode()
    def _probe(self, share_prefix: bool) -> None:
        """Find out whether flat rows have the states that each has alone, and whether a shared beginning keeps them."""
        rows = _probe_rows(embedding_rows(self.model))
        alone = [
            self._own_forward(row[None].astype(np.int64), np.ones((1, len(row)), dtype=np.int64))[0] for row in rows
        ]
        padding = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        for first in dict.fromkeys([0, (padding if isinstance(padding, int) else 1) + 1]):
            self.first_position = first
            if self._same(rows, alone, 0):
                self.share_prefix = share_prefix and self._same(rows[:3], alone[:3], _PROBE_SHARED)
                break
            self.first_position = None
        self.tokens = 0

    def _same(self, rows: list[Ids], alone: list[Tensor], shared: int) -> bool:
        """Are the flat states those of the rows alone, the first ``shared`` tokens coming from another forward?"""
        try:
            prefix = self._prefix(rows[0][:shared])[0] if shared else {}
            rest = [row[shared:] for row in rows]
            hidden = self._states(rest, shared, Layout(groups_of([len(row) for row in rest]), prefix))
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
            return False  # a forward or an attention that knows no such thing; each has its own way to say so
        expected = torch.cat([states[shared:] for states in alone]).float()
        found = hidden[: expected.shape[0]].float()
        return bool((found - expected).abs().max() <= _CLOSE[self.model.dtype] * expected.abs().max())


def _probe_rows(vocabulary: int) -> list[Ids]:
    """Rows of ordinary tokens, the first three with the same beginning; always the same ones."""
    drawn = np.random.default_rng(0)
    low = min(200, vocabulary // 2)
    rows = [drawn.integers(low, vocabulary, size).astype(np.int32) for size in _PROBE_LENGTHS]
    for row in rows[1:3]:
        row[:_PROBE_SHARED] = rows[0][:_PROBE_SHARED]
    return rows


def _positions(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 0)


def _smallest_window(config: Any) -> int:
    """Rows up to this length are seen whole by every layer: layers with a sliding window are like the others there."""
    text = config.get_text_config()
    windows = [getattr(text, "sliding_window", None), getattr(text, "attention_window", None)]
    local = getattr(text, "local_attention", None)
    windows.append(local // 2 if isinstance(local, int) and local > 0 else None)
    return min((w for w in windows if isinstance(w, int) and w > 0), default=2**31)
