"""One command line for all commands: settings have one name, and what is wrong with it is said in one sentence."""

from importlib import import_module

import pytest
from pydantic import BaseModel
from torch import nn

from gengap_dist.cli.exit_codes import run_command
from gengap_dist.cli.options import Options, parse
from gengap_dist.config.loading import RENAMED, field_names
from gengap_dist.config.sections import ModelConfig, RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import MAX_SENTENCE, UsageError
from gengap_dist.models import build
from tests.conftest import ROOT

DEMO, STUDY = ROOT / "configs" / "demo_train.yaml", ROOT / "gengap_dist" / "configs" / "demo.yaml"
COMMANDS = ("demo", "train", "study", "plan", "doctor", "probe", "compare", "report", "clean")


def say(capsys, command: str, *words: object) -> str:
    """What a command says that must end with 2 and a sentence of 300 characters."""
    with pytest.raises(SystemExit) as end:
        run_command("gengap", import_module(f"gengap_dist.cli.{command}").command, [*map(str, words)])
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert said.err.startswith("gengap: ")
    assert said.err.count("\n") == 1
    assert len(said.err.strip()) <= MAX_SENTENCE + len("gengap: ")
    assert not any(name in said.err for name in ("Error:", "Exception", "Traceback"))
    return said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.widths", "128", "128"], "--model.widths takes one value, not 2: write [128, 128]"),
        (["--model.widths", "3", "--model.widths", "4"], "--model.widths is given twice: write one list, [3, 4]"),
        (["--seed", "1", "2"], "--seed takes one value, not 2: write one of them"),
        (["--batch.size", "128"], "--batch.size is called --batch.global_size now"),
        (["--optim.learning_rate", "3"], "--optim.learning_rate is called --optim.lr now"),
        (["--train.max-epochs", "3"], "--train.max-epochs is called --train.epochs now"),
        (["--lr", "3"], "--lr is not a setting (did you mean --optim.lr?)"),
        (["--train.global-size", "3"], "(did you mean --batch.global_size?)"),
        (["--batch", "128"], "--batch is a section: give one of its settings, such as --batch.global_size"),
        ([""], "an empty word is not a setting"),
        (["--"], "-- is not a setting"),
        (["--out=--"], "--out=-- gives no value"),
        (["--probe.at_losses", "\ud800"], "half a character"),
        (["--seed", ""], "--seed () is empty: give a value"),
        (["--model.widths", ""], "--model.widths () is empty: give a value"),
        (["--out", ""], "--out () is empty: give a file or folder"),
        (["--config="], "--config () is empty: give a file or folder"),
        (["--data.root", ""], "--data.root () is empty: give a file or folder"),
        ([DEMO], "is not a setting: write --config /"),
        (["--config", DEMO, "b.yaml"], "b.yaml is not a setting: write --config b.yaml for a file with settings"),
        (["--out", "a\0b"], r"the path (a\x00b) is no path"),
        (["--data.name", "a\0b"], r"--data.name (a\x00b) holds a NUL"),
        (["--mlflow.experiment", "caf\udce9"], "half a character"),
        (["--seed", "2026-13-45"], "seed (2026-13-45) is not valid"),
        (["--train.tf32", "yes"], "train.tf32 (yes) is not valid: input should be true or false"),
        (["--data.download", "1"], "data.download (1) is not valid: input should be true or false"),
        (["--data.num_train", "None"], "data.num_train (None) is not valid (did you mean null?): input should be"),
        (["--seed", "9" * 5000], "is too large a number"),
        (["--optim.lr", "1e999"], "--optim.lr (1e999) is not a finite number"),
        (["--optim.lr", "x" * 100_000], "x) is not valid"),
        (["--optim.lr" + "x" * 100_000, "3"], "is not a setting"),
        (["--config", "x" * 100_000], "has a name of more than 255 bytes: shorten it"),
        (["--out", "a/" + "x" * 256], "has a name of more than 255 bytes: shorten it"),
        (["--data.name", "x y " * 30_000], "your own module.path:factory"),
        (["--optim.lr", "\x1b[2J\n\u2028"], r"optim.lr (\x1b[2J"),
        (["--model.widths", "[1, 2"], "--model.widths ([1, 2) is not YAML"),
        (["--launch.resources_per_rank", "GPU=1"], "(GPU=1) is one value: write `name: value`"),
        (["--launch.resources_per_rank", "{GPU: 1, GPU: 1}"], "gives GPU twice"),
        (["--algorithm.rank_penalty", "-1e-3"], "--algorithm.rank_penalty=VALUE for one that begins with -"),
        (["--resume=yes"], "--resume takes no value: write it alone"),
        (["--config", STUDY], "start it with gengap study"),
    ],
)
def test_train_says_what_is_wrong(capsys, words, says):
    assert says in say(capsys, "train", *words, "--print_config")


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("doctor", ["--config", STUDY, "--study.baseline", "x"], "study.baseline (x) is not an arm"),
        ("study", ["--config", DEMO], "study is not set, and a study needs its arms"),
        ("study", ["--study.axes", "{lr: [0.1]}"], "study arm lr0.1: lr is not a setting (did you mean optim.lr?)"),
        ("study", ["--study.arms", "[{name: warm, set: {optim.lr: 1}}]"], "or write baseline: warm in study:\n"),
        ("study", ["--config", STUDY, "--study.seeds", "0", "1"], "write [0, 1]"),
        ("study", ["--config", STUDY, "--study.arms", "a"], "study.arms (a) is one value"),
        ("plan", ["--nodes", "9" * 5000], "--nodes (9999"),
        ("plan", ["--nodes", "true"], "nodes (true) is not valid"),
        ("probe", [], "--model must be given"),
        ("probe", ["--model", "resnet18"], "(did you mean torchvision:resnet18?)"),
        ("probe", ["--model", "resnt56"], "(did you mean resnet56?)"),
        ("probe", ["--model", ":"], "model.name (:) cannot be imported (it is no such name)"),
        ("probe", ["--model", ".:x"], "model.name (.:x) cannot be imported (it is no such name)"),
        ("probe", ["--model", "math:sqrt"], "model.name (math:sqrt) failed (math.sqrt() takes exactly one argument"),
        ("probe", ["--model", "lenet5", "--data_root", "x"], "--data_root is called --data.root now"),
        ("probe", ["--model", "lenet5", "--num_samples", "3", "4"], "--num_samples is called --probe.num_samples now"),
        ("probe", ["--model", "lenet5", "--optim.lr", "3"], "--optim.lr is not a setting"),
        ("probe", ["--model", "lenet5", "--data", "mnist"], "such as --data.name"),
        ("compare", [], "RUN must be given"),
        ("compare", [""], "the path () is empty"),
        ("compare", ["a", "--tracking_uri", "x"], "--tracking_uri is called --mlflow.tracking_uri now"),
        ("report", [], "DIR must be given"),
        ("report", [""], "DIR () is empty"),
        ("report", ["a\0b"], "is no path"),
        ("report", ["slim", "a"], "OUT must be given"),
        ("report", ["a", "b"], "b is not a setting"),
        ("report", ["--pdf=1", "a"], "--pdf takes no value"),
        ("clean", [], "FOLDER must be given"),
        ("clean", ["nowhere"], "contains neither run.json nor study.json: give the folder of a run or study"),
        ("clean", ["a", "--what", "models"], "what (models) is not valid: input should be 'checkpoints', 'all_checkp"),
        ("clean", ["a", "--what="], "what () is not valid"),
    ],
)
def test_the_others_say_what_is_wrong(capsys, command, words, says):
    assert says in say(capsys, command, *words)


def test_an_error_of_the_system_names_its_file(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        run_command("gengap", lambda argv: tmp_path.write_text(""), [])
    assert end.value.code == 1
    said = f"gengap: {tmp_path} cannot be used (Is a directory); --debug shows the traceback\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_setting_has_the_same_name_in_every_command(capsys, command):
    with pytest.raises(SystemExit):
        import_module(f"gengap_dist.cli.{command}").command(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    names = {word.removeprefix("--") for line in lines if line.startswith("--") for word in [line.split()[0]]}
    assert ("data.root" in names) == (command not in ("compare", "report", "clean"))
    assert {name for name in names if "." in name} <= {*leaves(StudyConfig)}
    assert not names & RENAMED.keys()


def test_help_says_what_an_option_is_in_this_command(capsys):
    said = {}
    for command in ("train", "study", "demo"):
        with pytest.raises(SystemExit):
            import_module(f"gengap_dist.cli.{command}").command(["--help"])
        said[command] = " ".join(capsys.readouterr().out.split())
    assert "Folder of the study; default: studies/NAME, with study.name." in said["study"]
    assert "Folder of the study; default: demo." in said["demo"]
    for command, text in said.items():
        assert ("Not needed: a study that is there is always continued." in text) == (command != "train")
        assert ("default: a new folder named after the settings" in text) == (command == "train")


def test_help_names_all_that_a_factory_of_a_network_may_take():
    taken = build("tests.cli.test_command_line:everything", DataSpec.images(num_classes=3, in_channels=1), options={})
    said = str(ModelConfig.model_fields["name"].description)
    assert {name for name in vars(taken)["taken"] if name not in said} == set()
    assert {"widths", "activation", "options", "num_classes", "input_shape"} <= vars(taken)["taken"]


def everything(
    widths=(), activation="", options=None, num_classes=0, in_channels=0, image_size=0, input_shape=(), output_shape=(),
    depth=0, width=0, heads=0,
):  # fmt: skip
    network = nn.Identity()
    given = {"widths": widths or (1,), "activation": activation, "options": options is not None and (1,)}
    given |= {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    given |= {"input_shape": input_shape, "output_shape": output_shape, "depth": depth, "width": width, "heads": heads}
    network.taken = {name for name, value in given.items() if value}  # pyright: ignore[reportArgumentType]
    return network


def leaves(model: type[BaseModel]) -> list[str]:
    names = [*field_names(model), *(f"study.tune.{name}" for name in ("trials", "seed", "space"))]
    return [
        *names,
        *(f"study.match.{name}" for name in ("arms", "seed", "between", "tolerance", "max_runs", "low", "high")),
    ]


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--model.widths", "3,4"], {"model": {"widths": [3, 4]}}),
        (["--model.widths", "[3, 4]"], {"model": {"widths": [3, 4]}}),
        (["--model.widths=5"], {"model": {"widths": [5]}}),
        (["--probe.layers", "fc*, *"], {"probe": {"layers": ["fc*", "*"]}}),
        (["--probe.at_losses", "off"], {"probe": {"at_losses": ["off"]}}),
        (["--launch.resources_per_rank", '{"GPU": 0.5}'], {"launch": {"resources_per_rank": {"GPU": 0.5}}}),
        (["--mlflow.experiment", "1e5"], {"mlflow": {"experiment": "1e5"}}),
        (["--mlflow.tracking_uri", "null"], {"mlflow": {"tracking_uri": None}}),
        (["--optim.lr", "1", "--optim.lr", "2e-3"], {"optim": {"lr": 0.002}}),
        (["--profile"], {"profile": True}),
        (["--profile", "false", "--train.tf32"], {"profile": False, "train": {"tf32": True}}),
        (["--algorithm.rank_penalty=-1e-3"], {"algorithm": {"rank_penalty": -0.001}}),
        (["--seed", "0100"], {"seed": 100}),
    ],
)
def test_values_are_those_of_a_file(words, settings):
    assert parse(Options, words, prog="p", description="", settings=RunConfig)[1] == settings


def test_sections_that_may_be_null_have_options(capsys):
    words = ["--study.tune.space", "{optim.lr: {low: 0.1, high: 1}}", "--study.tune.trials", "4"]
    tune = parse(Options, words, prog="p", description="", settings=StudyConfig)[1]["study"]["tune"]
    assert tune == {"space": {"optim.lr": {"low": 0.1, "high": 1}}, "trials": 4}


def test_debug_shows_the_whole_sentence(capsys):
    with pytest.raises(SystemExit):
        run_command("gengap", lambda argv: (_ for _ in ()).throw(UsageError("x" * 1000)), ["--debug"])
    assert "x" * 1000 in capsys.readouterr().err
