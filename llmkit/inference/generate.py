"""Answer prompts with a transformers model: greedy or sampled, one by one or in a batch, as text or as a stream.

The loop is our own, so that prompts are the renderer's ids, one answer and its stream are the same code, a batch of
one has no padding and no mask, and a model in the middle of its training can be asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmkit.errors import DataError, UsageError
from llmkit.modeling.load import open_model, plain_attention
from llmkit.modeling.locate import BaseInfo, weights_folder
from llmkit.modeling.tokenizer import open_tokenizer, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmkit.data.render import Renderer

Message = dict[str, Any]
Prompt = Sequence[Message] | Sequence[int]
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """``text`` without special tokens; ``ids`` with the stop token where one came; ``finished`` is False for a cut answer.

    ``seconds`` is the time from the start of the answer's batch to its last token; ``logprob`` the mean natural
    logarithm of the probability of its tokens, where ``Sampling.logprobs`` asked for it.
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    finished: bool
    seconds: float = 0.0
    logprob: float | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 takes the likeliest; ``top_p`` keeps the likeliest of that total share.

    Every answer is drawn from ``seed`` anew, so that it is the same alone and in any batch. ``logprobs`` measures
    ``Answer.logprob``, of the model's own probabilities whatever the temperature.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"max_new_tokens must be at least 1, temperature at least 0 and top_p in (0, 1]; "
                f"given {self.max_new_tokens}, {self.temperature}, {self.top_p}"
            )


class Generator:
    """Answers with a model, its tokenizer and the renderer that made its training data (so prompts are the same).

    ``model`` is a transformers or PEFT model, causal or encoder-decoder, on any device; its mode and its attention
    are put back after every answer, so that a model in training can be tried out. ``divided`` says that its weights are
    divided among processes (all of them ask together then): what inference mode makes of those could not be trained on.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, renderer: Renderer, *, divided: bool = False
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.renderer = renderer
        bare: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
        self._bare = bare
        self.seq2seq = bool(bare.config.is_encoder_decoder)
        self.stop_ids = frozenset(renderer.stop_ids)
        self._pad = int(tokenizer.pad_token_id or 0)
        self._no_gradients: Any = torch.no_grad if divided else torch.inference_mode

    @property
    def bare(self) -> PreTrainedModel:
        """The transformers model itself, an adapter's layers inside of it."""
        return self._bare

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
        made = dict(self.batches(prompts, Sampling(**sampling), batch_size=batch_size))
        return [made[index].text for index in range(len(prompts))]

    def batches(
        self, prompts: Sequence[Prompt | str], settings: Sampling, *, batch_size: int = 1
    ) -> Iterator[tuple[int, Answer]]:
        """Answers with their index in ``prompts``, as batches end: short prompts first.

        Prompts that leave less room than ``max_new_tokens`` run alone, so that no neighbour cuts an answer short.
        """
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        room = None if self.context is None or self.seq2seq else self.context - settings.max_new_tokens
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        alone = [i for i in order if room is not None and len(ids[i]) > room]
        together = [i for i in order if room is None or len(ids[i]) <= room]
        size = max(1, batch_size)
        for chosen in [*(together[n : n + size] for n in range(0, len(together), size)), *([i] for i in alone)]:
            yield from zip(chosen, self._run([ids[i] for i in chosen], settings, None), strict=True)

    def generate(self, prompt: Prompt | str, settings: Sampling, *, on_text: OnText | None = None) -> Answer:
        """One answer with its ids; see :meth:`answer`."""
        return self._run([self.prompt_ids(prompt)], settings, on_text)[0]

    def _run(self, prompts: list[list[int]], settings: Sampling, on_text: OnText | None) -> list[Answer]:
        self.check_room(prompts)
        was_training = self.model.training
        self.model.eval()
        try:
            with self._no_gradients(), plain_attention(self._bare):
                made = self._loop(prompts, settings, on_text)
        finally:
            self.model.train(was_training)
        return [
            Answer(
                self._text(row.ids), row.ids, len(prompt), bool(row.ids) and row.ids[-1] in self.stop_ids,
                row.seconds, sum(row.logprobs) / len(row.logprobs) if row.logprobs else None,
            )
            for prompt, row in zip(prompts, made, strict=True)
        ]  # fmt: skip

    def _loop(self, prompts: list[list[int]], settings: Sampling, on_text: OnText | None) -> list[_Row]:
        """Token by token with a cache of keys and values. ``prompts`` are [n] lists of ids."""
        began = time.perf_counter()
        device = next(self.model.parameters()).device
        generators = [torch.Generator(device=device).manual_seed(settings.seed) for _ in prompts]
        step = self._seq2seq_step(prompts, device) if self.seq2seq else self._causal_step(prompts, device)
        rows = [_Row([], []) for _ in prompts]
        running = set(range(len(prompts)))
        stream = _Stream(self._text, on_text) if on_text else None
        chosen: torch.Tensor | None = None
        for _ in range(self._budget(prompts, settings)):
            logits = step(chosen)
            chosen = _choose(logits, settings, generators)
            likely = _logprobs(logits, chosen) if settings.logprobs else []
            now = time.perf_counter() - began
            for row in sorted(running):
                token = int(chosen[row])
                rows[row].ids.append(token)
                rows[row].logprobs += likely[row : row + 1]
                rows[row].seconds = now
                if token in self.stop_ids:
                    running.discard(row)
            if stream:
                stream.show(rows[0].ids)
            if not running:
                break
        if stream:
            stream.end(rows[0].ids)
        return rows

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

    def check_room(self, prompts: list[list[int]]) -> None:
        """Raises DataError for a prompt without tokens, or without room for an answer."""
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


@dataclass
class _Row:
    """One answer while it grows."""

    ids: list[int]
    logprobs: list[float]
    seconds: float = 0.0


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

    An adapter is put on its base and merged in memory, so that it answers at the speed of the bare model. One that was
    trained over a quantized base (and asked for without a ``dtype``) answers over that, unmerged: as in training, in the
    memory of the training. ``device`` None takes a GPU where there is one. Raises MissingError naming what is not there.
    """
    folder = weights_folder(path)
    if (folder / "adapter_config.json").is_file():
        # peft takes seconds to import and is needed for adapters only.
        from llmkit.modeling.adapters import load_adapter, merge_weights

        info = BaseInfo.read(folder) if dtype == "auto" else None
        as_trained = info is not None and info.quantization is not None
        peft_model, _, _ = load_adapter(
            folder, dtype="trained" if as_trained else None if dtype == "auto" else dtype, device=device
        )
        model: Any = peft_model if as_trained else merge_weights(peft_model)
        _take_generation_config(peft_model.get_base_model() if as_trained else model, folder)
    else:
        model = open_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ready: Any = model.eval()
    return ready.to(where), open_tokenizer(folder, trust_remote_code=trust_remote_code)


def open_generator(
    path: str | Path,
    *,
    system: str | None = None,
    chat_template: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Generator:
    """A model ready to answer, with the renderer and the stop tokens that its training had; see load_for_inference.

    ``system`` is put before conversations that have no system message; ``chat_template`` is as in ``data.chat_template``.
    """
    from llmkit.data.render import Renderer

    model, tokenizer = load_for_inference(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    folder = str(getattr(model, "name_or_path", "") or path)
    stops = stop_ids(None, tokenizer, folder if Path(folder).is_dir() else None)
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    more = configured if isinstance(configured, list) else [] if configured is None else [configured]
    seq2seq = bool(model.config.is_encoder_decoder)
    renderer = Renderer(
        tokenizer, chat_template=chat_template, system=system, seq2seq=seq2seq, stop_ids=(*stops, *more)
    )
    return Generator(model, tokenizer, renderer)


def _take_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))


def _logprobs(logits: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    """Natural logarithms [n] of the probabilities of the tokens ``chosen`` [n] under logits [n, vocabulary]."""
    taken = logits.float().log_softmax(-1).gather(-1, chosen.unsqueeze(-1))
    return [float(value) for value in taken.squeeze(-1).tolist()]


def _choose(logits: torch.Tensor, settings: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Tokens [n] from logits [n, vocabulary], each row drawn by its own of the [n] generators."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    shares = torch.softmax(logits.float() / settings.temperature, dim=-1)
    if settings.top_p < 1:
        ordered, index = shares.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= settings.top_p] = 0.0
        shares = torch.zeros_like(shares).scatter_(-1, index, ordered)
    drawn = [torch.multinomial(row, 1, generator=source) for row, source in zip(shares, generators, strict=True)]
    return torch.cat(drawn)
