"""Text to token ids, piece by piece: special tokens are looked up, the text between them is encoded as text.

A special token only comes from a template. The same letters in somebody's text stay text: every piece is encoded with
the splitting of special tokens switched off.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", "a", ";", "1")
Piece = tuple[int, str]
"""``(token id, "")`` for a special token, ``(-1, text)`` for text."""


class PieceEncoder:
    """Encodes pieces of text with a fast (Rust) or slow (Python) tokenizer.

    Tokenizers that put a space before what they are given (SentencePiece style) get pieces from the middle of a text
    behind an anchor, whose tokens are taken off again; whether that is needed is found out by trying.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        added = {token.content: (index, token) for index, token in self._tokenizer.added_tokens_decoder.items()}
        self.specials: dict[str, int] = {text: index for text, (index, token) in added.items() if token.special}
        for text in self._tokenizer.all_special_tokens:
            if text not in self.specials:
                index: Any = self._tokenizer.convert_tokens_to_ids(text)
                if index is None:
                    raise DataError(f"the tokenizer names {text!r} as a special token, but has no such token.")
                self.specials[text] = int(index)
        longest_first = sorted(self.specials, key=lambda text: (-len(text), text))
        patterns = [_pattern(text, added[text][1] if text in added else None) for text in longest_first]
        self._split = re.compile("|".join(patterns)) if patterns else None
        self.literal = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @property
    def _shared(self) -> Any:
        """The Rust tokenizer itself, for texts without the letters of a special token; None where it cannot be used.

        Asked anew each time: a call of the tokenizer by somebody else may have left a truncation in it.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        backend = self._tokenizer.backend_tokenizer
        return backend if backend.truncation is None and backend.padding is None else None

    @cached_property
    def _backend(self) -> Any:
        """A copy of the Rust tokenizer that takes special tokens for text and never truncates; None for a slow one."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        backend = copy.deepcopy(self._tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend

    def split(self, text: str) -> list[Piece]:
        """Cut a rendered text at its special tokens, in order, empty text left out."""
        if self._split is None:
            return [(-1, text)] if text else []
        pieces: list[Piece] = []
        end = 0
        for match in self._split.finditer(text):
            if match.start() > end:
                pieces.append((-1, text[end : match.start()]))
            found = match.group()
            pieces.append((self.specials[found if found in self.specials else found.strip()], ""))
            end = match.end()
        if end < len(text):
            pieces.append((-1, text[end:]))
        return pieces

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts, without bos or eos."""
        if not texts:
            return []
        if not getattr(self._tokenizer, "is_fast", False):
            encode = self._tokenizer.encode
            return [list(encode(text, add_special_tokens=False, split_special_tokens=True)) for text in texts]
        backend = self._shared
        if backend is None or (self.literal is not None and any(map(self.literal.search, texts))):
            backend = self._backend
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_inner(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of pieces from the middle of a text, right after other tokens. Raises DataError when that is impossible."""
        if self.seamless:
            return self.encode(texts)
        done: dict[int, list[int]] = {}
        for anchor in _ANCHORS:
            left = [index for index in range(len(texts)) if index not in done]
            before = self.encode([anchor])[0]
            for index, ids in zip(left, self.encode([anchor + texts[index] for index in left]), strict=True):
                if ids[: len(before)] == before:
                    done[index] = ids[len(before) :]
        for index, text in enumerate(texts):
            if index not in done:
                raise DataError(
                    f"this tokenizer cannot continue a text at {text[:40]!r}: no anchor stays apart from it."
                )
        return [done[index] for index in range(len(texts))]

    @cached_property
    def seamless(self) -> bool:
        """Whether a piece gets the same ids alone as in the middle of a text."""
        head, tail, both = self.encode(["a\n", "b c", "a\nb c"])
        return head + tail == both

    @cached_property
    def inner_after_special(self) -> bool:
        """Whether text right after a special token counts as the middle of a text, as in encoding the whole at once."""
        if self.seamless or not self.specials:
            return False
        text, index = min(self.specials.items(), key=lambda item: item[1])
        whole = list(self._tokenizer.encode(f"{text}b c", add_special_tokens=False))
        return whole != [index, *self.encode(["b c"])[0]]

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer itself puts before and after a plain text, e.g. ``((bos,), ())`` or ``((), (eos,))``."""
        plain = self.encode(["a"])[0]
        full = list(self._tokenizer.encode("a", add_special_tokens=True))
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start]), tuple(full[start + len(plain) :])
        raise DataError("this tokenizer changes a text when it adds its special tokens.")

    def identity(self) -> Iterable[str]:
        """What decides about ids, for a fingerprint: the whole tokenizer."""
        if getattr(self._tokenizer, "is_fast", False):
            text = self._tokenizer.backend_tokenizer.to_str()
            # what comes before is the truncation and padding of the last call, which is no part of the tokenizer
            yield text[text.index('"added_tokens"') :]
        else:
            yield type(self._tokenizer).__name__
            yield repr(sorted(self._tokenizer.get_vocab().items()))
            yield repr(sorted((k, repr(v)) for k, v in self._tokenizer.init_kwargs.items() if k != "name_or_path"))
        yield repr(sorted(self.specials.items()))


def _pattern(text: str, token: Any) -> str:
    """A special token that eats the blanks beside it (``lstrip``, ``rstrip``) does so here too."""
    left = r"\s*" if token is not None and token.lstrip else ""
    right = r"\s*" if token is not None and token.rstrip else ""
    return left + re.escape(text) + right
