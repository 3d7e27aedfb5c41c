r"""How good generated images are, in figures that a laptop computes and a reader can judge.

Every figure compares with the held-out split and comes with a *floor*: the same figure for as many
real training images in the samples' place. A generator that is as good as more data scores there.

What can be said of any data, as Fréchet distance, precision and recall, is the engine's
(:mod:`gendiff.metrics`). Its features are here those of a small network trained on the training
split, so the figures mean something for 8x8 digits as well, and nothing is downloaded.

Everything runs on the CPU in float32 or better, and is a function of the data and the seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from gendiff.metrics import joined, one_thread
from gendiff.modality import Features, Measure
from gendiff.noise import generator
from gendiff.spaces import Batch
from gendiff_image.pictures import to_uint8
from gendiff_image.sets import Data

_VERSION = 2  # of what is cached: grows when the networks' training changes
_LIMIT = 10_000  # images of a split that are looked at, fewer if they have over
_VALUES = 1 << 28  # values (1 GiB) between them
_FEW = 2000  # held-out images up to which a kernel machine is the better judge of labels
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"

Judge = Callable[[Tensor], Tensor]  # x (n, C, H, W) to classes (n,)


def measure(data: Data, x: Tensor, labels: Tensor | None, cache: Path, seed: int) -> list[Measure]:
    """All figures about samples.

    Args:
        data: The data set.
        x: Samples, (N, C, H, W), in [-1, 1]; judged as the 8-bit pictures that they become.
        labels: Classes that the samples were asked to be, (N,), or None.
        cache: Folder for trained networks.
        seed: Seed of the networks and of the choice of training images for the floors.

    Returns:
        The figures; none if there are fewer than two samples, training or held-out images.
    """
    x = _as_written(x)
    limit = _limit(x[0].numel())
    train, train_labels = data.train.tensor(limit)
    test, test_labels = data.test.tensor(limit)
    if min(len(x), len(train), len(test)) < 2:
        return []
    classes = None if data.class_names is None else len(data.class_names)
    order = torch.randperm(len(train), generator=generator("floor", seed))
    stand_in = train[order[: len(x)]]  # real images in the samples' place
    measures = []
    if train_labels is not None and test_labels is not None and len(test_labels.unique()) > 1:
        judge, kind = _judge(cache, test, test_labels, classes or 0, seed)
        note = f"by {kind} trained on the {len(test)} held-out images alone"
        found = judge(x)
        if labels is not None:
            accuracy = _share(found, labels.cpu())
            floor = _share(judge(train), train_labels)
            about = f"share that is of the class asked for, {note}; {len(x)} samples, "
            about += f"floor: its accuracy on {len(train)} training images"
            error = math.sqrt(accuracy * (1 - accuracy) / len(x))
            measures.append(Measure("label_accuracy", accuracy, "higher", floor, about, error))
        present = float(len(found.unique()))
        about = f"of {classes}, {note}; {len(x)} samples, floor: {len(stand_in)} training images"
        floor = float(len(judge(stand_in).unique()))
        measures.append(Measure("classes_present", present, "higher", floor, about))
    if _fid_ready():
        measures.append(_fid(train, stand_in=test[: len(x)], x=x))
    return measures


def features(data: Data, batches: Iterable[Batch], cache: Path, seed: int) -> Features:
    """Features of pictures, (N, 32), by a network that learnt from the training split.

    Args:
        data: The data set.
        batches: Pictures in [-1, 1]; seen as the 8-bit ones that they become.
        cache: Folder for the network.
        seed: Its seed.
    """
    train, labels = data.train.tensor(_limit(data.train.images[0].size))
    classes = None if data.class_names is None else len(data.class_names)
    network = _cached(cache, "features", (train, labels, classes, seed), train.shape[1])
    task = "class" if classes else "rotation"
    about = f"features of a small network that learnt the {task} of {len(train)} training images"
    if not _fid_ready():
        about += "; not FID, which needs torch-fidelity and its weights"
    return joined([_features(network, _as_written(batch.x)) for batch in batches], about)


def _as_written(x: Tensor) -> Tensor:
    return to_uint8(x).cpu().float() / 127.5 - 1


def _limit(values: int) -> int:
    """How many images of so many values each are looked at."""
    return max(2, min(_LIMIT, _VALUES // values))


def _share(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).double().mean())


# --- networks ----------------------------------------------------------------------------------


class _Classifier(nn.Module):
    """Convolutions down to about 4x4, D = 32 features, classes. ``side``: pixels, the longer."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        shrink = max(1, side // 64)  # large images are judged at 64 to 127 pixels
        levels = max(1, math.ceil(math.log2(max(side // shrink, 5) / 4)))
        first = 32 if levels < 3 else 16  # the cost of a training stays within a minute
        widths = [min(first * 2**level, 128) for level in range(levels + 1)]
        layers: list[nn.Module] = [nn.AvgPool2d(shrink), _block(channels, widths[0], 1)]
        layers += [_block(a, b, 2) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.features = nn.Linear(4 * widths[-1], 32)
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.features(self.body(x))))
        return logits


def _block(wide: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(wide, out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.Conv2d(out, out, 3, 1, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


def _cached(
    cache: Path, name: str, told: tuple[Tensor, Tensor | None, int | None, int], channels: int
) -> _Classifier:
    """A classifier trained on (x, labels, classes, seed), from the cache if it is there."""
    x, labels, classes, seed = told
    digest = hashlib.blake2b(digest_size=12)
    digest.update(f"{_VERSION} {name} {classes} {seed} {tuple(x.shape)}".encode())
    digest.update(to_uint8(x).numpy().tobytes())
    if labels is not None:
        digest.update(labels.numpy().tobytes())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        network = _Classifier(channels, max(x.shape[2:]), classes or 4)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    digest.update(str(shapes).encode())
    path = cache / f"{name}-{digest.hexdigest()}.pt"
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    with one_thread():
        _train(network, x, labels, generator(name, seed))
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(network.state_dict(), partial)
    partial.replace(path)
    return network


def _train(
    network: _Classifier,
    x: Tensor,
    labels: Tensor | None,
    gen: torch.Generator,
    steps: int = 400,
) -> None:
    """Trains on batches of 64, each image shifted by up to an eighth of its side.

    Without labels the task is to tell by how many quarter turns a batch's parts were turned
    (Gidaris et al., 2018, https://arxiv.org/abs/1803.07728).
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    reach = max(1, min(x.shape[2:]) // 8)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=gen)
        images = _shift(x[rows], torch.randint(-reach, reach + 1, (2,), generator=gen).tolist())
        if labels is None:
            parts = images.chunk(4)
            logits = torch.cat([network(part.rot90(i, (2, 3))) for i, part in enumerate(parts)])
            wanted = torch.arange(len(parts)).repeat_interleave(len(parts[0]))
        else:
            logits, wanted = network(images), labels[rows]
        optimizer.zero_grad()
        F.cross_entropy(logits, wanted, label_smoothing=0.1).backward()
        optimizer.step()
        plan.step()
    network.eval()


def _shift(x: Tensor, by: list[int]) -> Tensor:
    """Moves images (N, C, H, W) down and right, repeating the border."""
    down, right = by
    reach = max(abs(down), abs(right))
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    top, left = reach - down, reach - right
    return padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


@torch.no_grad()
def _features(network: _Classifier, x: Tensor) -> Tensor:
    """Images (N, C, H, W) to features (N, D), taken before their nonlinearity."""
    return torch.cat([network.features(network.body(part)) for part in x.split(500)])


def _judge(cache: Path, x: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[Judge, str]:
    """A classifier of images and what it is; it sees nothing but x and labels."""
    if len(x) <= _FEW:
        return _kernel_machine(x, labels), "a support vector machine"
    network = _cached(cache, "judge", (x, labels, classes, seed), x.shape[1])

    @torch.no_grad()
    def judge(images: Tensor) -> Tensor:
        return torch.cat([network(part).argmax(1) for part in images.split(500)])

    return judge, "a small network"


def _kernel_machine(x: Tensor, labels: Tensor) -> Judge:
    """RBF kernel on pixels: 98.3 % on the training digits, from the 360 held-out ones."""
    from sklearn.svm import SVC

    machine = SVC(C=10.0, gamma="scale").fit(x.flatten(1).numpy(), labels.numpy())
    return lambda images: torch.from_numpy(machine.predict(images.flatten(1).numpy()))


# --- the true FID, where it can be had -----------------------------------------------------------


def _fid_ready() -> bool:
    """Whether torch-fidelity is installed and its Inception weights are on the disk."""
    from importlib.util import find_spec

    weights = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION
    return find_spec("torch_fidelity") is not None and weights.exists()


def _fid(train: Tensor, stand_in: Tensor, x: Tensor) -> Measure:
    """FID against the training split, as is usual; floor: held-out images in x's place."""
    values = [_torch_fidelity(part, train) for part in (x, stand_in)]
    note = (
        f"torch-fidelity, Inception-v3; {len(x)} samples against {len(train)} training images, "
        f"floor: {len(stand_in)} held-out images; depends strongly on the counts"
    )
    return Measure("fid", values[0], "lower", values[1], note)


def _torch_fidelity(a: Tensor, b: Tensor) -> float:
    import torch_fidelity

    found: dict[str, Any] = torch_fidelity.calculate_metrics(
        input1=_Rgb(a), input2=_Rgb(b), fid=True, cuda=torch.cuda.is_available(), verbose=False
    )
    return float(found["frechet_inception_distance"])


class _Rgb(Dataset[Tensor]):
    """uint8 RGB images, as torch-fidelity reads them; alpha is dropped."""

    def __init__(self, x: Tensor) -> None:
        colors = x[:, :1] if x.shape[1] < 3 else x[:, :3]
        self.pixels = to_uint8(colors).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]
