"""The CustomResourceDefinitions of PyTorchJob and TrainJob, made of the typed models that Kubeflow publishes on PyPI.

For the API server of the tests (``scripts/kube_lab.sh``): no package carries the operators' own YAML. A real cluster gets
theirs, with the operator. Run: ``python scripts/kube_crds.py | kubectl apply -f -``.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import yaml

INT_OR_STRING: dict[str, Any] = {"x-kubernetes-int-or-string": True}
ANYTHING: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}
PLAIN: dict[str, dict[str, Any]] = {
    "str": {"type": "string"}, "int": {"type": "integer"}, "bool": {"type": "boolean"}, "float": {"type": "number"},
    "datetime": {"type": "string", "format": "date-time"}, "bytes": {"type": "string", "format": "byte"},
}  # fmt: skip
QUANTITIES = {"limits", "requests", "minResources", "overhead", "capacity"}


def of_openapi(kind: str, field: str = "", above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Schema of a type of the kubernetes and kubeflow-training packages, whose models have ``openapi_types``."""
    import kubeflow.training.models as kubeflow
    import kubernetes.client as kubernetes

    if kind in PLAIN:
        return dict(PLAIN[kind])
    if kind == "object":
        return dict(INT_OR_STRING if field.lower().endswith("port") else ANYTHING)
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        return {"type": "array", "items": of_openapi(found[1], field, above)}
    if found := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if field in QUANTITIES:
            return {"type": "object", "additionalProperties": dict(INT_OR_STRING)}
        return {"type": "object", "additionalProperties": of_openapi(found[1], field, above)}
    model = getattr(kubeflow, kind, None) or getattr(kubernetes, kind, None)
    if model is None or kind in above:
        return {"type": "object", **ANYTHING}
    if kind == "V1ObjectMeta" and len(above) <= 1:
        return {"type": "object"}
    names = model.attribute_map
    properties = {names[a]: of_openapi(t, names[a], (*above, kind)) for a, t in model.openapi_types.items()}
    required = [names[a] for a in names if "must not be `None`" in inspect.getsource(getattr(model, a).fset)]
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def of_pydantic(
    schema: dict[str, Any], definitions: dict[str, Any], field: str = "", above: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The same of a pydantic model's JSON schema, without what a structural schema may not hold."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in above:
            return {"type": "object", **ANYTHING}
        if name.endswith("ObjectMeta") and len(above) == 0:
            return {"type": "object"}
        if name.endswith(("IntOrString", "ResourceQuantity")):
            return dict(INT_OR_STRING)
        return of_pydantic(definitions[name], definitions, field, (*above, name))
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind.get("type") != "null"]
        return of_pydantic(kinds[0], definitions, field, above) if len(kinds) == 1 else dict(INT_OR_STRING)
    kind = schema.get("type")
    if kind == "array":
        return {"type": "array", "items": of_pydantic(schema["items"], definitions, field, above)}
    if kind == "object" and "properties" in schema:
        fields = {k: of_pydantic(v, definitions, k, above) for k, v in schema["properties"].items()}
        required = schema.get("required")
        return {"type": "object", "properties": fields} | ({"required": required} if required else {})
    if kind == "object":
        inner = schema.get("additionalProperties")
        if field in QUANTITIES or not isinstance(inner, dict):
            return (
                {"type": "object", "additionalProperties": dict(INT_OR_STRING)}
                if inner
                else {"type": "object", **ANYTHING}
            )
        return {"type": "object", "additionalProperties": of_pydantic(inner, definitions, field, above)}
    if kind is None:
        return dict(ANYTHING)
    date = {"format": "date-time"} if schema.get("format") == "date-time" else {}
    return {"type": kind, **date}


def definition(group: str, version: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    plural = kind.lower() + "s"
    names = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()}
    served = {
        "name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
    }  # fmt: skip
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": [served]},
    }  # fmt: skip


def pytorch_job() -> dict[str, Any]:
    schema = of_openapi("KubeflowOrgV1PyTorchJob")
    # The operator's own CRD demands the replicas only; the package's models also demand what it fills in.
    schema["properties"]["spec"]["required"] = ["pytorchReplicaSpecs"]
    schema["properties"]["status"].pop("required", None)
    return definition("kubeflow.org", "v1", "PyTorchJob", schema)


def train_job() -> dict[str, Any]:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    schema = TrainerV1alpha1TrainJob.model_json_schema(by_alias=True)
    made = of_pydantic({k: v for k, v in schema.items() if k != "$defs"}, schema["$defs"])
    made["properties"]["status"].pop("required", None)
    return definition("trainer.kubeflow.org", "v1alpha1", "TrainJob", made)


if __name__ == "__main__":
    yaml.Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    print(yaml.dump_all([pytorch_job(), train_job()], Dumper=yaml.Dumper, sort_keys=False))
