"""`gengap probe --weights` of files that other programs have written."""

import pytest
import torch
from torch import nn

from gengap_dist.cli import probe
from gengap_dist.cli.exit_codes import run_command
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError
from gengap_dist.models import build
from gengap_dist.runs import checkpoint

pytestmark = pytest.mark.usefixtures("few_figures")


def network() -> nn.Module:
    return build("lenet5", DataSpec.images(num_classes=10, in_channels=1))


def test_a_whole_network_is_named_and_not_loaded(tmp_path, capsys):
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(SystemExit) as exit_:
        run_command("gengap probe", probe.command, ["--model", "lenet5", "--weights", "whole.pt"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "whole.pt holds Python objects (" in err
    assert "such as a whole network" in err
    assert "torch.save(network.state_dict(), FILE)" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is damaged, or no file of torch.save"),
        (b"no weights", "is damaged, or no file of torch.save"),
        (torch.zeros(3), "holds a Tensor, needs a state dict"),
        ({}, "holds no state dict"),
        ({"state_dict": {1: torch.zeros(3)}}, "holds no state dict"),
    ],
)
def test_what_is_no_state_dict_is_told(tmp_path, content, says):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match=says):
        checkpoint.load_weights(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
def test_the_names_of_wrappers_are_removed(tmp_path, prefix, key):
    given, wanted = network(), network()
    state = {prefix + name: value for name, value in given.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "w.pt")
    bare, removed = checkpoint.without_wrappers(checkpoint.load_weights(tmp_path / "w.pt"), wanted)
    checkpoint.restore(wanted, bare, tmp_path / "w.pt")
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in given.state_dict().items())
    assert "".join(sorted(removed)) == "".join(sorted(prefix.replace(".", ". ").split()))


def test_a_network_that_has_such_a_name_keeps_it():
    model = nn.Sequential()
    model.module = nn.Linear(2, 2)
    bare, removed = checkpoint.without_wrappers(dict(model.state_dict()), model)
    assert bare.keys() == model.state_dict().keys()
    assert not removed


def test_the_command_says_what_was_removed(tmp_path):
    state = {f"module.{name}": value for name, value in network().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    words = ["--model", "lenet5", "--weights", "w.pt", "--probe.num_samples", "32", "--probe.layers", "fc2"]
    words += ["--probe.diagnostics", "[]"]
    with pytest.warns(UserWarning, match=r"module. was removed from the names in .*w.pt"):
        assert probe.command(words) == 0
