"""Configuration: precedence, parts by name, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from gendiff import config
from gendiff.errors import ConfigError
from gendiff.guidance import DynamicClip, Guidance, NoClip
from gendiff.schedules import EDM, Cosine, Flow, Shifted, ZeroTerminal
from gendiff.testing import ToyModality


def resolve(*overrides: str, files: tuple[Path, ...] = ()) -> config.RunConfig:
    return config.resolve(ToyModality(), files, overrides)


def test_the_command_line_beats_files_which_beat_the_modality(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train: {steps: 30, lr: 0.5, batch_size: 4}")
    second.write_text("train: {lr: 0.25}")
    resolved = resolve("train.batch_size=2", files=(first, second))
    train = resolved.train
    assert (train.steps, train.lr, train.batch_size) == (30, 0.25, 2)
    assert train.log_every_steps == 5  # the toy's own default
    assert train.warmup_steps == 100  # the engine's


def test_a_part_is_a_name_or_a_mapping_and_another_name_forgets_the_old_parameters() -> None:
    assert resolve("diffusion.schedule=flow").diffusion.schedule == Flow()
    mapped = resolve("diffusion.schedule={name: edm, sigma_max: 10}").diffusion.schedule
    assert mapped == EDM(10.0)
    dotted = resolve("diffusion.schedule=edm", "diffusion.schedule.sigma_max=10")
    assert dotted.diffusion.schedule == EDM(10.0)
    switched = resolve("diffusion.schedule={name: edm, sigma_max: 10}", "diffusion.schedule=flow")
    assert switched.diffusion.schedule == Flow()


def test_what_is_written_reads_back_the_same() -> None:
    resolved = resolve("diffusion.schedule=vp_linear", "sample.sampler={name: heun, churn: 4}")
    assert config.validate(ToyModality(), config.dump(resolved)) == resolved


def test_a_schedule_of_a_schedule() -> None:
    text = "diffusion.schedule={name: shifted, of: {name: cosine, offset: 0.01}, shift: -1.4}"
    resolved = resolve(text)
    assert resolved.diffusion.schedule == Shifted(Cosine(0.01), -1.4)
    assert config.validate(ToyModality(), config.dump(resolved)) == resolved
    dotted = resolve(text, "diffusion.schedule.of=flow", "diffusion.schedule.shift=1")
    assert dotted.diffusion.schedule == Shifted(Flow(), 1.0)
    twice = resolve("diffusion.schedule={name: zero_terminal, of: {name: shifted, of: cosine, "
                    "shift: -2}}")  # fmt: skip
    assert twice.diffusion.schedule == ZeroTerminal(Shifted(Cosine(), -2.0))
    assert config.validate(ToyModality(), config.dump(twice)) == twice


def test_a_clip_is_a_part() -> None:
    assert resolve().sample.clip == NoClip()
    dotted = resolve("sample.clip=dynamic", "sample.clip.limit=2")
    assert dotted.sample.clip == DynamicClip(0.995, 2.0)
    assert config.validate(ToyModality(), config.dump(dotted)) == dotted


def test_guidance_is_a_number_or_more() -> None:
    plain = resolve("sample.guidance=2")
    assert plain.sample.guidance == Guidance(2.0)
    assert config.dump(plain)["sample"]["guidance"] == 2.0  # as runs of before have it
    more = resolve("sample.guidance={scale: 2, interval: [0.2, 3.0], rescale: 0.7}")
    assert more.sample.guidance == Guidance(2.0, (0.2, 3.0), 0.7)
    assert config.validate(ToyModality(), config.dump(more)) == more
    dotted = resolve("sample.guidance=2", "sample.guidance.parallel=0", "sample.guidance.scale=3")
    assert dotted.sample.guidance == Guidance(3.0, parallel=0.0)
    assert resolve("sample.guidance.rescale=0.7").sample.guidance == Guidance(1.0, rescale=0.7)
    assert resolve("sample.guidance={scale: 2, rescale: 1}", "sample.guidance=4").sample.guidance \
        == Guidance(4.0)  # fmt: skip


def test_numbers_in_yaml_s_blind_spots_are_numbers() -> None:
    assert resolve("train.lr=1e-4").train.lr == 1e-4  # YAML 1.1 reads a string


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", "unknown key 'train.step' (command line). Did you mean 'train.steps'?"),
        ("toy.itms=5", "unknown key 'toy.itms' (command line). Did you mean 'toy.items'?"),
        ("trian.steps=5", "unknown key 'trian' (command line). Did you mean 'train'?"),
        ("train.lr=-1", "train.lr: should be greater than 0, got -1 (command line)"),
        ("train.steps=many", "train.steps: should be a valid integer"),
        ("diffusion.schedule=edn", "no schedule 'edn'. Did you mean 'edm'?"),
        ("diffusion.schedule={name: edm, sgma_max: 2}", "Did you mean 'sigma_max'?"),
        ("diffusion.schedule={name: edm, sigma_max: -2}", "a positive number is needed"),
        ("diffusion.schedule={name: shifted, of: cosin, shift: 1}", "Did you mean 'cosine'?"),
        ("diffusion.schedule={name: shifted, shift: 1}", "of: Field required"),
        ("diffusion.schedule={name: zero_terminal, of: edm}", "variance-preserving schedule"),
        (
            "diffusion={prediction: eps, schedule: {name: zero_terminal, of: vp_linear}}",
            "no signal, at t=1",
        ),
        ("sample.guidance=-1", "sample.guidance: scale=-1: a number of at least 0 is needed"),
        ("sample.guidance=strong", "scale: should be a valid number"),
        ("sample.guidance={scale: 2, rescal: 1}", "guidance has no 'rescal'. Did you mean 'resc"),
        ("sample.clip=dynamc", "no clip 'dynamc'. Did you mean 'dynamic'?"),
        ("sample.clip={name: static, limit: 0}", "limit=0: a positive number is needed"),
        ("sample.guidance={interval: [3, 1]}", "0 <= low < high is needed (command line)"),
        ("sample.sampler={name: ddim, eta: 3}", "eta=3.0: a number in [0, 1] is needed"),
        ("diffusion.prediction=w", "should be 'eps', 'x', 'v', 'flow' or 'edm', got 'w'"),
        ("diffusion={prediction: eps, schedule: flow}", "no signal, at t=1"),
        ("name=a/b", "name: "),
        ("name=..", "name: "),
        ("train.steps=!!int x", "invalid YAML"),
        ("train.steps=!!timestamp x", "invalid YAML"),
        ("train.steps=!!python/object/apply:os.system ['touch x']", "could not determine"),
        ("train.steps=" + "9" * 5000, "invalid YAML"),
        ("train.steps=" + "[" * 5000, "nested deeper than 32"),
        ("train.steps=[&a [1], *a]", "aliases (*name) are not read"),
        ('out="a\\0b"', "a NUL or half a character"),
        (".".join("a" * 5000) + "=1", "no key has so many parts"),
        ("a\nb=1", "unknown key 'a\\nb'"),
        ("diffusion.weight={1: 2, name: [edm]}", "no weight '['edm']'"),
        ("sample.guidance={1: 2}", "guidance has no '1'"),
        ('out="\\uD800"', "a NUL or half a character"),
        ("a\udcff=1", "'a\\udcff=1' is not UTF-8 text"),
        ("a\nb", "'a\\nb': overrides are written key=value"),
        ("threads=10000000", "less than or equal to 4096"),
        ("sample.steps=10000000", "less than or equal to 100000"),
        ("train.steps", "overrides are written key=value"),
        ("train.steps=[", "invalid YAML"),
    ],
)
def test_a_mistake_is_one_line_with_the_fix(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_reported_at_once_each_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train: {lr: -1}")
    with pytest.raises(ConfigError) as error:
        resolve("train.batch_size=0", files=(file,))
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert f"({file})" in next(line for line in lines if "train.lr" in line)
    assert "(command line)" in next(line for line in lines if "batch_size" in line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("train: [1", "line 1: invalid YAML"),
        ("- 1\n- 2", "keys and values are needed"),
        (b"\xff\xfe\x00", "not a text file"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "line 2: invalid YAML: aliases"),
        ("- " * 100_000, "nested deeper"),
        ("#" * (config.LONGEST + 1), "1048577 characters, more than 1048576"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    file = tmp_path / "a.yaml"
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        resolve(files=(file,))
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_differences_leave_out_what_changes_no_result() -> None:
    old, new = resolve("train.lr=1", "out=a"), resolve("train.lr=2", "out=b", "toy.decimals=2")
    assert config.differences(config.dump(old), config.dump(new), ToyModality()) == [
        "train.lr: 1.0 -> 2.0"
    ]


def test_every_option_has_a_description_and_is_shown() -> None:
    model = config.run_config_model(ToyModality())
    assert all(text for _, text in config.help_lines(model))
    shown = "\n".join(config.commented(resolve("distill={teacher: runs/toy/x, checkpoint: 1}")))
    for key, text in config.help_lines(model):
        assert f"{key.rpartition('.')[2]}:" in shown
        assert text in shown


def test_a_run_s_name_replaces_nothing_else(tmp_path: Path) -> None:
    """A named part is replaced as a whole by one of another name; a run is not a part."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: recipe\ntrain: {steps: 77}\ndiffusion: {data_std: 3}\n")
    resolved = config.resolve(ToyModality(), [recipe], ["name=mine"])
    assert (resolved.name, resolved.train.steps, resolved.diffusion.data_std) == ("mine", 77, 3)
    assert resolved.train.batch_size == ToyModality.defaults["train"]["batch_size"]
