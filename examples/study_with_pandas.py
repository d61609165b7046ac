"""Read a study folder into pandas: one row per run, without training and without loading torch.

gengap demo
python examples/study_with_pandas.py demo
"""

import sys
from pathlib import Path

import pandas as pd

from gengap_dist.analysis.study_data import read_study


def main(folder: Path) -> None:
    study = read_study(folder)
    metric = study.metric
    rows = []
    for run in study.runs:
        result, measured = run.info.get("result") or {}, run.first_and_last_probe()[1]
        near_rank_loss = {name: value for name, value in measured.items() if name.startswith("near_rank_loss/")}
        rows.append(
            {
                "arm": run.arm,
                "seed": run.seed,
                "global_size": run.global_size,
                "updates": result.get("num_steps"),
                metric.name: result.get(f"test/{metric.name}"),
                **{name: value for name, value in near_rank_loss.items() if name.endswith("/rel_1e-2")},
            }
        )
    runs = pd.DataFrame(rows).set_index(["arm", "seed"]).sort_index()
    print(runs.iloc[:, :3].to_string())
    print(f"\nmean and standard deviation of test {metric.name} over seeds")
    print(runs.groupby("arm")[metric.name].agg(["mean", "std", "count"]).to_string())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
