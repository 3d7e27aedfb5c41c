"""Recordings in the layouts people have are found, aligned and read aloud, or named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from gendiff import config, preparing
from gendiff.errors import ConfigError, DataError
from gendiff.modality import Request
from gendiff.runs import Run
from gendiff.testing import check_modality
from gendiff.train import dry_run
from gendiff_speech import corpora, data
from gendiff_speech.mel import CONVENTIONS
from gendiff_speech.plugin import SpeechConfig, SpeechModality
from gendiff_speech.vocoder import VocoderModality

RECIPES = Path(__file__).parents[3] / "configs" / "speech"
KATHLEEN = Path(__file__).parents[4] / "shared" / "data" / "kathleen"
Say = Callable[..., tuple[np.ndarray, list[int]]]
TINY = ["speech.channels=16", "speech.blocks=2", "speech.tokens=characters"]


def section(folder: Path, **values: object) -> SpeechConfig:
    told = {"data": "ljspeech", "path": str(folder), "convention": "16khz", "tokens": "characters"}
    return SpeechConfig(**{**told, **values})


def test_letters_are_found_where_they_sound(
    ljspeech: Path, say: Say, sentence: Callable[..., str]
) -> None:
    facts = data.prepare(section(ljspeech)).facts
    train = data.dataset(section(ljspeech), facts, "train")
    random, errors = np.random.default_rng(0), []
    for i in range(len(train)):
        starts = np.array(say(sentence(random), random)[1])
        item = train[i, 0]
        begin = (starts[1] // 160 - 5) * 160  # what is trimmed leaves 50 ms
        edges = item.durations.cumsum(0).numpy()[:-1] * 0.016
        truth = (starts[1:] - begin) / 16000
        errors.append(np.abs(edges - truth))
        assert facts["tokens"][int(item.tokens[0])] == "_"
        assert facts["tokens"][int(item.tokens[-1])] == "."
    # Measured: 24 ms. A frame lasts 16 ms, and its window of 64 ms hears a tone in a pause.
    assert np.mean(np.concatenate(errors)) < 0.028
    assert facts["texts"] == []


def test_new_text_lasts_as_long_as_it_would(
    ljspeech: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gendiff_speech.durations._STEPS", 300)
    facts = data.prepare(section(ljspeech)).facts
    random = np.random.default_rng(1)
    for said in ("storm or dust", "a mile a gelatin sun"):
        real = len(say(said, random)[0]) / 256
        tokens, lasts = data.read_aloud(facts, 0, f"{said.upper()}!", 0, 0, 1.0)
        assert len(tokens) == len(lasts) == len(said) + 2
        assert abs(int(lasts.sum()) / real - 1) < 0.2
        vowels = [n for t, n in zip(tokens, lasts, strict=True) if facts["tokens"][t] in "aeiou"]
        others = [n for t, n in zip(tokens, lasts, strict=True) if facts["tokens"][t] in "stldm"]
        assert np.mean(vowels) > 1.15 * np.mean(others)
        slow = data.read_aloud(facts, 0, said, 0, 0, 0.5)[1]
        assert abs(int(slow.sum()) / int(lasts.sum()) - 2) < 0.1


def test_what_is_asked_of_a_corpus_of_sentences(ljspeech: Path) -> None:
    modality, told = SpeechModality(), section(ljspeech)
    facts = modality.prepare(told).facts

    def asked(**values: object) -> list[str]:
        cond = modality.templates(told, facts, Request(range(4), 0, values))[1]
        assert cond is not None
        return ["".join(facts["tokens"][t] for t in row) for row in cond["tokens"].tolist()]

    assert asked(text="a ring, a sun") == ["_a ring.a sun."] * 4  # no comma was ever read
    assert asked(text=["a", "dust"]) == ["_a.", "_dust."] * 2
    examples = facts["reading"]["examples"]
    assert [line[1:-1] for line in asked()] == [
        examples[i % len(examples)].lower()[:-1] for i in range(4)
    ]
    for values, line in [
        ({"text": "zinc"}, "text: 'zinc' has the character 'c', which the training data lack"),
        ({"text": "3 suns"}, "text: '3 suns' cannot read '3': write words with the letters"),
        ({"text": "…"}, "text: '…' has nothing to read: write some words"),
        ({"text": True}, "text: True is no text. Put it in quotes"),
        ({"seconds": 1}, "cond: unknown condition 'seconds'. Known: text, speaker, speed."),
    ]:
        with pytest.raises(ConfigError) as error:
            asked(**values)
        assert str(error.value).startswith(line)


def test_the_contract_with_sentences(ljspeech: Path) -> None:
    told = [*TINY, "speech.data=ljspeech", f"speech.path={ljspeech}", "speech.convention=16khz"]
    assert any("written" in line or "files" in line for line in check_modality("speech", told))


def test_flac_in_a_zip_is_the_same_corpus(ljspeech: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    (packed / "flac").mkdir(parents=True)
    for path in (ljspeech / "wavs").glob("*.wav"):
        soundfile.write(packed / "flac" / f"{path.stem}.flac", *soundfile.read(path))
    shutil.make_archive(str(packed / "flac"), "zip", packed, "flac")
    shutil.rmtree(packed / "flac")
    lines = (ljspeech / "metadata.csv").read_text().splitlines()
    told = ["|".join([*line.split("|")[:2], "1.5", "x.wav"]) for line in lines]
    (packed / "metadata.csv").write_text("\n".join(told))
    facts = [data.prepare(section(folder)).facts for folder in (ljspeech, packed)]
    a, b = (data.dataset(section(packed), f, "test")[0, 0] for f in facts)
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    assert facts[0]["digest"] != facts[1]["digest"]


def said_wave(say: Say, number: int) -> np.ndarray:
    return say("a sun or a storm", np.random.default_rng(number))[0]


def _vctk(root: Path, say: Say, number: int) -> None:
    speaker = f"p{225 + number % 2}"
    sound = root / "wav48_silence_trimmed" / speaker / f"{speaker}_{number:03d}_mic1.flac"
    said = root / "txt" / speaker / f"{speaker}_{number:03d}.txt"
    for path in (sound, said):
        path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(sound, said_wave(say, number), 16000)
    said.write_text("a sun or a storm\n")


def _libritts(root: Path, say: Say, number: int) -> None:
    folder = root / "dev-clean" / str(84 + number % 2) / "121123"
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / f"84_{number}.wav", said_wave(say, number), 16000)
    (folder / f"84_{number}.normalized.txt").write_text("A sun or a storm.")


def _speechcommands(root: Path, say: Say, number: int) -> None:
    word = ("sun", "storm")[number % 2]
    (root / word).mkdir(parents=True, exist_ok=True)
    wave = say(word, np.random.default_rng(number))[0]
    soundfile.write(root / word / f"{number:08x}_nohash_0.wav", wave, 16000)
    with (root / "testing_list.txt").open("a") as file:
        file.write(f"{word}/{number:08x}_nohash_0.wav\n" if number < 4 else "")


def _folder(root: Path, say: Say, number: int) -> None:
    (root / ("ann", "bob")[number % 2]).mkdir(parents=True, exist_ok=True)
    soundfile.write(
        root / ("ann", "bob")[number % 2] / f"{number}.wav", said_wave(say, number), 16000
    )


@pytest.mark.parametrize(
    ("layout", "write", "speakers", "texts"),
    [
        ("vctk", _vctk, ["p225", "p226"], ["a sun or a storm"]),
        ("libritts", _libritts, ["84", "85"], ["A sun or a storm."]),
        ("speechcommands", _speechcommands, ["reader"], ["storm", "sun"]),
        ("folder", _folder, ["ann", "bob"], []),
    ],
)
def test_layouts(
    ljspeech: Path,
    tmp_path: Path,
    say: Say,
    layout: str,
    write: Callable[[Path, Say, int], None],
    speakers: list[str],
    texts: list[str],
) -> None:
    root = tmp_path / layout
    for number in range(12):
        write(root, say, number)
    told = section(root, data=layout)
    facts = data.prepare(told).facts
    assert facts["speakers"] == speakers
    assert facts["texts"] == texts
    train, test = (data.dataset(told, facts, split) for split in ("train", "test"))
    assert len(train) + len(test) == 12
    assert len(test) == (4 if layout == "speechcommands" else 2)
    assert all(int(train[i, 0].durations.sum()) == train[i, 0].mel.shape[1] for i in range(5))
    space, _ = SpeechModality().templates(told, facts, Request(range(3)))
    assert all(length > 10 for length in space.lengths.tolist())  # type: ignore[attr-defined]


def test_sound_without_text_is_cut_and_its_lengths_are_the_data_s(
    tmp_path: Path, ljspeech: Path, say: Say
) -> None:
    random = np.random.default_rng(0)
    folder = tmp_path / "sound"
    folder.mkdir()
    wave = np.concatenate([say("a sun or a storm", random)[0] for _ in range(12)])
    soundfile.write(folder / "long.wav", np.stack([wave, wave], 1), 16000)
    told = section(folder, data="folder", max_seconds=1.0)
    report = data.prepare(told)
    facts = report.facts
    whole = data.dataset(told, facts, "train")[0, 0].mel.shape[1]
    assert report.summary == f"{facts['count']} pieces of sound by 1 speakers, without text"
    assert facts["count"] == -(-len(wave) // 16000)
    assert 50 < whole <= 62
    modality = SpeechModality()
    space, cond = modality.templates(told, facts, Request(range(5), 0, {"seconds": 2}))
    assert space.lengths.tolist() == [125] * 5  # type: ignore[attr-defined]
    assert cond is not None
    assert not cond["tokens"].any()
    with pytest.raises(ConfigError, match="seconds: -1 is not a number above 0 of sound"):
        modality.templates(told, facts, Request(range(5), 0, {"seconds": -1}))
    with pytest.raises(ConfigError, match="unknown condition 'text'. Known: speaker, seconds"):
        modality.templates(told, facts, Request(range(5), 0, {"text": "a"}))
    assert any(
        "written" in s
        for s in check_modality(
            "speech",
            [*TINY, "speech.data=folder", f"speech.path={folder}", "speech.max_seconds=1"],
        )
    )


def test_worker_processes_hear_the_same(
    fsdd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fsdd / "7_bob_4.wav").write_bytes(b"no sound")
    shutil.make_archive(str(tmp_path / "packed"), "zip", fsdd)
    packed = tmp_path / "packed.zip"
    recordings = [
        corpora.Recording(path.name, packed, path.name, "ann", None)
        for path in sorted(fsdd.iterdir())
    ]
    convention = CONVENTIONS["16khz"]
    here = list(corpora.hear(recordings, convention))
    monkeypatch.setattr(corpora, "_FEW_BYTES", 0)
    monkeypatch.setattr(corpora, "_PIECE_BYTES", 20_000)
    monkeypatch.setattr(preparing, "cores", lambda: 2)
    there = list(corpora.hear(recordings, convention))
    for one, other in zip(here, there, strict=True):
        if isinstance(one, corpora.Heard):
            np.testing.assert_array_equal(one.mel, other.mel)
        else:
            assert other.args == one.args
    assert sum(isinstance(one, DataError) for one in here) == 1


def test_each_bad_recording_has_a_line(ljspeech: Path, tmp_path: Path) -> None:
    wavs, table = ljspeech / "wavs", ljspeech / "metadata.csv"
    tone = 0.3 * np.sin(np.arange(32000) * 0.2)

    def path(number: int) -> Path:
        return wavs / f"T{number:03d}.wav"

    soundfile.write(path(0), np.zeros(0), 16000)
    soundfile.write(path(1), np.ones(1), 16000)
    soundfile.write(path(2), np.zeros(7200 * 50, dtype=np.int16), 50)
    soundfile.write(path(3), np.where(np.arange(32000) == 9, np.nan, tone), 16000, subtype="FLOAT")
    path(4).write_bytes(path(5).read_bytes()[: len(path(5).read_bytes()) // 2])
    path(6).write_text("no sound")
    soundfile.write(path(7), np.zeros(32000), 16000)
    soundfile.write(path(8), tone[:1600], 16000)
    path(9).unlink()
    soundfile.write(path(10), tone, 16000, subtype="PCM_U8")
    soundfile.write(path(11), np.tile(tone, (2, 12)).T, 192000)
    lines = table.read_text().splitlines()
    lines[12] = "T012|naïve 3|"
    lines[13] = "T013||"
    lines[14] = "T014"
    lines[15] = lines[16]
    table.write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        data.prepare(section(ljspeech))
    title, *lines = str(error.value).split("\n  ")
    assert title == "data: 13 recordings cannot be used:", lines
    for line, start in zip(sorted(lines), sorted(BAD), strict=True):
        assert line.startswith(start)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


BAD = [
    "T000: holds no sound",
    "T001: too short",
    "T002: lasts 7200 s. At most 600 s",
    "T003: holds NaN",
    "T004: truncated",
    "T006: cannot be decoded",
    "T007: holds only silence",
    "T008: its ",
    "metadata.csv line 10: no recording T009.wav or T009.flac",
    "T012: its text cannot read '3'",
    "T013: its text has nothing to read",
    "metadata.csv line 15: 'T014' is not id|text",
    "metadata.csv line 17: 'T016' is there twice",
]


def test_a_recording_whose_name_is_no_text_is_read_or_named_once(fsdd: Path) -> None:
    vocoder = VocoderModality()
    read = (
        lambda: data.prepare(section(fsdd, data="folder")),
        lambda: vocoder.prepare(vocoder.Config(path=str(fsdd), convention="16khz")),
    )
    odd = fsdd / os.fsdecode(b"\xff.wav")
    next(fsdd.glob("*.wav")).rename(odd)
    for prepare in read:
        prepare()
    odd.write_bytes(odd.read_bytes()[:-2])
    for prepare in read:
        with pytest.raises(DataError) as caught:
            prepare()
        assert str(caught.value).count(r"\udcff.wav") == 1


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for told, line in [
        (section(tmp_path / "no"), "speech.path: no folder .*no. Give that of the ljspeech"),
        (section(tmp_path), "speech.path: no metadata.csv in .*Give LJSpeech's layout"),
        (section(tmp_path, data="vctk"), "speech.path: no recordings in .* of the layout 'vctk'"),
        (SpeechConfig(data="folder"), "speech.path: not set. Give the folder of the folder"),
    ]:
        with pytest.raises(DataError, match=line):
            data.prepare(told)


def test_long_and_dull_recordings_are_warned_of(ljspeech: Path) -> None:
    report = data.prepare(section(ljspeech, convention="24khz", max_seconds=1.6))
    assert "have a sample rate below 24000 Hz" in report.warnings[0]
    assert "are left out that last longer than speech.max_seconds=1.6" in report.warnings[1]
    assert 5 < report.facts["count"] < 30


def test_the_last_of_each_speaker_are_held_out() -> None:
    held = corpora.held_out(["a"] * 20 + ["b"] * 3 + ["c"])
    assert [i for i, out in enumerate(held) if out] == [18, 19, 22]
    assert sum(corpora.held_out(["a"] * 5000)) == 100


@pytest.mark.parametrize("recipe", ["kathleen", "ljspeech", "diff_tts", "vctk"])
def test_recipes_run_on_their_layout(
    ljspeech: Path, tmp_path: Path, say: Say, recipe: str
) -> None:
    folder = ljspeech
    if recipe == "vctk":
        folder = tmp_path / "vctk"
        for number in range(6):
            _vctk(folder, say, number)
    modality = SpeechModality()
    small = [*TINY, f"speech.path={folder}", "train.batch_size=4", "sample.steps=2", "threads=1"]
    resolved = config.resolve(modality, [RECIPES / f"{recipe}.yaml"], small)
    facts = modality.prepare(resolved.speech).facts  # type: ignore[attr-defined]
    assert list(dry_run(Run(tmp_path / "run", modality, resolved, facts)))


def test_real_sentences_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hiss lies in the high bands, where a vowel does not."""
    if not KATHLEEN.is_dir():
        pytest.skip(f"no real speech: {KATHLEEN} is not there")
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gendiff_speech.durations._STEPS", 60)
    some = tmp_path / "some"
    some.mkdir()
    lines = (KATHLEEN / "metadata.csv").read_text().splitlines()[:80]
    (some / "metadata.csv").write_text("\n".join(lines))
    (some / "flac.zip").symlink_to(KATHLEEN / "flac.zip")
    facts = data.prepare(section(some)).facts
    train = data.dataset(section(some), facts, "train")
    tilt: dict[str, list[float]] = {}
    for i in range(len(train)):
        item = train[i, 0]
        names = [facts["tokens"][t] for t in item.tokens]
        level = item.mel[50:].mean(0) - item.mel[:30].mean(0)
        for name, part in zip(names, level.split(item.durations.tolist()), strict=True):
            tilt.setdefault(name, []).append(float(part.mean()))
    hiss, vowel = np.mean(tilt["s"]), np.mean([x for v in "aeou" for x in tilt[v]])
    assert hiss > vowel + 1.0


def test_the_content_is_that_of_what_is_read(
    fsdd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents(root: Path) -> list[str]:
        vocoder = VocoderModality()
        return [
            *(
                data.prepare(section(root, data=k, convention="8khz")).facts["content"]
                for k in ("folder", "fsdd")
            ),
            vocoder.prepare(vocoder.Config(path=str(root), convention="8khz")).facts["content"],
        ]

    first = contents(fsdd)
    copy = shutil.copytree(fsdd, tmp_path / "copy")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    (copy / "notes.txt").write_text("is not read")
    (copy / os.fsdecode(b"\xff.txt")).write_text("whose name is no text")
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "other"))
    assert contents(copy) == first
    wave, rate = soundfile.read(copy / "0_ann_1.wav")
    soundfile.write(copy / "0_ann_1.wav", wave[::-1], rate)
    assert all(a != b for a, b in zip(contents(copy), first, strict=True))
