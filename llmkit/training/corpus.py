"""The plain text of the training rows, to train a tokenizer on."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.data.pipeline import new_report, open_source
from llmkit.data.rows import BadRow, Conversation, RawRow, Text
from llmkit.data.settings import DataSettings
from llmkit.data.sources import train_sources


def texts(settings: DataSettings) -> Iterator[str]:
    """Each document, message, prompt and answer; rows that cannot be read are left to data preparation to report."""
    for source in train_sources(settings):
        rows, convert = open_source(source, new_report(source), streaming=True)
        for row in rows:
            sample = convert(row) if isinstance(row, RawRow) else row
            if isinstance(sample, BadRow):
                continue
            if isinstance(sample, Text):
                yield sample.text
            elif isinstance(sample, Conversation):
                yield from (str(message["content"]) for message in sample.messages)
            else:
                yield from (sample.prompt, sample.completion)
