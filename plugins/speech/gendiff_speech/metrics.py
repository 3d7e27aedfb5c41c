r"""How good generated speech is, in figures that a laptop computes and a reader can judge.

Every figure compares with held-out recordings, and most come with a *floor*: the same figure for
real recordings in the samples' place. The held-out recordings are dealt to two halves, text by
text and speaker by speaker. From one half a small recogniser learns what was said and by whom; the
other half, which it has not seen, is the reference. Where the held-out recordings are of other
sessions than the training ones, even these miss the floor; the notes say what they reach.

Sentences that nobody says twice are judged by the frame (:mod:`gendiff_speech.tokens`).

What can be said of any data, as the Fréchet distance, is the engine's (:mod:`gendiff.metrics`),
here by the recogniser's features; of single recordings without labels by mel cepstra.

Mel-cepstral distortion (Kubichek, 1993, https://doi.org/10.1109/PACRIM.1993.407206) of two frames
with cepstra :math:`c` and :math:`c'`, averaged over the path of dynamic time warping:

.. math:: \frac{10}{\ln 10} \sqrt{2 \sum_{d=1}^{13} (c_d - c'_d)^2} \ \text{dB},

where the log mel band n of N is :math:`c_0 + \sum_d c_d \cos(\pi d (n + 1/2) / N)`. It is the
root-mean-square difference in dB of the two smoothed spectra, without their overall level.

The fundamental frequency is that of the sound which Griffin-Lim makes of a mel, of samples and
recordings alike, by pYIN (Mauch & Dixon, 2014, https://doi.org/10.1109/ICASSP.2014.6853678;
librosa's), frame by frame of the mel. Over the frames that the same time warping lays side by side
and that are voiced in both,

.. math:: \text{RMSE} = \sqrt{\text{mean}\,(1200 \log_2 (f / f'))^2} \ \text{cents},

and the voicing error is the share of the frames of which one is voiced and the other is not. What
the way through mel and Griffin-Lim costs is told in :func:`fundamental`.

Naturalness and intelligibility to people are not judged: there is no substitute for listeners.
Everything runs on the CPU and is a function of the data and the seed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gendiff.metrics import joined, one_thread
from gendiff.modality import Features, Measure
from gendiff.noise import generator
from gendiff.spaces import Batch, Masked
from gendiff_speech.recogniser import Recogniser, Recordings, hear, pad, recogniser
from gendiff_speech.tokens import Told, frames, token_accuracy

_LIMIT = 1000  # recordings of a split that are looked at, evenly spaced if it has more
_CEPSTRA = 13
_CELLS = 1 << 24  # pairs of frames that are compared at once
_RESYNTHESISED = 60  # of samples or recordings that go through Griffin-Lim
_SHORTEST = 4  # frames of one that does


def measure(
    facts: Mapping[str, Any], config: Any, samples: Batch, cache: Path, seed: int
) -> Iterator[Measure]:
    """All figures about samples, those that take long last; the caller may stop before them.

    Args:
        facts: What ``prepare`` found.
        config: The plugin's configuration.
        samples: Normalised log mels (B, mels, T) in a Masked space, with the conditions
            ``tokens`` (B, L), ``speaker`` (B,) and ``text`` (B,).
        cache: Folder for the trained recogniser.
        seed: Seed of the recogniser and of the choice of training recordings for the floor.

    Yields:
        The figures; none if there are fewer than two samples or four held-out recordings.
    """
    made, real = _samples(samples), _recordings(config, facts, "train")
    test = _recordings(config, facts, "test")
    if len(made) < 2 or len(test) < 4 or len(real) < 2:
        return
    network, told, reference = _listener(facts, test, cache, seed)
    like = real.select(_stand_ins(real, made, generator("like", seed)))
    if network is not None:
        yield from _accuracies(network, told, reference, like, made)
    # Where texts are not repeated no half can stand in for the other, so all are the reference.
    references, stand_in = (reference, told) if facts["texts"] else (test, None)
    if any(made.tokens):
        yield from _distortion(facts, references, stand_in, like, made)
        yield from _pitch(facts, references, stand_in, made)
    if network is not None and network.text is not None:
        yield from _ceiling(network, facts, reference)
    if "reading" in facts and not facts["texts"]:
        learnt, held_out = (token_frames(config, facts, split) for split in ("train", "test"))
        digest, count = str(facts["digest"]), len(facts["tokens"])
        asked = frames(samples)
        yield token_accuracy(digest, count, learnt, held_out, asked, cache, seed)


def token_frames(config: Any, facts: Mapping[str, Any], split: str) -> list[Told]:
    """A split's recordings with the token of each frame; evenly spaced ones if there are many."""
    from gendiff_speech.data import dataset

    data = dataset(config, facts, split)
    items = [data[i, 0] for i in _chosen(len(data))]
    return [(item.mel.float(), item.tokens.repeat_interleave(item.durations)) for item in items]


def features(
    facts: Mapping[str, Any], config: Any, batches: Iterable[Batch], cache: Path, seed: int
) -> Features:
    """The recogniser's features (N, 32) of normalised log mels; see :func:`measure`.

    Where there is nothing to recognise, mean and deviation of 13 mel cepstra over time, (N, 26).
    """
    test = _recordings(config, facts, "test")
    network, told, _ = _listener(facts, test, cache, seed)
    mels = (_samples(batch).mels for batch in batches)
    if network is None:
        about = "mean and deviation of 13 mel cepstra over time"
        parts = [torch.stack([_statistics(mel, facts) for mel in part]) for part in mels]
        return joined(parts, about)
    what = ["text"] * (network.text is not None) + ["speaker"] * (network.speaker is not None)
    about = f"features of a small network that learnt the {' and '.join(what)} of {len(told)} "
    about += "other held-out recordings"
    return joined([hear(network, part).features for part in mels], about)


def reference_numbers(facts: Mapping[str, Any], config: Any) -> list[int]:
    """Numbers of the held-out recordings from which the recogniser does not learn."""
    from gendiff_speech.data import dataset

    chosen = _chosen(len(dataset(config, facts, "test")))
    return [chosen[i] for i in _dealt(facts, _recordings(config, facts, "test"))[1]]


def _dealt(facts: Mapping[str, Any], test: Recordings) -> tuple[list[int], list[int]]:
    """Held-out recordings for the recogniser, and those that are the reference."""
    return _halves(_keys(test) if facts["texts"] else test.speaker.tolist())


def listener(
    config: Any, facts: Mapping[str, Any], cache: Path, seed: int
) -> tuple[Recogniser | None, Recordings, Recordings]:
    """The recogniser, the held-out recordings that it heard, and those that it did not.

    There is no recogniser of data with one speaker and no texts that repeat.
    """
    return _listener(facts, _recordings(config, facts, "test"), cache, seed)


def _listener(
    facts: Mapping[str, Any], test: Recordings, cache: Path, seed: int
) -> tuple[Recogniser | None, Recordings, Recordings]:
    texts, speakers = len(facts["texts"]), len(facts["speakers"])
    told, reference = (test.select(ids) for ids in _dealt(facts, test))
    heads = [_told_apart(told.text) * texts, _told_apart(told.speaker) * speakers]
    network = None
    if max(heads) > 1:
        network = recogniser(cache, str(facts["digest"]), told, heads[0], heads[1], seed)
    return network, told, reference


def _samples(batch: Batch) -> Recordings:
    """The samples without their padding; what is not finite counts as a frame's mean."""
    assert isinstance(batch.space, Masked)
    assert batch.cond is not None
    x = batch.x.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0).clamp(-20, 20)
    lengths = batch.space.lengths.tolist()
    mels = tuple(row[:, :length] for row, length in zip(x, lengths, strict=True))
    text, speaker = (batch.cond[name].cpu().long() for name in ("text", "speaker"))
    return Recordings(mels, tuple(_spelt(row) for row in batch.cond["tokens"]), text, speaker)


def _recordings(config: Any, facts: Mapping[str, Any], split: str) -> Recordings:
    """A split's recordings, evenly spaced ones if there are more than the limit."""
    from gendiff_speech.data import dataset

    data = dataset(config, facts, split)
    items = [data[i, 0] for i in _chosen(len(data))]
    text, speaker = (
        torch.tensor([getattr(item, name) for item in items], dtype=torch.int64)
        for name in ("text", "speaker")
    )
    tokens = tuple(_spelt(item.tokens) for item in items)
    return Recordings(tuple(item.mel.float() for item in items), tokens, text, speaker)


def _chosen(count: int) -> list[int]:
    """Numbers of the recordings of a split that are looked at."""
    few = min(count, _LIMIT)
    return [i * count // few for i in range(few)]


def _spelt(tokens: Tensor) -> tuple[int, ...]:
    return tuple(token for token in tokens.tolist() if token)


def _keys(recordings: Recordings) -> list[Hashable]:
    """What a recording shares with the others of the same text and speaker."""
    told = zip(recordings.text.tolist(), recordings.tokens, strict=True)
    what = [text if text >= 0 else tokens for text, tokens in told]
    return list(zip(what, recordings.speaker.tolist(), strict=True))


def _groups(keys: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[key].append(number)
    return groups


def _halves(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Deals numbers to two halves of about equal size, each with half of every key's."""
    order = [number for group in _groups(keys).values() for number in group]
    return sorted(order[1::2]), sorted(order[::2])


def _told_apart(labels: Tensor) -> bool:
    return len(labels.unique()) > 1


def _accuracies(
    network: Recogniser,
    told: Recordings,
    reference: Recordings,
    like: Recordings,
    made: Recordings,
) -> list[Measure]:
    """How often the recogniser hears the text and the speaker that were asked for."""
    sample, real, known = (hear(network, part.mels) for part in (made, reference, like))
    about = (
        f"by a small network trained on {len(told)} held-out recordings alone; {{}} samples, "
        f"floor: {len(reference)} other held-out recordings; {{:.3f}} for {len(like)} training "
        "recordings"
    )
    measures = []
    if network.text is not None and (made.text >= 0).any():
        asked = made.text >= 0
        text = None if sample.text is None else sample.text[asked]
        value = _share(text, made.text[asked])
        note = (
            f"share in which the text asked for is the most likely of {len(network.text.weight)}, "  # type: ignore[union-attr]
        )
        note += about.format(int(asked.sum()), _share(known.text, like.text))
        floor = _share(real.text, reference.text)
        error = _error(value, int(asked.sum()))
        measures.append(Measure("label_accuracy", value, "higher", floor, note, error))
    if network.speaker is not None:
        value = _share(sample.speaker, made.speaker)
        note = "share in which the speaker asked for is the most likely, "
        note += about.format(len(made), _share(known.speaker, like.speaker))
        floor = _share(real.speaker, reference.speaker)
        error = _error(value, len(made))
        measures.append(Measure("speaker_accuracy", value, "higher", floor, note, error))
    return measures


def _error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)


def _share(found: Tensor | None, wanted: Tensor) -> float:
    assert found is not None  # the recogniser has this head
    return float((found == wanted).double().mean())


def _statistics(mel: Tensor, facts: Mapping[str, Any]) -> Tensor:
    """Mean and standard deviation over time of the cepstra, (26,), in dB."""
    c = cepstra(_denormalised(mel, facts)) * (10 * math.sqrt(2) / math.log(10))
    return torch.cat([c.mean(1), c.std(1, correction=0)])


def _stand_ins(real: Recordings, made: Recordings, gen: torch.Generator) -> list[int]:
    """For each sample a training recording, each at most once as long as there are enough.

    Of its text and speaker if there is one, else of its speaker, else any.
    """
    groups = _groups(_keys(real)) | _groups(real.speaker.tolist())
    decks: dict[Hashable, list[int]] = defaultdict(list)
    drawn = []
    for key, speaker in zip(_keys(made), made.speaker.tolist(), strict=True):
        name = next((name for name in (key, speaker) if name in groups), None)
        if not decks[name]:
            group = groups.get(name, list(range(len(real))))
            decks[name] = [group[i] for i in torch.randperm(len(group), generator=gen).tolist()]
        drawn.append(decks[name].pop())
    return drawn


def _denormalised(mel: Tensor, facts: Mapping[str, Any]) -> Tensor:
    """The log mel-spectrogram (C, T) of a normalised one."""
    mean, std = (torch.tensor(facts[name], dtype=mel.dtype)[:, None] for name in ("mean", "std"))
    return mel * std + mean


def cepstra(log_mel: Tensor) -> Tensor:
    """Mel cepstra (13, T) of a log mel-spectrogram (N, T) of natural logarithms of magnitudes.

    The cosine series' coefficients 1 to 13; the zeroth, the level, is left out.
    """
    bands = log_mel.shape[0]
    d = torch.arange(1, _CEPSTRA + 1, dtype=torch.float64)
    n = torch.arange(bands, dtype=torch.float64)
    basis = 2 / bands * torch.cos(math.pi * d[:, None] * (n + 0.5) / bands)
    return basis.to(log_mel) @ log_mel


def mel_cepstral_distortion(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Mel-cepstral distortion in dB, (P,), of P pairs of log mels (N, T_i) and (N, U_i)."""
    found = []
    longest = max(mel.shape[1] for mel in (*a, *b))
    size = max(1, _CELLS // longest**2)
    for start in range(0, len(a), size):
        found.append(time_warp(*_frame_costs(a[start : start + size], b[start : start + size])))
    return torch.cat(found)


def _frame_costs(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Distortion of every frame of a's with every one of b's, (P, T, U), and the lengths (P,)."""
    x, rows = pad([cepstra(mel) for mel in a])
    y, columns = pad([cepstra(mel) for mel in b])
    scale = 10 * math.sqrt(2) / math.log(10)
    # The product form of cdist would not give 0 for equal frames.
    exact = "donot_use_mm_for_euclid_dist"
    cost = scale * torch.cdist(x.transpose(1, 2), y.transpose(1, 2), compute_mode=exact)
    return cost, rows, columns


def time_warp(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean cost (P,) along the path of least total cost through each matrix; see below."""
    total, cells = along_path(cost, torch.ones_like(cost)[:, None], rows, columns)
    return total / cells[:, 0]


def along_path(
    cost: Tensor, values: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums along the path of least total cost through each matrix.

    Dynamic time warping with the steps (1, 1), (1, 0) and (0, 1) from the first corner to the
    last (Sakoe & Chiba, 1978, https://doi.org/10.1109/TASSP.1978.1163055), one antidiagonal of
    all matrices at a time.

    Args:
        cost: Costs, (P, T, U), at least 0.
        values: What else is summed, (P, K, T, U).
        rows: Valid rows of each matrix, (P,), at least 1.
        columns: Valid columns of each matrix, (P,), at least 1.

    Returns:
        The total costs, (P,), and the sums of the values, (P, K).
    """
    count, height, width = cost.shape
    kinds = values.shape[1]
    i = torch.arange(height)
    last = rows + columns - 2
    total = cost.new_full((3, count, height), math.inf)  # of this antidiagonal and the two before
    sums = cost.new_zeros(3, count, kinds, height)
    found, summed = cost.new_zeros(count), cost.new_zeros(count, kinds)
    for k in range(int(last.max()) + 1):
        now, before, earlier = k % 3, (k - 1) % 3, (k - 2) % 3
        j = k - i
        here = cost[:, i, j.clamp(0, width - 1)].masked_fill((j < 0) | (j >= width), math.inf)
        ways = (_down(total[earlier]), _down(total[before]), total[before])
        carried = (_down(sums[earlier], 0), _down(sums[before], 0), sums[before])
        best, brought = ways[0], carried[0]
        for way, carry in zip(ways[1:], carried[1:], strict=True):
            better = way < best
            best = torch.where(better, way, best)
            brought = torch.where(better[:, None], carry, brought)
        if k == 0:
            best = torch.zeros_like(best).masked_fill(i > 0, math.inf)
        total[now], sums[now] = best + here, brought + values[:, :, i, j.clamp(0, width - 1)]
        done = (last == k).nonzero()[:, 0]
        end = rows[done] - 1
        found[done], summed[done] = total[now, done, end], sums[now, done, :, end]
    return found, summed


def _down(value: Tensor, fill: float = math.inf) -> Tensor:
    """Moves (P, *, T) by one along T."""
    return torch.nn.functional.pad(value[..., :-1], (1, 0), value=fill)


def _distortion(
    facts: Mapping[str, Any],
    reference: Recordings,
    stand_in: Recordings | None,
    like: Recordings,
    made: Recordings,
) -> list[Measure]:
    """Mel-cepstral distortion against the nearest reference; none if no sample has one."""
    with one_thread():
        values = _distances(_nearest(facts, made, reference))
        floors = None if stand_in is None else _distances(_nearest(facts, stand_in, reference))
        known = _distances(_nearest(facts, like, reference))
    if len(values) == 0:
        return []
    floor, what = None, "no floor, as no text is spoken twice"
    if floors is not None and len(floors) > 0:
        floor, what = float(floors.mean()), f"floor: {len(floors)} other held-out recordings"
    if len(known) > 0:
        what += f"; {float(known.mean()):.3f} for {len(known)} training recordings"
    note = (
        f"dB, 13 cepstra of the log mels, time-warped, to the nearest held-out recording of the "
        f"same text and speaker; {len(values)} of {len(made)} samples have one among "
        f"{len(reference)}; {what}"
    )
    name = "mel_cepstral_distortion"
    error = float(values.std(correction=0)) / math.sqrt(len(values))
    return [Measure(name, float(values.mean()), "lower", floor, note, error)]


def _distances(found: Mapping[int, tuple[float, int]]) -> Tensor:
    return torch.tensor([distance for distance, _ in found.values()])


def _nearest(
    facts: Mapping[str, Any], made: Recordings, reference: Recordings
) -> dict[int, tuple[float, int]]:
    """Distortion to the nearest reference, and which that is, of the recordings that have one."""
    groups = _groups(_keys(reference))
    pairs = [(i, j) for i, key in enumerate(_keys(made)) for j in groups.get(key, ())]
    if not pairs:
        return {}
    a = [_denormalised(made.mels[i], facts) for i, _ in pairs]
    b = [_denormalised(reference.mels[j], facts) for _, j in pairs]
    found: dict[int, tuple[float, int]] = {}
    for (i, j), distance in zip(pairs, mel_cepstral_distortion(a, b).tolist(), strict=True):
        if i not in found or distance < found[i][0]:
            found[i] = (distance, j)
    return found


def _pitch(
    facts: Mapping[str, Any],
    reference: Recordings,
    stand_in: Recordings | None,
    made: Recordings,
) -> list[Measure]:
    """F0's RMSE and the voicing error against the nearest reference; none without references."""
    from gendiff_speech.mel import CONVENTIONS, griffin_lim
    from gendiff_speech.pitch import fundamental

    convention = CONVENTIONS[facts["convention"]]

    def told(recordings: Recordings) -> tuple[tuple[float, float], int] | None:
        usable = [i for i, mel in enumerate(recordings.mels) if mel.shape[1] >= _SHORTEST]
        count = min(len(usable), _RESYNTHESISED)
        some = recordings.select([usable[i * len(usable) // count] for i in range(count)])
        pairs = [(i, j) for i, (_, j) in _nearest(facts, some, reference).items()]
        if not pairs:
            return None
        mels = (
            [_denormalised(some.mels[i], facts) for i, _ in pairs],
            [_denormalised(reference.mels[j], facts) for _, j in pairs],
        )
        pitches = [[fundamental(griffin_lim(m, convention), convention) for m in s] for s in mels]
        return pitch_difference(*mels, *pitches), len(pairs)

    with one_thread():
        found, floor = told(made), None if stand_in is None else told(stand_in)
    if found is None:
        return []
    (rmse, voicing), count = found
    least = (None, None) if floor is None else floor[0]
    about = (
        f"pYIN on Griffin-Lim's sound of {count} samples and of the nearest held-out recording of "
        "the same text and speaker, time-warped"
    )
    if floor is not None:
        about += f"; floor: {floor[1]} other held-out recordings"
    measures = [
        Measure("voicing_error", voicing, "lower", least[1], f"frames voiced in one only; {about}")
    ]
    if math.isfinite(rmse):
        note = f"cents, over frames voiced in both; {about}"
        floor_rmse = least[0] if least[0] is not None and math.isfinite(least[0]) else None
        measures.insert(0, Measure("f0_rmse", rmse, "lower", floor_rmse, note))
    return measures


def pitch_difference(
    a: Sequence[Tensor], b: Sequence[Tensor], f_a: Sequence[Tensor], f_b: Sequence[Tensor]
) -> tuple[float, float]:
    """F0's RMSE in cents and the voicing error of pairs of recordings; see the module.

    Args:
        a, b: Log mels (N, T_i) and (N, U_i), which are warped onto each other.
        f_a, f_b: Their fundamental frequencies in Hz, (T_i,) and (U_i,), NaN where not voiced.

    Returns:
        Over the frames of all pairs; the RMSE is NaN if no frame is voiced in both.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for one, other, f, g in zip(a, b, f_a, f_b, strict=True):
        cents = 1200 * torch.log2(f[:, None] / g)
        both = ~cents.isnan()
        one_only = f.isnan()[:, None] != g.isnan()
        square = torch.where(both, cents.square(), 0)
        values = torch.stack([square, both.float(), one_only.float(), torch.ones_like(cents)])
        cost, rows, columns = _frame_costs([one], [other])
        sums += along_path(cost, values[None], rows, columns)[1][0].double()
    square_sum, voiced, wrong, frames = sums.tolist()
    return math.sqrt(square_sum / voiced) if voiced else math.nan, wrong / frames


def _ceiling(
    network: Recogniser, facts: Mapping[str, Any], reference: Recordings
) -> list[Measure]:
    """What is lost on the way through sound, by real recordings: no vocoder, no model."""
    from gendiff_speech.mel import CONVENTIONS, griffin_lim, log_mel

    convention = CONVENTIONS[facts["convention"]]
    usable = [i for i, mel in enumerate(reference.mels) if mel.shape[1] >= _SHORTEST]
    if not usable:
        return []
    count = min(len(usable), _RESYNTHESISED)
    chosen = reference.select([usable[i * len(usable) // count] for i in range(count)])
    mean, std = (torch.tensor(facts[name])[:, None] for name in ("mean", "std"))
    again = [
        (log_mel(griffin_lim(_denormalised(mel, facts), convention), convention) - mean) / std
        for mel in chosen.mels
    ]
    heard = [hear(network, mels).text for mels in (again, chosen.mels)]
    value, floor = (_share(text, chosen.text) for text in heard)
    note = (
        f"label accuracy of {count} held-out recordings, from mel to sound by Griffin-Lim and "
        "back; floor: the same recordings before it"
    )
    return [Measure("griffin_lim_ceiling", value, "higher", floor, note)]
