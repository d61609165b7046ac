"""Describes an exported graph as an MLflow model, without loading it: no torch is imported."""

import shutil
from pathlib import Path

import yaml

from gengap_dist.runs.schema import ExportedModel, TensorDescription

DATA = "data"  # folder of the graph in MLflow's files
GRAPH = "model.pt2"  # MLflow's name of an exported graph


def write_model_files(graph: Path, model: ExportedModel, python: str, to: Path, model_id: str, run_id: str) -> None:
    """Write the files of an MLflow model into the new folder `to`.

    Args:
        graph: the file of torch.export.
        model: its description.
        python: version of Python with which it was written.
        to: the folder.
        model_id: id of the MLflow model.
        run_id: id of its MLflow run.
    """
    import mlflow
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature

    (to / DATA).mkdir(parents=True)
    shutil.copyfile(graph, to / DATA / GRAPH)
    requirements = [f"torch=={model.torch.partition('+')[0]}", f"mlflow=={mlflow.__version__}", "numpy"]
    (to / "requirements.txt").write_text("\n".join(requirements), encoding="utf-8")
    environment = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    (to / "python_env.yaml").write_text(yaml.safe_dump(environment, sort_keys=False), encoding="utf-8")
    description = Model(
        run_id=run_id,
        model_id=model_id,
        signature=ModelSignature(_schema(model.input), _schema(model.output)),
        metadata=model.metadata,
        model_size_bytes=graph.stat().st_size,
    )
    description.add_flavor("pytorch", model_data=DATA, pytorch_version=model.torch, code=None)
    pyfunc.add_to_model(
        description,
        loader_module="mlflow.pytorch",
        data=DATA,
        python_env="python_env.yaml",
        model_config={"device": None},
    )
    description.save(str(to / "MLmodel"))


def _schema(tensor: TensorDescription) -> object:
    import numpy as np
    from mlflow.types import Schema, TensorSpec

    return Schema([TensorSpec(np.dtype(tensor.dtype), tuple(tensor.shape))])
