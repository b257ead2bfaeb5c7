"""A run folder in an object store: the run works in a scratch folder on this machine, and what is complete is uploaded.

``Store`` is the folder in the store, ``hold`` the claim on it, ``Mirror`` what keeps both sides alike. fsspec is imported
when a store is opened.
"""

from llmkit.mirror.journal import uri_of
from llmkit.mirror.mirror import Mirror, followed, held
from llmkit.mirror.reading import fetched, peek

__all__ = ["Mirror", "fetched", "followed", "held", "peek", "uri_of"]
