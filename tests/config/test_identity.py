"""What makes two runs the same experiment: one declaration for each setting, and all answers agree with it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from gengap_dist.analysis.arm_roles import RANK, Arm, roles
from gengap_dist.analysis.group_runs import gather
from gengap_dist.config.identity import (
    counterpart_key,
    declared_effect,
    differences,
    effective_settings,
    identifying_settings,
    treatment,
)
from gengap_dist.config.loading import field_names, flat, nested, validate
from gengap_dist.config.sections import RunConfig, Section
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs.mixtures import data_key
from gengap_dist.tracking.mlflow.importer import SourceNames
from tests.cli.test_compare import run_folder

NAMES = [*field_names(RunConfig)]
SETTINGS = [name for name in NAMES if not any(other.startswith(f"{name}.") for other in NAMES)]
RUNTIME = {
    "profile", "data.root", "data.download", "data.memory_gib", "data.workers", "data.device", "batch.micro_size",
    "train.channels_last", "train.compile", "train.activation_checkpointing",
}  # fmt: skip
OBSERVATION = {"train.target_accuracy", "train.target_loss", "train.num_evals", "train.log_every"}
CONTEXT: Mapping[str, dict[str, Any]] = {  # where another value of a setting is valid, and means something
    "data.name": {"train.epochs": 5},  # their default follows the data
    "data.streaming": {"data.name": "imagefolder"},
    "data.subset": {"data.num_train": 100},
    "data.vocab_size": {"data.name": "tokens", "data.vocab_size": 9},
    "model.norm": {"model.norm": "group"},  # null is one of the others: without groups, local
    "model.width": {"model.heads": 1},
    "batch.schedule_unit": {"data.name": "stdlib"},
    "train.tokens": {"data.name": "stdlib"},
    "train.stop_at_target": {"train.target_accuracy": 0.9},
    "train.length_unit": {"optim.base_size": 32},
    "optim.scaling": {"optim.base_size": 32},
    "optim.beta2_scaling": {"optim.base_size": 32, "optim.name": "adamw"},
    "optim.weight_decay_scaling": {"optim.base_size": 32, "optim.name": "adamw", "optim.weight_decay": 0.1},
    "optim.base_size": {"optim.base_size": 32, "optim.scaling": "sqrt"},
    "algorithm.gradient_penalty": {"algorithm.gradient_penalty": 0.1, "algorithm.penalty_size": 16},
    "algorithm.penalty_size": {"algorithm.gradient_penalty": 0.1, "algorithm.penalty_size": 16},
    "algorithm.placebo_of": {"algorithm.rank_measure": "placebo", "algorithm.placebo_of": "logdet"},
    "batch.micro_size": {"model.norm": "none"},
    "launch.num_processes": {"model.norm": "none"},
    "launch.max_processes": {"model.norm": "none"},
}
VALUES = (2, 3, 0.5, 0.25, True, False, "other", "other:other", [3], [0.25], [0.5, 0.5], ["other"])
VALUES += ({"CPU": 2.0}, [{"at": 0, "size": 64}])


def config(**given: Any) -> RunConfig:
    return validate(RunConfig, nested({key.replace("__", "."): value for key, value in given.items()}))


def choices(annotation: Any) -> Iterator[Any]:
    """The values of all Literals in an annotation."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from choices(part)


def pair(name: str) -> tuple[RunConfig, RunConfig, Any]:
    """Two configs that differ in one setting only, and its value in the second."""
    base = config(**CONTEXT.get(name, {}))
    model: Any = RunConfig
    field: Any = None
    for part in name.split("."):
        field = model.model_fields[part]
        model = field.annotation
    literals = [*choices(field.annotation)]
    for value in (*literals, *([value] for value in literals), *VALUES):
        try:
            changed = config(**CONTEXT.get(name, {}) | {name: value})
        except UsageError:
            continue
        if flat(changed) != flat(base):
            return base, changed, value
    raise AssertionError(f"{name} has no other value that is valid: add one to VALUES, or settings to CONTEXT")


# -- the five answers, as their users ask for them ---------------------------------------------------------------------


def may_resume(base: RunConfig, changed: RunConfig) -> bool:
    return not differences(base.model_dump(mode="json"), changed)


def are_one_run(base: RunConfig, arms: Mapping[str, Any]) -> bool:
    study = base.model_dump(mode="json") | {"study": {"axes": {"axis": dict(arms)}}}
    return len(validate(StudyConfig, study).arms) == 1


def are_one_group(base: RunConfig, changed: RunConfig, folder: Path) -> bool:
    for name, each in {"a": base, "b": changed}.items():
        settings = {key: value for key, value in flat(each).items() if key not in ("seed", "batch.global_size")}
        run_folder(folder / name, each.batch.global_size, each.seed, 0.9, **settings)
    return len(gather([str(folder)], folder / "out", SourceNames(), None, "", across=True)[0].arms) == 1


def is_counterpart(base: RunConfig, changed: RunConfig) -> bool:
    """Whether the base is the counterpart of the changed settings with a rank penalty."""
    penalised = flat(changed) | {"algorithm.rank_penalty": 0.1}
    arms = {
        name: Arm(name, {}, size, settings)
        for name, size, settings in [
            ("base", base.batch.global_size, flat(base)),
            ("penalised", changed.batch.global_size, penalised),
        ]
    }
    return bool(roles(arms, "base").interventions)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_five_answers_agree_with_the_declaration(name, tmp_path):
    base, changed, value = pair(name)
    effect = declared_effect(name)
    same_experiment = effect != "result"
    assert may_resume(base, changed) == (effect == "runtime")
    if name == "seed":  # a replicate: another run of the same arm
        same_experiment = True
        with pytest.raises(UsageError, match="seed cannot be set by an arm"):
            are_one_run(base, {"a": {}, "b": {name: value}})
    else:
        assert are_one_run(base, {"a": {}, "b": {name: value}}) == (effect == "runtime")
    assert are_one_group(base, changed, tmp_path) == same_experiment
    plain = same_experiment or name == "batch.global_size"  # the factor: another arm, but no treatment
    found = treatment(flat(changed), flat(base))
    words = [word.partition("=")[0].removesuffix(".CPU") for word in found.split()]  # CPU: in a mapping
    assert found == "plain" if plain else words == [name]
    in_remedy = name in RANK
    assert is_counterpart(base, changed) == (same_experiment or in_remedy)


def test_what_each_setting_affects():
    found = {
        effect: {name for name in SETTINGS if declared_effect(name) == effect} for effect in ("observation", "runtime")
    }
    assert {name for name in found["runtime"] if not name.startswith(("launch.", "checkpoint.", "mlflow."))} == RUNTIME
    assert {name for name in found["observation"] if not name.startswith("probe.")} == OBSERVATION


@pytest.mark.parametrize(
    ("name", "effect"),
    [
        ("study.concurrent", "runtime"),
        ("study.question", "observation"),
        ("study.axes.batch.global_size", "result"),
        ("study.tune.space.optim.lr.low", "result"),
        ("launch.resources_per_rank.CPU", "runtime"),
        ("launch.hang_seconds", "runtime"),  # a former name, in old run folders
        ("train.recompute", "runtime"),
        ("recipe.sam_rho", "result"),
        ("launch.gpus", "result"),  # of another program
        ("seed_everything", "result"),
        ("profiler", "result"),
        ("probe", "result"),
        ("", "result"),
    ],
)
def test_names_that_are_not_settings_of_a_run(name, effect):
    assert declared_effect(name, StudyConfig) == effect


def test_a_section_must_say_what_it_affects():
    with pytest.raises(AssertionError, match=r"class Silent does not say what its settings affect: add affects="):

        class Silent(Section):
            pass


# -- conditions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "change", "words"),
    [
        (False, {"train__target_accuracy": 0.95}, "plain"),
        (False, {"train__target_accuracy": None}, "plain"),
        (False, {"train__num_evals": 5}, "plain"),
        (True, {"train__target_accuracy": 0.95}, "train.target_accuracy=0.95"),
        (True, {"train__num_evals": 5}, "train.num_evals=5"),  # the target is noticed at an evaluation
        (True, {"train__log_every": 5}, "plain"),
    ],
)
def test_a_target_is_part_of_the_result_if_the_run_stops_there(stops, change, words, tmp_path):
    settings = {"train__target_accuracy": 0.9, "train__stop_at_target": stops}
    base, changed = config(**settings), config(**settings | change)
    assert treatment(flat(changed), flat(base)) == words
    assert are_one_group(base, changed, tmp_path) == (words == "plain")
    assert is_counterpart(base, changed) == (words == "plain")
    assert not may_resume(base, changed)
    assert not are_one_run(base, {"a": {}, "b": {key.replace("__", "."): value for key, value in change.items()}})


@pytest.mark.parametrize("name", ["batch.micro_size", "launch.num_processes", "launch.max_processes"])
@pytest.mark.parametrize(("norm", "same"), [(None, False), ("local", False), ("group", True)])
def test_ranks_and_micro_batches_make_another_run_with_local_batch_norm(name, norm, same):
    assert are_one_run(config(model__norm=norm), {"a": {}, "b": {name: 2}}) == same


@pytest.mark.parametrize(("algorithm", "same"), [(None, True), ("post_local_sgd", True), ("swap", False)])
def test_a_rule_that_scales_by_one_is_the_same_run(algorithm, same, tmp_path):
    """But the networks of swap have the rate that it gives for their own batch."""
    settings = {"optim__base_size": 64, "algorithm__local_sgd": algorithm}
    base, changed = config(**settings), config(**settings, optim__scaling="sqrt")
    assert are_one_run(base, {"a": {}, "b": {"optim.scaling": "sqrt"}}) == same
    assert are_one_group(base, changed, tmp_path) == same
    assert is_counterpart(base, changed) == same


def test_rules_of_adam_are_what_they_amount_to():
    """An arm with a rule is the same experiment as one whose settings are written out, and at k = 1 as one without."""
    base = {"optim.name": "adamw", "optim.base_size": 64, "optim.lr": 0.01, "optim.weight_decay": 0.1}
    large = flat(config(**base, **{"batch.global_size": 256}))
    rules = [
        ({"optim.scaling": "adam_sqrt"}, {"optim.lr": 0.02, "optim.betas": [0.6, 0.996], "optim.eps": 5e-9}),
        ({"optim.beta2_scaling": "half_life"}, {"optim.betas": [0.9, round(0.999**4, 15)]}),
        ({"optim.weight_decay_scaling": "linear"}, {"optim.weight_decay": 0.4}),
    ]
    for rule, amounts in rules:
        found = effective_settings(flat(config(**base | rule, **{"batch.global_size": 256})))
        assert found == effective_settings(large) | amounts
        assert identifying_settings(config(**base | rule)) == identifying_settings(config(**base))


def test_betas_of_another_program_stay_as_they_are():
    scaled = {"batch.global_size": 256, "optim.base_size": 64, "optim.scaling": "adam_sqrt"}
    for betas in (["a"], [0.9], None, "high"):
        assert effective_settings(scaled | {"optim.betas": betas})["optim.betas"] == betas


def test_a_run_that_lacks_a_setting_of_today_had_its_default(tmp_path):
    for seed, (name, settings) in enumerate({"old": {}, "new": {}, "other": {"model.depth": 3}}.items()):
        run_folder(tmp_path / name, 64, seed, 0.9, **settings)
    info = json.loads((tmp_path / "old" / "run.json").read_text())
    del info["config"]["model"]["depth"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(info))
    found, _ = gather([str(tmp_path)], tmp_path / "out", SourceNames(), None, "", across=True)
    assert sorted(len(found.finished_runs(arm)) for arm in found.arms) == [1, 2]
    old, new, other = ({"data": {}}, {"data": {"context": 128}}, {"data": {"context": 7}})
    assert data_key(old) == data_key(new) != data_key(other)


def test_batch_norm_is_named_by_its_rule_or_by_its_groups():
    """Without a rule, groups are ghost groups; without both, batch norm is local."""
    groups = {"batch.global_size": 512, "batch.ghost_size": 64}
    assert counterpart_key(groups | {"model.norm": None}) == counterpart_key(groups | {"model.norm": "ghost"})
    alone = {"batch.global_size": 512, "batch.ghost_size": None}
    assert counterpart_key(alone | {"model.norm": None}) == counterpart_key(alone | {"model.norm": "local"})
    assert counterpart_key(alone | {"model.norm": None}) != counterpart_key(alone | {"model.norm": "sync"})


@pytest.mark.parametrize(("schedule", "is_whole"), [([], True), ([[1, 512]], False)])
def test_one_ghost_group_is_the_whole_batch_unless_the_batch_grows(schedule, is_whole):
    batch = {"batch.global_size": 64, "batch.schedule": schedule}
    one_group = counterpart_key(batch | {"model.norm": "ghost", "batch.ghost_size": 64})
    assert (one_group == counterpart_key(batch | {"model.norm": "sync", "batch.ghost_size": None})) == is_whole
