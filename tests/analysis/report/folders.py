"""Study folders as training would have left them, written by the real record in milliseconds, of known numbers."""

import json
from pathlib import Path
from typing import Any

import torch

from gengap_dist.probes import metrics as metrics_of
from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum
from gengap_dist.runs.run_folder import RunRecorder
from gengap_dist.runs.schema import RunStatus
from tests.conftest import config

LAYERS = ("fc1", "fc2")
UNITS, SAMPLES = 8, 64
STEPS = (0, 1, 10, 20)
FACTS = {
    "data": {"name": "digits", "num_train": 1294, "num_val": 143, "num_test": 360, "digest": "0123456789abcdef"},
    "world_size": 1, "device": "cpu", "launcher": "local", "strategy": "single", "num_parameters": 1000,
    "num_steps": 20, "num_probe_samples": SAMPLES,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "sb8": {"batch__global_size": 8},
    "lb64": {"batch__global_size": 64},
    "lb64-sqrt": {"batch__global_size": 64, "optim__scaling": "sqrt", "optim__base_size": 8},
    "lb256": {"batch__global_size": 256},
}
TUNED = {
    "lb64": {
        "trials": [
            {"setting": {"optim.lr": 0.1}, "score": 0.9, "status": "finished"},
            {"setting": {"optim.lr": 0.4}, "score": None, "status": "diverged"},
        ],
        "best": {"optim.lr": 0.1},
        "edge": ["optim.lr at its low end (0.1 of 0.1..0.4)"],
    }
}


def spectra(num_small: int) -> list[LayerSpectrum]:
    """One spectrum for each layer and its centred twin, with `num_small` of UNITS values below 0.01 of the largest."""
    values = torch.cat([torch.logspace(0, -1, UNITS - num_small), torch.full((num_small,), 1e-3)]).double()
    return [
        LayerSpectrum(layer, "", centred, SAMPLES, UNITS, values, 1e-7, 0)
        for layer in LAYERS
        for centred in (False, True)
    ]


def accuracy(number: int, seed: int) -> float:
    """Test accuracy of arm `number`: two points less for each arm before it, and some noise."""
    return 0.9 - 0.02 * number + 0.001 * ((seed * (number + 1)) % 3)


def write_run(folder: Path, number: int, seed: int, *, status: RunStatus = RunStatus.FINISHED, **settings: Any) -> None:
    """A run of arm `number`: the untrained network has 1 small value, the trained one 1 + `number` of 8."""
    folder.mkdir(parents=True)
    record = RunRecorder(folder)
    target = {"train__target_accuracy": 0.8}
    record.start(config(seed=seed, **(target | settings)), FACTS)
    for step in STEPS:
        found = spectra(1 if step == 0 else min(1 + number, UNITS - 1))
        metrics = metrics_of(found)
        metrics |= {"probe_seconds/near_rank_loss": 0.1, "nc1": 1.0 + number + 0.01 * seed, "noise_scale": 50.0 + seed}
        metrics |= {"train/loss": 2.0 / (1 + step), "val/accuracy": 0.1 + 0.03 * step}
        record.log(step, step / 10, metrics)
        record.spectra(step, found)
    result = {"test/accuracy": accuracy(number, seed), "num_steps": 20}
    result |= {"updates_to_target": 400 // (1 + 2 * number) + seed}
    record.finish(
        status, result if status == RunStatus.FINISHED else {}, "loss is nan" if status == RunStatus.DIVERGED else None
    )


def write_study(folder: Path, arms: dict[str, dict[str, Any]] = ARMS, seeds: int = 3, **info: Any) -> Path:
    """A study folder; the last seed of the last of several arms diverged."""
    for number, (arm, settings) in enumerate(arms.items()):
        for seed in range(seeds):
            lost = len(arms) > 1 and number == len(arms) - 1 and seed == seeds - 1 > 0
            status = RunStatus.DIVERGED if lost else RunStatus.FINISHED
            write_run(folder / "runs" / arm / f"seed{seed}", number, seed, status=status, **settings)
    facts = {
        "schema": 1, "status": RunStatus.FINISHED, "name": "toy <study>", "question": "What does a larger batch cost?",
        "baseline": next(iter(arms)), "arms": list(arms), "seeds": list(range(seeds)), "command": ["python", "-m", "x"],
        "config": config().model_dump(mode="json"), "versions": {"python": "3"}, "git": None,
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(facts | info))
    return folder
