"""A finished model folder as an MLflow model: stored with a signature, registered and aliased as the recipe says.

A whole causal model becomes MLflow's transformers flavor, made from the folder without loading a weight. An adapter,
and a sequence-to-sequence model (transformers 5 has no pipeline for it), become a ``python_function`` model that
``llmkit.tracking.serving`` loads; an adapter needs its base model where ``adapter_config.json`` says it is.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from llmkit.tracking.facts import versions
from llmkit.tracking.limits import PARAM
from llmkit.tracking.state import State

EVENT_TAG = "llmkit.event"
MODEL_NAME = "model"
SERVING = "llmkit.tracking.serving"


def log_model(
    client: Any,
    state: State,
    folder: Path,
    body: Mapping[str, Any],
    known: dict[str, str],
    save: Callable[[], None],
    *,
    key: str,
) -> None:
    """Store, register and alias; every step that is done is kept in ``known``, so that a second call goes on from there.

    ``body`` holds ``example`` and the wanted ``register`` and ``alias``. ``key`` tells model events of a run apart.
    Raises whatever mlflow raises, and FileNotFoundError when the folder holds no model.
    """
    if "model_id" not in known:
        known["model_id"] = _create(client, state, key, folder)
        save()
    model_id = known["model_id"]
    if "stored" not in known:
        _store(client, state, folder, body["example"], model_id)
        known["stored"] = "true"
        save()
    name, alias = body.get("register"), body.get("alias")
    if name and "version" not in known:
        known["version"] = _register(client, str(name), model_id, str(state.run_id))
        save()
    if name and alias and known.get("alias") != alias:
        client.set_registered_model_alias(name, alias, known["version"])
        known["alias"] = str(alias)
        save()


def _create(client: Any, state: State, key: str, folder: Path) -> str:
    found = client.search_logged_models([state.experiment_id], filter_string=f"source_run_id = '{state.run_id}'")
    for model in found:
        if model.tags.get(EVENT_TAG) == key:
            return str(model.model_id)
    made = client.create_logged_model(
        state.experiment_id,
        name=MODEL_NAME,
        source_run_id=state.run_id,
        tags={EVENT_TAG: key, "llmkit.folder": folder.name} | versions(),
        model_type="adapter" if _is_adapter(folder) else _task(folder),
    )
    return str(made.model_id)


def _store(client: Any, state: State, folder: Path, example: Mapping[str, Any], model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    logged = client.get_logged_model(model_id)
    outputs = client.get_run(state.run_id).outputs
    if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(state.run_id, [LoggedModelOutput(model_id, step=0)])
    described = Model(
        artifact_path=logged.artifact_location, model_uuid=model_id, run_id=state.run_id, model_id=model_id
    )
    with tempfile.TemporaryDirectory(prefix=".mlflow-model-", dir=folder.parent) as beside:
        target = Path(beside) / "model"
        save_as_mlflow(folder, target, example, described)
        client.log_model_artifacts(model_id, str(target))
    client.finalize_logged_model(model_id, "READY")


def save_as_mlflow(folder: Path, target: Path, example: Mapping[str, Any], described: Any = None) -> None:
    """Write ``target``, an MLflow model made from a Hugging Face folder; ``example`` gives its signature."""
    from mlflow.models import infer_signature

    given, answer = example_texts(example)
    signature = infer_signature(given, answer)
    if _is_adapter(folder) or _task(folder) != "text-generation":
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            str(target),
            loader_module=SERVING,
            data_path=str(folder),
            signature=signature,
            input_example=given,
            mlflow_model=described,
            pip_requirements=_requirements("llmkit", "torch", "transformers", "peft", "safetensors"),
        )
        return
    import mlflow.transformers
    from huggingface_hub import ModelCard

    with _quiet("mlflow.transformers", "huggingface_hub.repocard"):  # about a model card on a hub
        card = ModelCard(_card(folder))
        mlflow.transformers.save_model(
            str(folder.absolute()),
            str(target),
            task="text-generation",
            signature=signature,
            input_example=given,
            mlflow_model=described,
            model_card=card,
            pip_requirements=_requirements("torch", "transformers", "accelerate", "safetensors"),
        )


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Only errors from these loggers."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _register(client: Any, name: str, model_id: str, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.name == name and model_id in str(version.source):
            return str(version.version)
    made = client.create_model_version(
        name, source=f"models:/{model_id}", run_id=run_id, model_id=model_id, await_creation_for=0
    )
    return str(made.version)


def example_texts(example: Mapping[str, Any]) -> tuple[str, str]:
    """``(input, output)`` of an example: ``input``/``prompt``/``messages`` and ``output``/``completion``/``answer``."""
    given = next((example[k] for k in ("input", "prompt", "messages", "text", "question") if k in example), "")
    answer = next((example[k] for k in ("output", "completion", "answer", "response") if k in example), "")
    return _as_text(given), _as_text(answer)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def _task(folder: Path) -> str:
    """``text-generation`` or ``text2text-generation``, from ``config.json``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "text2text-generation" if config.get("is_encoder_decoder") else "text-generation"


def _card(folder: Path) -> str:
    card = folder / "README.md"
    return card.read_text(encoding="utf-8") if card.exists() else f"Model written by llmkit: {folder.name}"[:PARAM]


def _requirements(*packages: str) -> list[str]:
    """``package==version`` as installed here. A local build's suffix (``+cpu``) is not on an index: it is left out."""
    found = []
    for package in packages:
        try:
            found.append(f"{package}=={metadata.version(package).partition('+')[0]}")
        except metadata.PackageNotFoundError:
            continue
    return found
