"""All runs of a study with Ray Tune and Lightning: a grid of arms x seeds, one CPU a trial, one JSON file a run.

    python tune_lightning.py --arms arms.json --seeds 0 1 2 --num_cpus 2 --out DIR

ARMS holds the options of plain_run.py by name of arm. Network, data and near-rank loss are those of plain_run.py.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import plain_run
import ray
import torch
import torch.nn.functional as F
from ray import tune
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset


class Run(lightning.LightningModule):
    """A run of the study."""

    def __init__(self, plan: plain_run.Plan) -> None:
        super().__init__()
        self.plan, self.model = plan, plan.model
        self.val: dict[int, dict[str, float]] = {}
        self.spectra: dict[int, dict[str, float]] = {}
        self.losses: list[torch.Tensor] = []

    def configure_optimizers(self) -> Any:
        """SGD, with the rate set at every step."""
        optimizer = self.plan.optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.plan.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any) -> torch.Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.detach())
        return loss


class Measure(lightning.Callback):
    """Validation and near-rank loss at the steps of plain_run.py, which Lightning's own intervals do not reach."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Before the first step."""
        self._measure(trainer.global_step, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each step."""
        self._measure(trainer.global_step, pl_module)

    def _measure(self, step: int, run: Run) -> None:
        if step in run.plan.eval_steps:
            run.val[step] = plain_run.score(run.model, *run.plan.data["val"])
        if step in run.plan.probe_steps:
            run.spectra[step] = plain_run.near_rank_loss(run.model, *run.plan.probe_set)


def trial(config: dict[str, Any]) -> None:
    """Train, measure, write, and report the test accuracy."""
    warnings.filterwarnings("ignore", module="lightning")  # hints: on worker processes, on steps without logging
    out = Path(config["out"]) / config["arm"] / f"{config['seed']}.json"
    words = [*config["arms"][config["arm"]], "--seed", str(config["seed"]), "--out", str(out)]
    plan = plain_run.Plan(plain_run.parser.parse_args(words))
    dataset = TensorDataset(*plan.data["train"])
    sampler = BatchSampler(RandomSampler(dataset), plan.options.global_size, drop_last=False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)  # indexes a whole batch at once
    run = Run(plan)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=plan.options.num_steps,
        max_epochs=-1,
        callbacks=[Measure()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(run, loader)
    test = plan.write(val=run.val, near_rank_loss=run.spectra, losses=torch.stack(run.losses).tolist())
    tune.report({"test_accuracy": test["accuracy"]})


def main() -> None:
    """Run all trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--num_cpus", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    ray.init("local", num_cpus=options.num_cpus, include_dashboard=False, log_to_driver=False)
    arms = json.loads(options.arms.read_text())
    grid = {"arm": tune.grid_search([*arms]), "seed": tune.grid_search(options.seeds)}
    results = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space=grid | {"arms": arms, "out": str(options.out.resolve())},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str((options.out / "tune").resolve()), verbose=0),
    ).fit()
    ray.shutdown()
    if results.errors:
        sys.exit(f"{results.num_errors} trials failed: {results.errors[0]}")


if __name__ == "__main__":
    main()
