"""Every file in configs/ says what can be run: all its settings hold together, and its networks can be built."""

import hashlib
import json

import pytest
import torch

from gengap_dist import models
from gengap_dist.config.loading import flat, load_yaml, resolve
from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.data import datasets
from gengap_dist.distributed.process_group import World
from gengap_dist.probes.layers import select_layers
from tests.conftest import ROOT

FILES = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT / "configs")) for path in FILES]
REGISTERED = json.loads((ROOT / "tests/config/registered.json").read_text())
PAIRS = [
    *["lenet5_mnist", "lenet5_fashionmnist", "vgg16_cifar10", "vgg16_cifar100", "resnet56_cifar10"],
    *["resnet56_cifar100", "hoffer_f1_mnist", "lenet5_fashionmnist_recipes"],
]


def runs(path) -> list[RunConfig]:
    if "study" not in load_yaml(path):
        return [resolve(RunConfig, [path], {})]
    study = resolve(StudyConfig, [path], {})
    return [study.run_config(arm, seed) for arm in study.arms for seed in study.study.seeds]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_run_is_valid_and_no_two_are_the_same(path):
    configs = runs(path)
    assert len({config.model_dump_json() for config in configs}) == len(configs)
    for config in configs:
        assert config.norm != "sync" or config.batch.micro_size >= config.batch.global_size


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_a_study_of_its_own_name_with_a_small_batch_as_its_baseline(name):
    path = ROOT / "configs" / f"{name}.yaml"
    study = resolve(StudyConfig, [path], {})
    model, data = name.removesuffix("_recipes").removeprefix("hoffer_").split("_")
    assert (study.study.name, study.model.name, study.data.name.replace("_", "")) == (name, model, data)
    assert study.study.question
    assert f"--config configs/{name}.yaml" in path.read_text().partition("\ndata:")[0]
    sizes = {arm.name: study.run_config(arm, 0).batch.global_size for arm in study.arms}
    assert sizes[study.baseline] == min(sizes.values())
    for arm, size in sizes.items():
        assert arm.startswith((f"sb{size}", f"lb{size}", f"grow{size}"))


# those of bases/ leave the network to the files that extend them
@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name != "bases"], ids=lambda path: path.name)
def test_layers_of_a_rank_penalty_exist(path):
    asked = {"data": True, "model": True, "algorithm": {"rank_layers"}}
    penalised = [config for config in runs(path) if config.algorithm.rank_penalty]
    for config in {config.model_dump_json(include=asked): config for config in penalised}.values():
        own = config.data.name == "imagefolder"  # its images may be missing: those of CIFAR-10 have as many channels
        data = config.data.model_copy(update={"name": "cifar10"}) if own else config.data
        spec = datasets.sizes(data).spec  # of images or tokens
        model = models.from_config(config, spec, World()).eval()
        assert select_layers(model, spec.zero_inputs(1, torch.float32), config.algorithm.rank_layers)


@pytest.mark.parametrize("name", sorted(REGISTERED["sha256"]))
def test_registered_studies_have_the_settings_that_they_had(name):
    """Whatever defaults have become since: of the settings that there were."""
    study = resolve(StudyConfig, [ROOT / "configs" / name], {})
    settings = {arm.name: flat(study.run_config(arm, 0)) for arm in study.arms}
    kept = [[arm, {each: given[each] for each in REGISTERED["names"]}] for arm, given in settings.items()]
    assert hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest() == REGISTERED["sha256"][name]
