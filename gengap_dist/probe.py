"""Measure the near-rank loss of a network's layers on a fixed set of training images, without training it.

Examples:
  gengap probe --model lenet5                       an untrained LeNet-5 on digits
  gengap probe --model runs/lb4096                  a run's last checkpoint, on the run's own data and probe set
  gengap probe --model my.module:make --data mnist --data_root DIR --layers 'block*' --out probes/mine
  torchrun --nproc_per_node 2 -m gengap_dist.probe --model lenet5
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gengap_dist import cli
from gengap_dist.config import RunConfig, UsageError, load_yaml, merge, nested, validate

PROG = "gengap probe"


def command(argv: Sequence[str]) -> int:
    """Measure, print a table, and with --out write the spectra."""
    options = _parse(argv)
    folder = Path(options.model)
    is_run = (folder / "run.json").exists()
    if folder.is_dir() and not is_run:
        raise UsageError(f"--model ({options.model}) is a folder without run.json: give the folder of a run")
    config = _config(options, load_yaml(folder / "config.yaml") if is_run else {"model": {"name": options.model}})
    out = Path(options.out).resolve() if options.out else None

    from gengap_dist.run import probe_once
    from gengap_dist.tracking.record import dump_spectra, prepare_folder, write_atomically
    from gengap_dist.world import connect, disconnect

    world = connect(config.launch)
    spectra = probe_once(config, world, folder / "checkpoints" / "last.pt" if is_run else None)
    if world.rank == 0:
        from gengap_dist.report.terminal import print_spectra

        print_spectra(spectra, title=f"{options.model} on {config.data.name}")
        if out:
            prepare_folder(out, "spectra.npz", resume=False)
            write_atomically(out / "spectra.npz", dump_spectra(spectra))
            print(f"spectra  {out / 'spectra.npz'}")
    disconnect()
    return cli.OK


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="lenet5, mlp, module.path:factory, or the folder of a run (its last checkpoint)")
    add("--data", help="data set: digits (default), mnist, fashion_mnist, cifar10, cifar100, imagefolder")
    add("--data_root", help="folder with the data set's files")
    add("--num_samples", type=int, help="training images in the probe set (default 2048, clipped to the set)")
    add("--layers", nargs="+", help="auto (every non-linearity), layer names or globs")
    add("--views", nargs="+", help="channel, pool, flatten: how a convolution's activation becomes a matrix")
    add("--seed", type=int, help="seed of an untrained network's weights")
    add("--dtype", help="float32 (default) or float64")
    add("--out", help="folder for spectra.npz")
    add("--debug", action="store_true", help="show Python's traceback when something goes wrong")
    return parser.parse_args(list(argv))


def _config(options: argparse.Namespace, base: dict[str, Any]) -> RunConfig:
    given = {
        "data.name": options.data,
        "data.root": options.data_root,
        "probe.num_samples": options.num_samples,
        "probe.layers": options.layers,
        "probe.views": options.views,
        "seed": options.seed,
        "train.dtype": options.dtype,
    }
    return validate(RunConfig, merge(base, nested({name: value for name, value in given.items() if value is not None})))


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    cli.guarded(PROG, command, argv)


if __name__ == "__main__":
    main()
