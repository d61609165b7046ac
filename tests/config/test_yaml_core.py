"""Settings are read by YAML 1.2's core schema, once each, and what is written is read back the same."""

import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gengap_dist.config import yaml_core
from gengap_dist.config.loading import load_yaml, resolve, to_yaml, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import MAX_SENTENCE, UsageError, one_sentence
from tests.conftest import FULL, ROOT


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, text) for text in ("yes", "on", "Off", "y", "1:00", "1_000", "2026-01-01", "2026-13-45", "=", "inf")),
        ("0100", 100), ("0o100", 64), ("0x10", 16), ("1e-2", 0.01), (".5", 0.5), ("-1.", -1.0), ("TRUE", True),
        ("~", None), ("", None), ("'1'", "1"), ('"~"', "~"),
    ],
)  # fmt: skip
def test_values_of_the_core_schema(text, value):
    assert repr(yaml_core.read(f"a: {text}")) == repr({"a": value})


@pytest.mark.parametrize("word", ["yes", "on", "1:00", "true", "0b1", "2026-01-01", "2026-13-45"])
def test_no_word_becomes_a_number(tmp_path, word):
    for setting, model in (("seed", RunConfig), ("optim.lr", RunConfig), ("study.seeds", StudyConfig)):
        value = f"[{word}]" if model is StudyConfig else word
        (tmp_path / "a.yaml").write_text(f"{setting}: {value}\n")
        with pytest.raises(UsageError, match=rf"{setting} \({word}\) is not valid"):
            resolve(model, [tmp_path / "a.yaml"], {"study": {"arms": [{"name": "a"}]}} if model is StudyConfig else {})


@pytest.mark.parametrize("word", ["yes", "on", "1", "'true'"])
def test_only_true_and_false_are_booleans(tmp_path, word):
    (tmp_path / "a.yaml").write_text(f"train: {{tf32: {word}}}\n")
    with pytest.raises(UsageError, match=r"train.tf32 \(.*\) is not valid: input should be true or false"):
        resolve(RunConfig, [tmp_path / "a.yaml"], {})


LAUGHS = "a: &a0 x\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))  # 9^29 values


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch: {global_size: 4}\nseed: 1\nbatch: {micro_size: 5}", "gives batch twice, in lines 1 and 3"),
        ("optim:\n  lr: 1\n  power: 2\n  lr: 3", "gives optim.lr twice, in lines 2 and 4"),
        ("batch: {global_size: 4}\nbatch.global_size: 5", "gives batch.global_size twice, in lines 1 and 2"),
        ("study:\n  arms:\n  - {name: a,\n     name: b}", "gives study.arms.0.name twice, in lines 3 and 4"),
        ("batch: 3\nbatch.global_size: 4", "batch is given as a value, and with settings in it"),
        ("optim:\noptim.lr: 3", "optim is given as a value, and with settings in it"),
        ("optim:", "optim has nothing under it: write `name: value` for its settings"),
        ("optim: 3", "optim (3) is one value: write `name: value` for its settings"),
        ("model: mlp", "model (mlp) is one value: write model: {name: mlp}"),
        (
            "optim: {lr: 1\ntrain: {epochs: 3}",
            "in line 2: expected ',' or '}', but got ':'; fix that line (or a bracket opened in line 1)",
        ),
        ("seed: 3\nmodel: {widths: [3}", "in line 2: expected ',' or ']', but got '}'; fix that line"),
        ("optim: {lr: .inf}", "optim.lr (.inf) is not a finite number"),
        ("optim: {lr: -.INF}", "optim.lr (-.INF) is not a finite number"),
        ("optim: {lr: .nan}", "optim.lr (.nan) is not a finite number"),
        ("optim: {lr: 1e999}", "optim.lr (1e999) is not a finite number"),
        ("optim: {lr: 'inf'}", "optim.lr (inf) is not valid: input should be a finite number"),
        (f"seed: {'9' * 5000}", "is too large a number"),
        (f"seed: '{'9' * 30}'", "seed (999999999999999999999999999999) is not valid: input should be less than"),
        ("seed: 1e300", "seed (1e+300) is not valid"),
        ("seed: true", "seed (true) is not valid: input should be a number"),
        ("model: {widths: 128}", "model.widths (128) is not valid: input should be a list: write [128]"),
        ("model: {widths: [true, 3]}", "model.widths (true) is not valid: input should be a number"),
        ("train: {channels_last: maybe}", "input should be true or false or input should be 'auto'"),
        ("seed: !!python/name:os.abort", "has the tag tag:yaml.org,2002:python/name:os.abort in line 1"),
        ("seed: !!int '3'", "has the tag"),
        ("seed: ! 3", "has the tag ! in line 1"),
        ("[a]: 1", "has a key in line 1 that is not text"),
        ("base: &a {lr: 1}\noptim: {<<: *a}", "has << in line 2"),
        ("seed: 1\n---\nseed: 2", "has a second document in line 2"),
        ("seed: *a", "has *a in line 1"),
        ("model: &a [*a]", "has *a in line 1"),
        (LAUGHS, "has more than 100,000 values"),
        ("model: " + "[" * 100_000, "is nested more than 32 deep in line 1"),
        ("a." * 400 + "a: 1", "is nested more than 32 deep in line 1"),
        ("- " * 5000, "is nested more than 32 deep in line 1"),
        ("data: {name: 'a\x07b'}", "is not YAML"),
        ('data: {name: "a\\0b"}', "holds a NUL"),
        ('data: {name: "\\ud800"}', "half a character"),
        ('data: {name: "\\UFFFFFFFF"}', "is not YAML"),
        (f"%YAML {'9' * 5000}.1\n---\nseed: 1", "is not YAML"),
        ("a: b\n" * 300_000, "is larger than 1,048,576 bytes"),
        ("extends: {a: b}", "is neither a file nor a list of files"),
        ("extends: [1]", "is neither a file nor a list of files"),
        ("extends: ''", "the path () is empty"),
        ("- seed", "needs settings"),
        ("study: {arms: []}", "start it with gengap study"),
        ("batch: {size: 3}", "batch.size is called batch.global_size now"),
    ],
)
def test_what_is_refused(tmp_path, text, says):
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    (tmp_path / "top.yaml").write_text("extends: bad.yaml")
    start = time.monotonic()
    for name in ("bad.yaml", "top.yaml"):
        with pytest.raises(UsageError) as error:
            resolve(RunConfig, [tmp_path / name], {})
        assert says in one_sentence(str(error.value)), error.value
        assert len(one_sentence(str(error.value))) <= MAX_SENTENCE
    assert time.monotonic() - start < 20


def test_files_that_extend_many_are_counted(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"extends: [{number + 1}.yaml, {number + 1}.yaml]")
    (tmp_path / "40.yaml").write_text("seed: 1")
    with pytest.raises(UsageError, match="extends more than 100 files"):
        load_yaml(tmp_path / "0.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(UsageError, match=r"loop.yaml\) is a link to itself"):
        load_yaml(tmp_path / "loop.yaml")
    with pytest.raises(UsageError, match="is larger than"):
        resolve(RunConfig, [tmp_path.__class__("/dev/zero")], {})


def test_an_alias_is_a_copy():
    tree = yaml_core.read("a: &x {lr: [1]}\nb: *x\nc: &y 3\nd: [*y, *y]")
    assert tree == {"a": {"lr": [1]}, "b": {"lr": [1]}, "c": 3, "d": [3, 3]}
    assert tree["a"] is not tree["b"]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["yes", "0o17", "1e5", "0100", "1:00", ".inf", "~", "", "a: b", "- x", "*a", "&b", "!c", "2026-01-01", "<<", "=",
     "1_000", "0x1F", "?", ":", "1.", "+1", "null", "\n", " x ", "#", "%", "@"]
)  # fmt: skip
LEAF = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
LEAF |= st.integers(-yaml_core.LARGEST, yaml_core.LARGEST)
KEY = TEXT.map(lambda key: key.replace(".", "_"))  # a.b is b in a
TREE: st.SearchStrategy[object] = st.deferred(
    lambda: LEAF | st.lists(TREE, max_size=3) | st.dictionaries(KEY, TREE, max_size=3)
)


@settings(max_examples=2000 if FULL else 60)
@given(TREE)
def test_what_is_written_is_read_back_the_same(tree):
    text = yaml_core.write(tree)
    assert repr(yaml_core.read(text)) == repr(tree)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_resolved_settings_are_read_back_the_same_here_and_elsewhere(tmp_path, path):
    model = StudyConfig if "study" in load_yaml(path) else RunConfig
    config = resolve(model, [path], {"mlflow": {"experiment": "1e5", "tracking_uri": "0o17"}})
    (tmp_path / "config.yaml").write_text(text := to_yaml(config), encoding="utf-8")
    assert resolve(model, [tmp_path / "config.yaml"], {}) == config
    assert validate(model, yaml.safe_load(text)) == config  # by a reader of YAML 1.1
