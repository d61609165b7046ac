import subprocess
import sys

import pytest
import yaml

from gengap_dist.cli.options import Options, parse
from gengap_dist.config.loading import load_yaml, nested, resolve, to_yaml, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import UsageError
from tests.conftest import ROOT


def test_precedence_is_defaults_then_files_then_command_line(tmp_path):
    (tmp_path / "base.yaml").write_text("batch: {global_size: 8, micro_size: 4}\nseed: 1\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nbatch.micro_size: 5\n")
    (tmp_path / "more.yaml").write_text("optim: {lr: 0.5}\n")
    config = resolve(RunConfig, [tmp_path / "top.yaml", tmp_path / "more.yaml"], {"seed": "7"})
    assert (config.batch.global_size, config.batch.micro_size, config.optim.lr, config.seed) == (8, 5, 0.5, 7)
    assert config.optim.momentum == 0.9


def test_extends_is_relative_to_the_file_and_may_name_several(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("seed: 1\ntrain: {epochs: 1}\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    (tmp_path / "sub" / "c.yaml").write_text("extends: [../a.yaml, ../b.yaml]\n")
    assert load_yaml(tmp_path / "sub" / "c.yaml") == {"seed": 2, "train": {"epochs": 1}}


SCHEDULE = "batch: {global_size: 64, schedule: [%s]}"
TOKENS = "{data: {name: stdlib}, batch: {schedule_unit: tokens, schedule: [%s]}}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch: {globl_size: 4}", ["batch.globl_size", "batch.global_size"]),
        ("optmi: {lr: 1}", ["optmi", "did you mean optim"]),
        ("batch: {global_size: many}", ["batch.global_size (many)", "integer"]),
        ("batch: {global_size: 0}", ["batch.global_size (0)", "greater than 0"]),
        ("batch: {micro_size: -3}", ["batch.micro_size (-3)", "positive integer"]),
        ("batch: {global_size: 1000, ghost_size: 64}", ["1000", "ghost groups of 64", "multiple of 64"]),
        ("batch: {global_size: 64, ghost_size: 1}", ["batch.ghost_size (1)", "at least 2"]),
        ("batch: {global_size: 64, ghost_size: 32, micro_size: 8}", ["batch.micro_size (8)", "at least 32"]),
        ("optim: {scaling: linear}", ["optim.scaling (linear)", "optim.base_size"]),
        ("optim: {scaling: legw}", ["optim.scaling (legw)", "optim.base_size"]),
        ("optim: {nesterov: true, momentum: 0}", ["optim.nesterov", "momentum"]),
        ("optim: {name: lambda}", ["optim.name (lambda)", "did you mean lamb?"]),
        ("optim: {name: adamw, momentum_correction: false}", ["optim.momentum_correction", "adamw"]),
        ("optim: {milestones: [0.5, 1.5]}", ["optim.milestones", "less than 1"]),
        ("optim: {milestones: [0.5, 0.2]}", ["optim.milestones ([0.5, 0.2])", "in order"]),
        (SCHEDULE % "{at: 5, size: 64}", ["batch.schedule begins at 5 with 64", "batch.global_size (64)"]),
        (SCHEDULE % "{at: 0, size: 32}", ["batch.schedule begins at 0 with 32", "batch.global_size (64)"]),
        (SCHEDULE % "{at: 0, size: 64}, {at: 9, size: 32}", ["falls or stays, from 64 to 32 at 9", "sizes that rise"]),
        (SCHEDULE % "{at: 0, size: 64}, {at: 9, size: 64}", ["falls or stays, from 64 to 64 at 9"]),
        (SCHEDULE % "{at: 0, size: 64}, {at: 0, size: 128}", ["has 128 at 0 after 64 at 0", "a place of its own"]),
        (SCHEDULE % "{at: 0, size: 64}, {at: 9, size: 99}, {at: 8, size: 128}", ["128 at 8 after 99 at 9"]),
        (SCHEDULE % "{at: 0, size: 64}, {at: 0.5, size: 128}", ["a change at 0.5 samples", "schedule_unit=epochs"]),
        (SCHEDULE % "{at: 0, size: 64}, {at: -1, size: 128}", ["batch.schedule", "(-1)"]),
        (TOKENS % "{at: 0, size: 16}, {at: 9, size: 8}", ["falls or stays, from 16 to 8 at 9", "sizes that rise"]),
        (TOKENS % "{at: 0, size: 16}, {at: 9, size: 32}, {at: 9, size: 64}", ["64 at 9 after 32 at 9"]),
        (TOKENS % "{at: 0, size: 16}, {at: 0.5, size: 32}", ["a change at 0.5 tokens", "whole numbers"]),
        ("batch: {schedule_unit: tokens}", ["batch.schedule_unit (tokens)", "digits", "samples, steps or epochs"]),
        ("train: {tokens: 100}", ["train.tokens (100)", "digits", "train.epochs or train.steps"]),
        ("{train: {tokens: 100, steps: 9}, data: {name: stdlib}}", ["train.steps (9)", "train.tokens (100)"]),
        (
            "{train: {tokens: 100, length_unit: updates}, optim: {base_size: 8}, data: {name: stdlib}}",
            ["train.length_unit (updates)", "cannot be combined with train.tokens"],
        ),
        (SCHEDULE % "{at: 0, siz: 64}", ["batch.schedule.0.size is not set"]),
        ("batch: {schedule: 64}", ["batch.schedule (64)"]),
        ("batch: {schedule_lr_power: 0.7}", ["batch.schedule_lr_power (0.7)", "choose 0, 0.5, 0.6 or 1"]),
        (
            "{batch: {schedule: [{at: 0, size: 64}, {at: 9, size: 128}]}, optim: {base_size: 8},"
            " train: {length_unit: updates}}",
            ["batch.schedule changes the number of updates", "train.length_unit=epochs"],
        ),
        ("train: {length_unit: updates}", ["train.length_unit (updates)", "optim.base_size"]),
        ("train: {stop_at_target: true}", ["train.stop_at_target", "train.target_accuracy"]),
        ("{train: {target_accuracy: 0.9}, data: {val_fraction: 0}}", ["train.target_accuracy (0.9)", "val_fraction"]),
        ("{train: {target_loss: 0.5}, data: {val_fraction: 0}}", ["train.target_loss (0.5)", "val_fraction"]),
        ("train: {target_loss: 0.5, target_accuracy: 0.9}", ["target_accuracy (0.9)", "target_loss (0.5)", "to null"]),
        ("{model: {width: 10}}", ["model.width (10)", "4 model.heads"]),
        ("data: {name: tokens}", ["data.name (tokens)", "data.vocab_size"]),
        ("data: {name: text, vocab_size: 9}", ["data.vocab_size (9)", "null"]),
        ("data: {name: stdlib, augment: [flip]}", ["data.augment", "tokens"]),
        ("data: {name: stdlib, shuffle_labels: true}", ["data.shuffle_labels", "tokens"]),
        ("model: {norm: ghost}", ["model.norm (ghost)", "batch.ghost_size"]),
        ("{model: {norm: sync}, batch: {ghost_size: 32}}", ["batch.ghost_size (32)", "not for sync"]),
        ("model: {norm: batch}", ["model.norm (batch)", "'local', 'ghost'"]),
        ("data: {augment: [cutout], cutout_size: 33}", ["data.cutout_size (33)", "at most 32"]),
        ("data: {augment: [crop], crop_padding: 32}", ["data.crop_padding (32)", "less than 32"]),
        ("data: {augment: [crop, resized_crop]}", ["data.augment", "crop and resized_crop", "choose one"]),
        (
            "data: {resized_crop_scale: [0.5, 0.2]}",
            ["data.resized_crop_scale ([0.5, 0.2])", "the smaller number first"],
        ),
        ("data: {resized_crop_scale: [0.5, 2]}", ["data.resized_crop_scale ([0.5, 2])", "at most 1"]),
        ("data: {resized_crop_ratio: [2, 1]}", ["data.resized_crop_ratio ([2, 1])", "the smaller number first"]),
        ("data: {rand_augment_magnitude: 31}", ["data.rand_augment_magnitude (31)"]),
        ("{data: {augment: [mixup]}, task: {name: 'my:Task'}}", ["data.augment (mixup)", "my:Task", "classification"]),
        ("data: {streaming: true}", ["data.streaming", "imagefolder"]),
        ("data: {name: imagefolder, streaming: true, device: cuda}", ["data.device (cuda)", "data.streaming (true)"]),
        ("algorithm: {gradient_penalty: 0.1}", ["algorithm.gradient_penalty (0.1)", "algorithm.penalty_size"]),
        (
            "algorithm: {gradient_penalty: 0.1, penalty_size: 48}",
            ["algorithm.penalty_size (48)", "batch.global_size (64)"],
        ),
        ("algorithm: {gradient_penalty: 0.1, penalty_size: 32, sam_rho: 0.1}", ["algorithm.sam_rho", "choose one"]),
        (
            "algorithm: {weight_averaging: ema, local_sgd: swap}",
            ["algorithm.weight_averaging (ema)", "algorithm.local_sgd (swap)"],
        ),
        ("algorithm: {local_sgd: swap, workers: 5}", ["batch.global_size (64)", "algorithm.workers (5)"]),
        ("{algorithm: {local_sgd: swap}, model: {norm: sync}}", ["algorithm.local_sgd (swap)", "model.norm (sync)"]),
        ("algorithm: {sam_rho: -1}", ["algorithm.sam_rho (-1)", "greater than 0"]),
        ("data: {name: cifar11}", ["data.name (cifar11)", "cifar10"]),
        ("seed: 1.5", ["seed (1.5)", "integer"]),
        ("just words", ["settings"]),
        ("a: [1", ["is not YAML"]),
        ("extends: nowhere.yaml", ["nowhere.yaml", "cannot be read"]),
        ("extends: bad.yaml", ["extends itself"]),
    ],
)
def test_bad_yaml_gets_one_sentence(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        resolve(RunConfig, [path], {})
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": []}, ["study.arms is empty"]),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, ["a more than once"]),
        ({"baseline": "sb3"}, ["study.baseline (sb3)", "did you mean sb32"]),
        ({"seeds": [1, 1]}, ["study.seeds", "twice"]),
        ({"axes": {f"optim.{name}": [*range(100)] for name in "abcdef"}}, ["1,000,000,000,000 combinations"]),
        ({"tune": {"trials": 10**12, "space": {"optim.lr": {"low": 1, "high": 2}}}}, ["trials (1000000000000)"]),
        ({"arms": [{"name": "a/b"}]}, ["study.arms", "name of an arm ('a/b')"]),
    ],
)
def test_bad_study_gets_one_sentence(change, words):
    study = {"baseline": "sb32", "arms": [{"name": "sb32"}, {"name": "lb"}]} | change
    if "arms" in change:
        del study["baseline"]
    with pytest.raises(UsageError) as error:
        validate(StudyConfig, {"study": study})
    for word in words:
        assert word in str(error.value)


def test_arm_overrides_are_checked_and_named():
    config = validate(StudyConfig, {"study": {"arms": [{"name": "lb", "set": {"batch.globl_size": 3}}]}})
    with pytest.raises(UsageError, match=r"study arm lb: batch.globl_size .*did you mean batch.global_size"):
        config.run_config(config.arms[0], seed=0)


def test_an_arm_is_the_base_with_its_overrides_and_seed():
    arm = {"name": "lb", "set": {"batch.global_size": 512, "optim": {"lr": 0.5}}}
    config = validate(StudyConfig, {"seed": 9, "train": {"epochs": 3}, "study": {"arms": [arm]}})
    run = config.run_config(config.arms[0], seed=4)
    assert (run.seed, run.batch.global_size, run.optim.lr, run.train.epochs) == (4, 512, 0.5, 3)
    assert type(run) is RunConfig


def test_what_is_saved_reads_back_the_same(tmp_path):
    config = validate(RunConfig, nested({"batch.ghost_size": 32, "model.widths": [3, 4], "data.augment": ["flip"]}))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert resolve(RunConfig, [tmp_path / "c.yaml"], {}) == config


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 3  # type: ignore[misc]


def parse_words(*words: str) -> tuple[Options, dict]:
    return parse(Options, words, prog="p", description="d", settings=RunConfig)


def test_command_line_values_have_types():
    options, overrides = parse_words(
        "--config", "a", "--config=b", "--resume", "--batch.ghost_size", "null", "--model.widths", "3,4",
        "--optim.lr=1e-2",
    )  # fmt: skip
    assert [path.name for path in options.config] == ["a", "b"]
    assert options.resume
    config = resolve(RunConfig, [], overrides)
    assert (config.batch.ghost_size, config.model.widths, config.optim.lr) == (None, (3, 4), 0.01)


def test_only_what_was_given_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: {lr: 0.5}\ndata: {download: true}\n")
    _, overrides = parse_words("--seed", "3")
    assert resolve(RunConfig, [tmp_path / "c.yaml"], overrides).optim.lr == 0.5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch.globl_size", "3"], "did you mean --batch.global_size"),
        (["--batch.glob", "3"], "--batch.glob is not a setting"),
        (["--batch.global_size"], "--batch.global_size has no value: write --batch.global_size VALUE"),
        (["stray"], "stray is not a setting"),
    ],
)
def test_bad_command_line_gets_one_sentence(words, says):
    with pytest.raises(UsageError, match=says):
        parse_words(*words)


@pytest.mark.processes
def test_print_config_can_be_run_again(tmp_path):
    words = ["--config", ROOT / "configs/demo_train.yaml", "--batch.global_size", "96", "--print_config"]
    done = subprocess.run(
        [sys.executable, "-m", "gengap_dist.train", *map(str, words)], capture_output=True, text=True, check=True
    )
    assert yaml.safe_load(done.stdout)["batch"]["global_size"] == 96
    assert not list(tmp_path.iterdir())
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert resolve(RunConfig, [tmp_path / "again.yaml"], {}).batch.global_size == 96


@pytest.mark.processes
def test_help_says_what_every_setting_is():
    done = subprocess.run([sys.executable, "-m", "gengap_dist.train", "--help"], capture_output=True, text=True)
    for name in ("--batch.global_size", "--launch.num_processes", "exact mean", "default: 64", "--resume"):
        assert name in done.stdout


def study(axes, length_units=(), arms=(), **settings) -> StudyConfig:
    block = {"axes": axes, "length_units": list(length_units), "arms": list(arms)}
    return validate(StudyConfig, nested(settings | {"optim.base_size": 64, "study": block}))


def test_axes_are_every_combination_with_names_that_can_be_read():
    config = study(
        {"batch.global_size": [64, 512], "algorithm": {"": {}, "smooth": {"algorithm.label_smoothing": 0.1}}},
        arms=[{"name": "adamw", "set": {"optim.name": "adamw"}}],
    )
    assert [arm.name for arm in config.arms] == ["adamw", "b64", "b64-smooth", "b512", "b512-smooth"]
    run = config.run_config(config.arms[-1], seed=0)
    assert (run.batch.global_size, run.algorithm.label_smoothing) == (512, 0.1)
    assert config.baseline == "b64"
    names = study({"optim.lr": [0.1, 1e-5], "optim.nesterov": [True, False], "model.name": ["torchvision:vgg"]}).arms
    assert names[0].name == "lr0.1-nesterov-true-name-torchvision.vgg"
    assert names[-1].name == "lr1e-05-nesterov-false-name-torchvision.vgg"


def test_what_would_be_the_same_run_is_one_arm():
    rules = {"batch.global_size": [64, 512], "optim.scaling": ["none", "sqrt"]}
    config = study(rules, length_units=["epochs", "updates"])
    assert [arm.name for arm in config.arms] == [
        "b64-scaling-none-epochs", "b512-scaling-none-epochs", "b512-scaling-none-updates",
        "b512-scaling-sqrt-epochs", "b512-scaling-sqrt-updates",
    ]  # fmt: skip
    assert set(config.duplicates.values()) == {"b64-scaling-none-epochs"}
    assert len(config.duplicates) == 3
    runs = [config.run_config(arm, 0) for arm in config.arms]
    assert [run.train.length_unit for run in runs] == ["epochs", "epochs", "updates", "epochs", "updates"]
    block = config.study.model_dump() | {"baseline": "b64-scaling-sqrt-updates"}
    named = validate(StudyConfig, config.model_dump() | {"study": block})
    assert named.baseline == "b64-scaling-none-epochs"


def test_swap_needs_the_rule_even_where_it_does_not_scale():
    """Its networks step with the rate for a share of the batch."""
    config = study({"optim.scaling": ["none", "sqrt"]}, **{"algorithm.local_sgd": "swap", "batch.global_size": 64})
    assert len(config.arms) == 2


def test_axes_survive_a_file_and_extend_another(tmp_path):
    (tmp_path / "base.yaml").write_text("study:\n  axes: {batch.global_size: [64], algorithm: {a: {}}}\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nstudy.axes: {algorithm: {b: {optim.lr: 0.5}}}\n")
    config = resolve(StudyConfig, [tmp_path / "top.yaml"], {})
    assert [arm.name for arm in config.arms] == ["b64-a", "b64-b"]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert resolve(StudyConfig, [tmp_path / "again.yaml"], {}) == config


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ({"batch.global_size": []}, "study.axes.batch.global_size"),
        ({"batch.globl_size": [3]}, "study arm globl_size3: batch.globl_size is not a setting.*did you mean"),
        ({"seed": [1, 2]}, "study arm seed1: seed cannot be set by an arm"),
        ({"optim.lr": [0.1, 0.1]}, "name lr0.1 more than once"),
        ({"a": {"x y": {}}}, r"x y"),
        ({"batch": {"global_size": [64]}}, "study.axes"),
    ],
)
def test_bad_axes_get_one_sentence(axes, says):
    with pytest.raises(UsageError, match=says) as error:
        _ = study(axes).arms
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("gpus", [1, 2, 8.0, 0.5, 0.3333, 1 / 3, 0.25, 0.2, 0.1666, 1 / 6, 0.1])
def test_parts_of_a_gpu_that_fill_one(gpus):
    assert (
        validate(RunConfig, {"launch": {"resources_per_rank": {"GPU": gpus}}}).launch.resources_per_rank["GPU"] == gpus
    )


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        ({"GPU": 0.3}, r"GPU \(0.3\) does not divide one GPU: choose 0.3333 for 3 rank\(s\) on a GPU, or 0.25 for 4"),
        ({"GPU": 0.33}, r"GPU \(0.33\) does not divide one GPU: choose 0.3333 for 3 .*, or 0.25 for 4"),
        ({"GPU": 0.1667}, r"GPU \(0.1667\) does not divide one GPU: choose 0.2 for 5 .*, or 0.1666 for 6"),
        ({"GPU": 0.6}, r"GPU \(0.6\) does not divide one GPU: choose 1 for 1 .*, or 0.5 for 2"),
        ({"GPU": 1.5}, r"GPU \(1.5\) is above one and not a whole number: choose 1 or 2"),
        ({"slot": 1e-5}, r"slot \(1e-05\) is less than Ray can count: choose 0.0001 or more"),
        ({"GPU": 0}, r"launch.resources_per_rank.GPU"),
        (
            {"GPU": 0.5, "num_processes": 2},
            r"GPU \(0.5\) would put .* choose launch.num_processes=1 \(it is 2\), or one",
        ),
        (
            {"GPU": 0.5, "max_processes": 3},
            r"GPU \(0.5\) would put .* choose launch.max_processes=1 \(it is 3\), or one",
        ),
    ],
)
def test_other_parts_of_a_gpu_are_refused(launch, says):
    ranks = {name: launch[name] for name in launch if name.endswith("processes")}
    amounts = {name: launch[name] for name in launch if name not in ranks}
    with pytest.raises(UsageError, match=says) as error:
        validate(RunConfig, {"launch": {"resources_per_rank": amounts, **ranks}})
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("launch.resources_per_rank")


def test_the_smallest_batch_is_the_baseline_unless_one_is_named():
    arms = [{"name": "big", "set": {"batch.global_size": 512}}, {"name": "mine"}, {"name": "same"}]
    study = {"batch": {"global_size": 32}, "study": {"arms": arms}}
    assert validate(StudyConfig, study).baseline == "mine"
    study["study"]["baseline"] = "big"
    assert validate(StudyConfig, study).baseline == "big"


def test_data_of_tokens_have_other_defaults():
    config = validate(RunConfig, {"data": {"name": "stdlib"}, "optim": {"lr": 1e-3}})
    assert (config.task.name, config.model.name, config.batch.global_size) == ("language_modeling", "gpt", 16)
    assert (config.optim.name, config.optim.lr, config.data.num_train) == ("adamw", 1e-3, 2_048)
    assert validate(RunConfig, config.model_dump(mode="json")) == config
    own = validate(RunConfig, {"data": {"name": "text", "root": "."}, "model": {"name": "my:net"}, "seed": 3})
    assert (own.task.name, own.model.name, own.data.num_train) == ("language_modeling", "my:net", None)
    assert RunConfig(data=own.data) == validate(RunConfig, {"data": {"name": "text", "root": "."}})
    everything = validate(RunConfig, {"data": {"name": "stdlib", "num_train": None}})
    assert everything.data.num_train is None
    assert validate(RunConfig, {"data": {"name": "digits"}}) == RunConfig()
    assert RunConfig().train.epochs == 20
    assert validate(RunConfig, {"data": {"name": "mnist"}}).train.epochs == 5
    assert validate(RunConfig, {"train": {"epochs": 3}}).train.epochs == 3
