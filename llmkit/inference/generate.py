"""Answer prompts with a transformers model: greedy or sampled, one by one or in a batch, as text or as a stream.

The loop is our own, so that prompts are the renderer's ids, one answer and its stream are the same code, a batch of
one has no padding and no mask, and a model in the middle of its training can be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.modeling.load import open_model, plain_attention
from llmkit.modeling.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmkit.data.render import Renderer

Message = dict[str, Any]
Prompt = Sequence[Message] | Sequence[int]
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """``text`` without special tokens; ``ids`` with the stop token where one came; ``finished`` is False for a cut answer."""

    text: str
    ids: list[int]
    prompt_tokens: int
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 takes the likeliest; ``top_p`` keeps the likeliest of that total share."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"max_new_tokens must be at least 1, temperature at least 0 and top_p in (0, 1]; "
                f"given {self.max_new_tokens}, {self.temperature}, {self.top_p}"
            )


class Generator:
    """Answers with a model, its tokenizer and the renderer that made its training data (so prompts are the same).

    ``model`` is a transformers or PEFT model, causal or encoder-decoder, on any device; its mode and its attention
    are put back after every answer, so that a model in training can be tried out.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.renderer = renderer
        bare: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
        self._bare = bare
        self.seq2seq = bool(bare.config.is_encoder_decoder)
        self.stop_ids = frozenset(renderer.stop_ids)
        self._pad = int(tokenizer.pad_token_id or 0)

    @property
    def context(self) -> int | None:
        """Positions that the model has room for, prompt and answer together; None where it has no such limit."""
        limit = getattr(self._bare.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def prompt_ids(self, prompt: Prompt | str) -> list[int]:
        """Token ids of messages (chat template), of a text to be continued, or of ids given as they are."""
        if isinstance(prompt, str):
            return list(self.renderer.completion_prompt(prompt))
        if prompt and isinstance(prompt[0], Mapping):
            return list(self.renderer.prompt([dict(message) for message in prompt]))  # type: ignore[arg-type]
        return [int(i) for i in prompt]  # type: ignore[arg-type]

    def answer(self, prompt: Prompt | str, *, on_text: OnText | None = None, **sampling: Any) -> str:
        """Text of one answer; ``sampling`` are the fields of :class:`Sampling`. ``on_text`` gets each new piece of text.

        Raises DataError for a prompt that the model has no room for.
        """
        return self.generate(prompt, Sampling(**sampling), on_text=on_text).text

    def answer_batch(self, prompts: Sequence[Prompt | str], *, batch_size: int = 1, **sampling: Any) -> list[str]:
        """Answers in the order of ``prompts``.

        With ``batch_size`` 1 they are exactly those of :meth:`answer`. More are padded on the left and run together:
        quicker, and the same up to rounding, which may turn a choice between two equally likely tokens.
        """
        settings = Sampling(**sampling)
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        texts = [""] * len(ids)
        for start in range(0, len(order), max(1, batch_size)):
            chosen = order[start : start + max(1, batch_size)]
            for index, made in zip(chosen, self._run([ids[i] for i in chosen], settings, None), strict=True):
                texts[index] = made.text
        return texts

    def generate(self, prompt: Prompt | str, settings: Sampling, *, on_text: OnText | None = None) -> Answer:
        """One answer with its ids; see :meth:`answer`."""
        return self._run([self.prompt_ids(prompt)], settings, on_text)[0]

    def _run(self, prompts: list[list[int]], settings: Sampling, on_text: OnText | None) -> list[Answer]:
        self._check_room(prompts)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), plain_attention(self._bare):
                made = self._loop(prompts, settings, on_text)
        finally:
            self.model.train(was_training)
        return [
            Answer(self._text(ids), ids, len(prompt), bool(ids) and ids[-1] in self.stop_ids)
            for prompt, ids in zip(prompts, made, strict=True)
        ]

    def _loop(self, prompts: list[list[int]], settings: Sampling, on_text: OnText | None) -> list[list[int]]:
        """Token by token with a cache of keys and values. ``prompts`` are [n] lists of ids, so is what comes back."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device=device).manual_seed(settings.seed)
        step = self._seq2seq_step(prompts, device) if self.seq2seq else self._causal_step(prompts, device)
        made: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        stream = _Stream(self._text, on_text) if on_text else None
        chosen: torch.Tensor | None = None
        for _ in range(self._budget(prompts, settings)):
            chosen = _choose(step(chosen), settings, generator)
            for row in sorted(running):
                token = int(chosen[row])
                made[row].append(token)
                if token in self.stop_ids:
                    running.discard(row)
            if stream:
                stream.show(made[0])
            if not running:
                break
        if stream:
            stream.end(made[0])
        return made

    def _causal_step(
        self, prompts: list[list[int]], device: torch.device
    ) -> Callable[[torch.Tensor | None], torch.Tensor]:
        """A function from the tokens chosen last [n] (None at first) to the next logits [n, vocabulary]."""
        longest = max(map(len, prompts))
        padded = len(prompts) > 1 and any(len(prompt) < longest for prompt in prompts)
        rows = [[self._pad] * (longest - len(prompt)) + prompt for prompt in prompts]
        ids = torch.tensor(rows, device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        state: dict[str, Any] = {"cache": None, "mask": mask, "position": mask.sum(1, keepdim=True)}

        def step(chosen: torch.Tensor | None) -> torch.Tensor:
            inputs: dict[str, Any] = {"use_cache": True, "past_key_values": state["cache"], "logits_to_keep": 1}
            if chosen is None:
                inputs["input_ids"] = ids
                if padded:
                    inputs["position_ids"] = (state["mask"].cumsum(1) - 1).clamp_min(0)
            else:
                inputs["input_ids"] = chosen.unsqueeze(1)
                if padded:
                    inputs["position_ids"] = state["position"]
                    state["position"] = state["position"] + 1
                    state["mask"] = torch.cat([state["mask"], torch.ones_like(state["mask"][:, :1])], dim=1)
            if padded:
                inputs["attention_mask"] = state["mask"]
            out = self.model(**inputs)
            state["cache"] = out.past_key_values
            return out.logits[:, -1]  # type: ignore[no-any-return]

        return step

    def _seq2seq_step(
        self, prompts: list[list[int]], device: torch.device
    ) -> Callable[[torch.Tensor | None], torch.Tensor]:
        longest = max(map(len, prompts))
        rows = [prompt + [self._pad] * (longest - len(prompt)) for prompt in prompts]
        ids = torch.tensor(rows, device=device)
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts], device=device)
        encoded = self._bare.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
        start = self._bare.config.decoder_start_token_id
        first = torch.full((len(prompts),), self._pad if start is None else int(start), device=device)
        state: dict[str, Any] = {"cache": None}

        def step(chosen: torch.Tensor | None) -> torch.Tensor:
            out = self.model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=(first if chosen is None else chosen).unsqueeze(1),
                past_key_values=state["cache"],
                use_cache=True,
            )
            state["cache"] = out.past_key_values
            return out.logits[:, -1]  # type: ignore[no-any-return]

        return step

    def _budget(self, prompts: list[list[int]], settings: Sampling) -> int:
        if self.context is None or self.seq2seq:
            return settings.max_new_tokens
        return min(settings.max_new_tokens, self.context - max(map(len, prompts)))

    def _check_room(self, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            if not prompt:
                raise DataError("The prompt has no tokens, so there is nothing to answer")
            if self.context is not None and not self.seq2seq and len(prompt) >= self.context:
                raise DataError(
                    f"The prompt has {len(prompt)} tokens; the model has room for {self.context}, answer included"
                )

    def _text(self, ids: list[int]) -> str:
        kept = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


class _Stream:
    """Hands out new text as tokens come, holding back a character of which some bytes are still to come."""

    def __init__(self, text: Callable[[list[int]], str], on_text: OnText) -> None:
        self._text, self._on_text, self._shown = text, on_text, ""

    def show(self, ids: list[int]) -> None:
        text = self._text(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._emit(text)

    def end(self, ids: list[int]) -> None:
        self._emit(self._text(ids))

    def _emit(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text


def load_for_inference(
    path: str | Path, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a run folder, a model folder, a hub id or an adapter folder.

    An adapter is put on its base and merged in memory, so that it answers at the speed of the bare model. ``device``
    None takes a GPU where there is one. Raises MissingError naming what is not there.
    """
    folder = _resolve(path)
    if (folder / "adapter_config.json").is_file():
        # peft takes seconds to import and is needed for adapters only.
        from llmkit.modeling.adapters import load_adapter, merge_weights

        peft_model, _, _ = load_adapter(folder, dtype=None if dtype == "auto" else dtype)
        model = merge_weights(peft_model)
        _take_generation_config(model, folder)
    else:
        model = open_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ready: Any = model.eval()
    return ready.to(where), open_tokenizer(folder, trust_remote_code=trust_remote_code)


def _resolve(path: str | Path) -> Path:
    """The folder with the weights: of a run its merged model, its model or its adapter."""
    from llmkit.modeling.locate import find_folder

    folder = find_folder(str(path))
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    for name, mark in (("model", "config.json"), ("adapter", "adapter_config.json"), ("merged", "config.json")):
        if (folder / name / mark).is_file():
            return folder / name
    if (folder / "recipe.yaml").is_file():
        raise MissingError(
            f"The run {folder} has no model/ or adapter/ yet: it has not finished. Run it again to its end"
        )
    raise MissingError(f"{folder} is neither a run nor a model: it has no model/, adapter/ or config.json")


def _take_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))


def _choose(logits: torch.Tensor, settings: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Tokens [n] from logits [n, vocabulary]."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    shares = torch.softmax(logits.float() / settings.temperature, dim=-1)
    if settings.top_p < 1:
        ordered, index = shares.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= settings.top_p] = 0.0
        shares = torch.zeros_like(shares).scatter_(-1, index, ordered)
    return torch.multinomial(shares, 1, generator=generator).squeeze(1)
