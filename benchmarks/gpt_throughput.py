"""Tokens per second of a small GPT on two ranks: gengap_dist, torch DDP with DataLoader, and transformers' Trainer.

    python benchmarks/gpt_throughput.py [--rounds 9] [--steps 6] [--add]

The same network (`gpt`), text (`data.name=stdlib`), AdamW, global batch and threads for everybody, in turns on a CPU.
Ratios are computed within a round, and start-up is not timed. gengap_dist is a whole run, with every step's loss,
gradient norm and noise scale recorded; its probes, evaluation and MLflow are off, because the others have none. With
`auto`, it measures the fastest micro-batch first (`batch.micro_size=auto`). The others log and save nothing, and have
their tokens in memory as int64; their AdamW is torch's fused one.

Results are written to docs/benchmarks/gpt.json (with --add beside those that are there), and from there to
docs/benchmarks.md.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import page
import paired_timing
import torch
from baselines import Turn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from world_pool import WorldPool

from gengap_dist import models
from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.distributed.phase_timer import PhaseTimer
from gengap_dist.distributed.process_group import World
from gengap_dist.training.trainer import run

RANKS, GLOBAL_SIZE, CONTEXT, LR, WEIGHT_DECAY = 2, 32, 128, 1e-3, 0.1
SETTINGS: dict[str, Any] = {
    "data": {"name": "stdlib", "context": CONTEXT, "num_train": 2048},
    "model": {"name": "gpt", "depth": 2, "width": 128, "heads": 4},
    "batch.global_size": GLOBAL_SIZE,
    "optim": {"name": "adamw", "lr": LR, "weight_decay": WEIGHT_DECAY, "schedule": "constant"},
    "train": {"steps": 10**9, "num_evals": 1},
    "probe.enabled": False,
    "checkpoint.every_seconds": 1e9,
    "mlflow.enabled": False,
}
OURS, AUTO, DDP, TRAINER = "gengap_dist", "gengap_dist, auto", "torch DDP, DataLoader", "transformers Trainer"
IGNORED = -100  # target of a token that does not count

# -- on the ranks -----------------------------------------------------------------------------------------------------

TURNS: dict[str, Turn] = {}  # by candidate, in this rank


@cache
def splits() -> datasets.Splits:
    """The text; loaded once."""
    return datasets.load(validate(RunConfig, nested(SETTINGS)).data)


def network(world: World) -> nn.Module:
    """The network with the same weights for every candidate."""
    torch.manual_seed(0)
    return models.from_config(validate(RunConfig, nested(SETTINGS)), splits().spec, world).train()


def tokens() -> tuple[Tensor, Tensor]:
    """Inputs and targets of all sequences, [N, T] int64 each."""
    inputs, targets = splits().train.inputs, splits().train.targets.long()
    assert isinstance(inputs, Tensor)
    read = Preprocess(None, torch.device("cpu"), torch.float32)(inputs)
    return read, torch.where(targets < 0, IGNORED, targets)


def gengap(world: World, turn: Turn, **more: Any) -> None:
    """A whole run, with the settings `more`."""
    world = replace(world, timer=PhaseTimer(on_gpu=False))
    with tempfile.TemporaryDirectory() as folder:
        box = [folder]
        torch.distributed.broadcast_object_list(box)
        config = validate(RunConfig, nested(SETTINGS | more))
        run(config, Path(box[0]) / "run", world=world, progress=partial(_count, turn))


def _count(turn: Turn, done: int, total: int, note: str) -> None:
    if not note:
        turn()


def torch_ddp(world: World, turn: Turn) -> None:
    """Torch's tutorial: DistributedDataParallel, DistributedSampler, DataLoader."""
    dataset = TensorDataset(*tokens())
    sampler: Any = DistributedSampler(dataset, drop_last=True)
    loader = DataLoader(dataset, GLOBAL_SIZE // world.size, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(network(world), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            turn()
        epoch += 1


class Examples(Dataset[dict[str, Tensor]]):
    """Sequences as transformers' Trainer takes them."""

    def __init__(self) -> None:
        """Of the training set."""
        self.inputs, self.targets = tokens()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.inputs[index], "labels": self.targets[index]}


class WithLoss(nn.Module):
    """The network as transformers' Trainer takes it: it returns its loss."""

    def __init__(self, net: nn.Module) -> None:
        """`net` returns logits."""
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Tokens [N, T] to the mean loss."""
        return {"loss": cross_entropy(self.net(input_ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)}


def transformers_trainer(world: World, turn: Turn) -> None:
    """Transformers' Trainer, without logging, saving, clipping and bar."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            turn()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, ddp_backend="gloo", ddp_find_unused_parameters=False,
            per_device_train_batch_size=GLOBAL_SIZE // world.size, max_steps=10**9, optim="adamw_torch_fused",
            learning_rate=LR, weight_decay=WEIGHT_DECAY, lr_scheduler_type="constant", max_grad_norm=0.0,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(WithLoss(network(world)), arguments, train_dataset=Examples(), callbacks=[Ends()]).train()


WORK = {
    OURS: gengap,
    AUTO: partial(gengap, **{"batch.micro_size": "auto"}),
    DDP: torch_ddp,
    TRAINER: transformers_trainer,
}


def set_up(world: World, who: str) -> None:
    """Create a candidate and run its first steps."""
    warnings.simplefilter("ignore")
    if world.rank:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for the lifetime of the rank
    TURNS[who] = Turn(partial(WORK[who], world))
    TURNS[who].steps(3)


def take_turn(world: World, who: str, num_steps: int) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this rank, of `num_steps` after one that is not timed."""
    TURNS[who].steps(1)
    world.barrier()
    began, began_cpu = time.perf_counter(), time.process_time()
    TURNS[who].steps(num_steps)
    cpu = time.process_time() - began_cpu
    world.barrier()
    return time.perf_counter() - began, cpu


# -- the rounds -------------------------------------------------------------------------------------------------------


def measure(num_rounds: int, num_steps: int) -> dict[str, Any]:
    """Tokens per second, and per CPU second of rank 0, of every candidate in every round."""
    ours, theirs = WorldPool(RANKS, "cpu"), WorldPool(RANKS, "cpu")  # a run of gengap_dist configures malloc
    pools = {who: ours if who in (OURS, AUTO) else theirs for who in WORK}
    for who, pool in pools.items():
        print(f"  {who}", file=sys.stderr, flush=True)
        pool(set_up, who)
    num_tokens = num_steps * GLOBAL_SIZE * CONTEXT
    took = paired_timing.in_turns({who: partial(pools[who], take_turn, who, num_steps) for who in WORK}, num_rounds)
    for pool in (ours, theirs):
        pool.close(kill=True)
    return {
        "machine": paired_timing.machine(),
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 1),
        "tokens_per_second": {who: [num_tokens / wall for wall, _ in each] for who, each in took.items()},
        "tokens_per_cpu_second": {who: [num_tokens / cpu / RANKS for _, cpu in each] for who, each in took.items()},
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--add", action="store_true", help="keep the results of earlier runs of this program")
    parser.add_argument("--out", type=Path, default=page.DOCS, help="folder of benchmarks.md")
    options = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # ranks end by os._exit
    earlier = page.read(options.out, "gpt").get("runs", []) if options.add else []
    page.keep(options.out, "gpt", {"runs": [*earlier, measure(options.rounds, options.steps)]})
    page.write(options.out)
    print(page.gpt(page.read(options.out, "gpt")))


if __name__ == "__main__":
    main()
