"""A user's own data sets: all forms are the same data, held in memory or read; what is wrong with them is named."""

import json

import pytest
import torch

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets, reading, user
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info
from tests.conftest import config, cut_after, train, weights
from tests.data import own_sets
from tests.ranks import Forking

HERE = own_sets.__name__
FORMS = ["named_arrays", "rows", "tensors", "listed", "hugging_face"]
RUN = {
    "model__name": "mlp",
    "model__widths": (7,),
    "model__norm": "none",
    "batch__global_size": 40,
    "batch__micro_size": 16,
    "train__steps": 10,
    "train__num_evals": 2,
    "checkpoint__every_steps": 5,
    "checkpoint__keep": 9,
    "probe__num_samples": (64,),
    "probe__diagnostics": (),
}


@pytest.fixture(autouse=True)
def _forks(monkeypatch):
    """Processes that read are forks of the one of all tests."""
    monkeypatch.setattr(reading, "worker_context", lambda: Forking().context)


def load(name, **settings):
    return datasets.load(DataConfig(name=f"{HERE}:{name}", **settings))


def same(one, other):
    assert one.spec == other.spec
    assert one.digest() == other.digest()
    assert (one.pixels is None) == (other.pixels is None)
    for name in ("train", "val", "test"):
        part, again = getattr(one, name), getattr(other, name)
        assert torch.equal(part.targets, again.targets)
        assert torch.equal(part.inputs[:], again.inputs[:])


def quiet(*about):
    """No progress."""


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_data(form):
    if form == "hugging_face":
        pytest.importorskip("datasets", reason="datasets is not installed: pip install 'gengap_dist[datasets]'")
    given, expected = load(form), load("arrays")
    same(given, expected)
    assert torch.equal(given.train.inputs, torch.as_tensor(own_sets.INPUTS[:150]))
    assert (len(given.val), len(given.test), given.spec.num_classes) == (30, 40, 3)


def test_val_and_test_are_drawn_if_they_are_not_given():
    splits = load("only_train", split_seed=1)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [122, 13, 15]
    assert splits.facts["drawn_from_train"] == ["val", "test"]
    everything = torch.cat([splits.train.inputs, splits.val.inputs, splits.test.inputs])
    assert torch.equal(everything.sort(0).values, torch.as_tensor(own_sets.INPUTS[:150]).sort(0).values)
    other = load("only_train", split_seed=2)
    assert torch.equal(splits.test.inputs, other.test.inputs)  # the same for all seeds
    assert not torch.equal(splits.val.inputs, other.val.inputs)


def test_images_and_subsets_are_the_same_held_or_read():
    for settings in ({"image_size": 8}, {"image_size": 8, "num_train": 90, "shuffle_labels": True}):
        held, read = load("images", **settings), load("images", streaming=True, **settings)
        same(held, read)
        assert torch.equal(held.pixels.mean_C, read.pixels.mean_C)
        assert isinstance(read.train.inputs, reading.ReadInputs)
    chosen = torch.tensor([4, 80, 4, 7])
    read.train.prefetch(torch.arange(50))  # other samples may be taken in between, also those that are announced
    assert torch.equal(read.train.inputs[chosen], held.train.inputs[chosen])
    assert torch.equal(read.train.inputs[:50], held.train.inputs[:50])
    assert torch.equal(read.train.inputs[chosen], held.train.inputs[chosen])


def test_a_run_is_bitwise_the_same_held_or_read_and_after_a_kill(tmp_path):
    sam = {"algorithm__sam_rho": 0.05}  # takes each batch twice
    held = RUN | sam | {"data__name": f"{HERE}:rows"}
    train(tmp_path / "held", **held)
    read = held | {"data__memory_gib": 1e-6, "data__workers": 2}
    train(tmp_path / "read", **read)
    cut_after(tmp_path / "read", 5)
    train(tmp_path / "read", resume=True, **read)
    for name, value in weights(tmp_path / "held").items():
        assert torch.equal(value, weights(tmp_path / "read")[name]), name
    one, other = (read_info(tmp_path / name) for name in ("held", "read"))
    assert one.data == other.data
    assert one.result["test/loss"] == other.result["test/loss"]


@pytest.mark.parametrize("name", ["stream", "stateful_stream"])
def test_a_stream_is_the_same_held_or_read_and_continues_by_its_own_state(tmp_path, monkeypatch, name):
    monkeypatch.setattr(user, "RECENT_BYTES", 1)  # it has no sample again that was read before
    settings = RUN | {"data__name": f"{HERE}:{name}"}
    train(tmp_path / "held", **settings)
    train(tmp_path / "read", **settings | {"data__streaming": True})
    assert read_info(tmp_path / "read").data["in_order"]
    cut_after(tmp_path / "read", 5)
    own_sets.StatefulStream.loaded = ()
    train(tmp_path / "read", resume=True, **settings | {"data__streaming": True})
    if name == "stateful_stream":
        assert 40 in own_sets.StatefulStream.loaded  # after five steps: an epoch of 150, and 40 more
    for key, value in weights(tmp_path / "held").items():
        assert torch.equal(value, weights(tmp_path / "read")[key]), key


def test_tokens_of_a_user():
    splits = load("tokens", val_fraction=0.0)
    assert splits.spec == datasets.DataSpec.tokens(11, 8)
    assert int(splits.train.targets.min()) == -100
    assert load("tokens", vocab_size=20).spec.num_classes == 20
    with pytest.raises(UsageError, match=r"data.vocab_size \(9\) has no token 10, which"):
        load("tokens", vocab_size=9)
    with pytest.raises(UsageError, match=r"data.vocab_size \(9\) is for tokens, and"):
        load("rows", vocab_size=9)


def test_a_language_model_learns_from_them(tmp_path):
    model = {"model__name": "gpt", "model__depth": 1, "model__width": 8, "model__heads": 2}
    own = {
        "data__name": f"{HERE}:tokens",
        "task__name": "language_modeling",
        "train__steps": 2,
        "probe__num_samples": (16,),
    }
    result = train(tmp_path / "run", **RUN | model | own | {"batch__global_size": 8})
    assert json.dumps(result["test/loss"]) != "NaN"


@pytest.mark.processes
@pytest.mark.parametrize("name", ["rows", "stateful_stream"])
def test_ranks_that_read_change_nothing(pools, tmp_path, name):
    """Two ranks read and are killed, and three go on."""
    settings = RUN | {"data__name": f"{HERE}:{name}", "train__dtype": "float64"}
    train(tmp_path / "1", **settings)
    read = settings | {"data__streaming": True, "data__workers": 1}
    pools[2].run(config(**read | {"batch__micro_size": 9}), tmp_path / "2", resume=False, progress=quiet)
    cut_after(tmp_path / "2", 5)
    pools[3].run(config(**read | {"batch__micro_size": 9}), tmp_path / "2", resume=True, progress=quiet)
    for key, value in weights(tmp_path / "1").items():
        assert torch.allclose(value, weights(tmp_path / "2")[key], rtol=1e-12, atol=1e-14), key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", 'returns nothing: end the function with return {"train": ..., "test": ...}'),
        ("number", "returns an int without train: return"),
        ("only_dataset", "returns a Rows without train: return"),
        ("misspelled", "returns the part 'tset': name the parts train, val and test"),
        ("no_length", "train has no length (object of type 'NoLength' has no len()): add __len__ to the data set"),
        ("text", "train is a str, no data set and no arrays: return a data set with __len__"),
        ("empty", "train has no samples: return at least one"),
        ("other_keys", "train, sample 0, has no inputs, it has x, y: return inputs and targets by these names"),
        ("three", "train, sample 0, is a tuple, not inputs and targets: return"),
        ("ragged", "train, sample 7, has inputs of shape [3] and type float32, and the first training sample of shape"),
        ("raises", "train cannot be read at sample 7 (/"),
        ("raises", "KeyError: 'outputs'): fix the data set"),
        ("strings", "train, sample 0, has inputs that are no array of numbers (a str: "),
        ("ragged_inside", "train, sample 0, has inputs that are no array of numbers (a list: "),
        ("infinite", "train, sample 9, has inputs that are not finite: replace them"),
        ("two_names", "returns val and validation, which are two names of one part: return one of them"),
        ("channels_last", "returns images of shape [6, 6, 3] and type uint8 each, and channels come first: return"),
        ("negative", "train has the class -1: number classes from 0"),
        ("unequal", "test, sample 0, has inputs of shape [5] and type float32, and the first training sample of shape"),
        ("real_test", "test, sample 0, has targets of shape [] and type int64, and the first training sample of shape"),
        ("random", "train returns another sample 0 each time: leave random changes to data.augment"),
        ("stream_alone", "returns an iterable data set, of which no test samples can be drawn: return test"),
        ("bad_state", "train has a Generator in its state_dict, and a checkpoint holds plain data only: return"),
        ("ends", "it ended after 7 samples, and had 9 in its first pass"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(name, message):
    with pytest.raises(UsageError) as error:
        load(name, val_fraction=0.1)
    assert str(error.value).startswith(f"data.name ({HERE}:{name})")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["ragged", "raises"])
def test_what_is_wrong_is_named_by_processes_that_read(name):
    with pytest.raises(UsageError, match=r"cannot be sent to the processes that read it \(.*lambda"):
        load(name, streaming=True)


def test_a_process_that_reads_and_is_killed_is_named():
    with pytest.raises(
        UsageError, match=r"a process that reads data.name \(.*:killed\) has ended \(.*lower data.workers"
    ):
        load("killed", streaming=True, workers=1)


def test_a_subset_of_a_stream_without_validation_samples():
    splits = load("stream_without_val", val_fraction=0.0, num_train=20)
    assert (len(splits.train), len(splits.val)) == (20, 0)
    everything = load("stream_without_val", val_fraction=0.0)
    rows = [(everything.train.inputs == row).all(1).nonzero().item() for row in splits.train.inputs]
    assert rows == sorted(rows)


def test_what_needs_samples_from_anywhere_needs_a_stream_that_memory_holds(tmp_path):
    mixed = {"image_size": 8, "augment": ("mixup",)}
    assert load("stream_of_images", **mixed).train.stream is None
    with pytest.raises(UsageError, match=r"data.augment \(mixup\) mixes .* raise data.memory_gib \(8\) until"):
        load("stream_of_images", streaming=True, **mixed)
    raised = RUN | {"data__name": f"{HERE}:stream", "algorithm__rank_penalty": 0.1}
    train(tmp_path / "held", **raised)
    with pytest.raises(UsageError, match=r"algorithm.rank_penalty \(0.1\) measures samples from anywhere, and the"):
        train(tmp_path / "read", **raised | {"data__streaming": True})


def test_a_stream_that_may_never_end_is_said_to_be_counted(monkeypatch):
    monkeypatch.setattr(user, "COUNT_SECONDS", -1.0)
    with pytest.warns(UserWarning, match=r"stream_without_val\): train has at least 1 samples, which are still"):
        load("stream_without_val", val_fraction=0.0)
