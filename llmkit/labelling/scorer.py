"""Log-probabilities of labels behind prompts, with a transformers model.

Behind each prompt the labels stand as one tree of tokens (tree attention, as in Miao et al., 2024: SpecInfer): a token
sees the prompt, its ancestors and itself, at the position that it has in its label. One forward scores all labels, and
what all prompts begin with is computed once. A model that does not follow such a mask (it is tried at the first
prompt) gets every label on its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmkit.errors import DataError, UsageError
from llmkit.labelling.tree import ROOT, LabelTree
from llmkit.modeling.load import plain_attention

LOGITS_BYTES = 384 * 2**20
BATCH_TOKENS = 4096
SHORTEST_PREFIX = 16
"""A shared beginning shorter than this is not worth a forward of its own."""


class TreeScorer:
    """Scores one set of labels with one causal model. ``tokens`` counts those that went through the model."""

    def __init__(self, model: Any, labels: Sequence[Sequence[int]], *, batch_tokens: int = BATCH_TOKENS) -> None:
        if model.config.is_encoder_decoder:
            raise UsageError("labels are scored with causal models; an encoder-decoder model needs `method: generate`")
        self.model = model
        self.labels = [list(map(int, label)) for label in labels]
        self.tree = LabelTree.of(self.labels)
        self.tokens = 0
        self.notes: list[str] = []
        self._batch_tokens = batch_tokens
        self._tree_works: bool | None = None
        self._device = model.device
        self._vocabulary = int(model.get_output_embeddings().weight.shape[0])
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._room = int(longest) - int(self.tree.lengths.max()) if longest else None

    def check(self, prompt: Sequence[int]) -> None:
        """Raises DataError for a prompt that has no tokens or leaves no room for a label."""
        if not len(prompt):
            raise DataError("the prompt has no tokens")
        if self._room is not None and len(prompt) > self._room:
            raise DataError(f"the prompt has {len(prompt)} tokens; with the labels there is room for {self._room}")

    def nodes(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Natural log-probabilities [prompts, nodes] of the tree's tokens, each given the prompt and its ancestors."""
        made = np.empty((len(prompts), len(self.tree.tokens)))
        if not len(prompts):
            return made
        with torch.inference_mode(), plain_attention(self.model):
            if self._tree_works is None:
                self._tree_works = self._try(prompts[0])
            if not self._tree_works:
                for row, prompt in enumerate(prompts):
                    made[row] = self._one_by_one(prompt)
                return made
            prefix, cache = self._prefix(prompts)
            for rows in self._batches([len(prompt) - prefix for prompt in prompts]):
                made[rows] = self._forward([prompts[row] for row in rows], prefix, cache)
        return made

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of prompts of like length, within the limits of tokens and of memory for the logits."""
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        most = max(1, LOGITS_BYTES // ((self.tree.inner + 1) * self._vocabulary * 4))
        start = 0
        while start < len(order):
            wide = lengths[order[start]] + self.tree.inner
            size = max(1, min(most, self._batch_tokens // wide))
            yield order[start : start + size]
            start += size

    def _prefix(self, prompts: Sequence[Sequence[int]]) -> tuple[int, Any]:
        """How many tokens all prompts begin with, and the cache of keys and values of these."""
        low, high = min(map(list, prompts)), max(map(list, prompts))
        shared = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        shared = min(shared, min(map(len, prompts)) - 1)  # the last token of a prompt gives the first logits
        if len(prompts) < 2 or shared < SHORTEST_PREFIX:
            return 0, None
        ids = torch.tensor([list(prompts[0][:shared])], device=self._device)
        self.tokens += shared
        return shared, self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def _forward(self, prompts: Sequence[Sequence[int]], prefix: int, cache: Any) -> NDArray[np.float64]:
        """One batch: prompts padded on the left, behind each the inner nodes of the tree."""
        inner, rows = self.tree.inner, len(prompts)
        parts = [list(prompt[prefix:]) for prompt in prompts]
        longest = max(map(len, parts))
        labels = self.tree.tokens[:inner].tolist()
        ids = torch.tensor([[0] * (longest - len(part)) + part + labels for part in parts], device=self._device)
        starts = torch.tensor([longest - len(part) for part in parts], device=self._device)
        mask = self._mask(starts, longest, prefix)
        places = (torch.arange(longest, device=self._device) - starts[:, None]).clamp_min(0)
        depths = torch.as_tensor(self.tree.depths[:inner], device=self._device)
        positions = prefix + torch.cat([places, (longest - starts)[:, None] + depths], dim=1)
        inputs: dict[str, Any] = {}
        if cache is not None:
            inputs["past_key_values"] = copy.deepcopy(cache)
            inputs["past_key_values"].batch_repeat_interleave(rows)
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=cache is not None,
            logits_to_keep=inner + 1, **inputs,
        )  # fmt: skip
        self.tokens += sum(map(len, parts)) + inner * rows
        return self._gather(out.logits)

    def _mask(self, starts: torch.Tensor, longest: int, prefix: int) -> torch.Tensor:
        """What is added to attention's scores [rows, 1, queries, prefix + queries]: 0 where a token sees another."""
        inner, rows = self.tree.inner, len(starts)
        size = longest + inner
        sees = torch.zeros(size, size, dtype=torch.bool, device=self._device)
        sees[:longest, :longest] = torch.ones(longest, longest, dtype=torch.bool, device=self._device).tril()
        sees[longest:, :longest] = True
        sees[longest:, longest:] = torch.as_tensor(self.tree.paths[:inner, :inner], device=self._device)
        padding = torch.arange(size, device=self._device)[None] < starts[:, None]  # [rows, keys]
        each = sees[None] & ~padding[:, None, :]
        each |= torch.eye(size, dtype=torch.bool, device=self._device)  # a padded query has to see something
        whole = torch.cat([torch.ones(rows, size, prefix, dtype=torch.bool, device=self._device), each], dim=2)
        dtype = self.model.dtype
        zero = torch.zeros((), dtype=dtype, device=self._device)
        return torch.where(whole, zero, torch.finfo(dtype).min)[:, None]

    def _gather(self, logits: torch.Tensor) -> NDArray[np.float64]:
        """From logits [rows, 1 + inner, vocabulary], first those behind the prompt, to the nodes' log-probabilities."""
        parents = torch.as_tensor(self.tree.parents + 1, device=self._device)
        tokens = torch.as_tensor(self.tree.tokens, device=self._device)
        made = []
        for row in logits:  # one at a time: float32 copies of all would be the largest thing in memory
            scores = row.float()
            made.append(scores[parents, tokens] - scores.logsumexp(-1)[parents])
        found: NDArray[np.float64] = torch.stack(made).double().cpu().numpy()
        return found

    def _one_by_one(self, prompt: Sequence[int]) -> NDArray[np.float64]:
        """The same [nodes] by a plain forward for every label."""
        found = np.zeros(len(self.tree.tokens))
        for label, end in zip(self.labels, self.tree.ends, strict=True):
            ids = torch.tensor([[*prompt, *label[:-1]]], device=self._device)
            scores = self.model(input_ids=ids, logits_to_keep=len(label)).logits[0].float().log_softmax(-1)
            taken = scores.gather(-1, torch.tensor(label, device=self._device)[:, None])[:, 0].tolist()
            self.tokens += ids.shape[1]
            node = int(end)
            for value in reversed(taken):
                found[node] = value
                node = int(self.tree.parents[node])
            assert node == ROOT
        return found

    def _try(self, prompt: Sequence[int]) -> bool:
        """Whether the tree gives what the labels alone give, up to the rounding of the model's type."""
        before = self.tokens
        try:
            tree = self._forward([prompt], 0, None)[0]
        except (RuntimeError, TypeError, ValueError) as error:
            self.notes.append(f"labels are scored one by one: the model takes no tree of them ({error})"[:200])
            return False
        alone = self._one_by_one(prompt)
        self.tokens = before
        slack = 2e-3 if self.model.dtype == torch.float32 else 5e-2
        if np.all(np.abs(tree - alone) <= slack * (1 + np.abs(alone))):
            return True
        self.notes.append("labels are scored one by one: as a tree they would get other probabilities from this model")
        return False
