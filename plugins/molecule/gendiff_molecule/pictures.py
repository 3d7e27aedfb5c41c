"""Molecules to files that chemists open, to one picture, and to a film.

Three-dimensional views are drawn here, in numpy: spheres and cylinders in parallel projection with
a depth buffer. So they need neither a display nor a graphics library, and are the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from rdkit import Chem
from rdkit.Chem import rdCoordGen, rdMolDescriptors
from rdkit.Chem.Draw import rdMolDraw2D

from gendiff.modality import Ball, Exhibit, Picture, Scene, Stick
from gendiff_molecule.bonds import bond_orders, covered, to_mol
from gendiff_molecule.molecules import SYMBOLS, Molecules

_CELLS = 48  # molecules in a preview
_WIDTH, _VIEW, _SKETCH, _CAPTION = 280, 240, 132, 30  # pixels of a cell and of its parts
_GAP = 12  # pixels between cells
_LARGEST = 60.0  # Angstrom: a molecule that is longer would be a few dots
_WRITABLE = 9999.0  # Angstrom: what a molfile's columns hold

# Colours after Corey, Pauling and Koltun, a little softer; radii of balls in Angstrom.
_COLOURS = {
    1: 0xF4F4F4, 5: 0xF2B084, 6: 0x56595E, 7: 0x3D62E0, 8: 0xE33A32, 9: 0x55BE4B, 14: 0xD9BE8F,
    15: 0xF28C28, 16: 0xE8C832, 17: 0x35B04A, 35: 0xA3392C, 53: 0x8E3AA8,
}  # fmt: skip
_UNUSUAL = 0xD46AC4
_BALLS = {1: 0.25, 6: 0.37, 7: 0.36, 8: 0.35, 9: 0.33}
_BALL = 0.44
_STICKS = {1: (0.12, 0.0), 2: (0.09, 0.13), 3: (0.07, 0.18)}  # radius, distance of parallel ones
_VIEWER = np.array([0.0, 0.0, 1.0])
_LIGHT = np.array([-0.42, 0.55, 0.72]) / np.linalg.norm([-0.42, 0.55, 0.72])
_HALFWAY = (_LIGHT + _VIEWER) / np.linalg.norm(_LIGHT + _VIEWER)

_INK, _QUIET, _ODD, _WRONG = (45, 48, 54), (140, 145, 153), (168, 104, 10), (196, 52, 45)
_EDGE, _PAPER, _HAZE = (222, 225, 230), (246, 247, 249), (170, 174, 182)

Array = NDArray[np.float64]


# --- chemistry ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """A molecule as RDKit sees it.

    Args:
        mol: With the sample's atoms and positions; sanitised if valid.
        orders: Kekulised orders, (N, N), 0 for no bond, 4 for aromatic ones of invalid molecules.
        smiles: Canonical, without hydrogens; "" if not valid.
        missing: Hydrogens that open valences ask for, beside those that are there.
        fault: Why it is not valid, that is, why RDKit cannot sanitise it, or "".
        trouble: What is wrong with the positions, or "".
    """

    mol: Chem.Mol
    orders: NDArray[np.int8]
    smiles: str
    missing: int
    fault: str
    trouble: str

    @property
    def valid(self) -> bool:
        return not self.fault


def _read(molecules: Molecules, i: int) -> _Read:
    numbers, positions = molecules[i]
    trouble = _trouble(positions)
    if len(molecules.bond_offsets):
        smiles = str(molecules.smiles[i]) if len(molecules.smiles) else ""
        mol, orders = _with_bonds(numbers, molecules.bonds_of(i), smiles)
        fault = ""
    else:
        fault = trouble or ("" if covered(numbers) else "elements that EDM's table lacks")
        orders = _none(len(numbers)) if fault else bond_orders(numbers, positions)
        mol = to_mol(numbers, orders)
    fault = fault or _fault(mol)
    writable = np.isfinite(positions).all() and np.abs(positions).max(initial=0) <= _WRITABLE
    conformer = Chem.Conformer(len(numbers))
    placed = positions if writable else np.zeros_like(positions)
    conformer.SetPositions(np.array(placed, np.float64))
    mol.AddConformer(conformer)
    if fault:
        mol.UpdatePropertyCache(strict=False)
        return _Read(mol, orders, "", 0, fault, trouble)
    Chem.SanitizeMol(mol)
    missing = sum(a.GetNumImplicitHs() for a in mol.GetAtoms())
    plain = Chem.Mol(mol)
    Chem.Kekulize(plain, clearAromaticFlags=True)
    orders = Chem.GetAdjacencyMatrix(plain, useBO=True).astype(np.int8)
    return _Read(mol, orders, Chem.MolToSmiles(Chem.RemoveHs(mol)), missing, "", trouble)


def _none(count: int) -> NDArray[np.int8]:
    return np.zeros((count, count), np.int8)


def _with_bonds(
    numbers: NDArray[np.uint8], bonds: NDArray[np.int16], smiles: str
) -> tuple[Chem.Mol, NDArray[np.int8]]:
    """The molecule with these bonds (E, 3), not sanitised, and its orders (N, N)."""
    orders = _none(len(numbers))
    orders[bonds[:, 0], bonds[:, 1]] = orders[bonds[:, 1], bonds[:, 0]] = bonds[:, 2]
    # The SMILES' own molecule, if it is this graph in this order, knows formal charges and stereo.
    of_smiles = Chem.MolFromSmiles(smiles) if smiles else None
    for mol in (Chem.AddHs(of_smiles), of_smiles) if of_smiles else ():
        same = [a.GetAtomicNum() for a in mol.GetAtoms()] == numbers.tolist()
        if same and ((Chem.GetAdjacencyMatrix(mol) > 0) == (orders > 0)).all():
            return mol, orders
    return to_mol(numbers, orders), orders


def _fault(mol: Chem.Mol) -> str:
    """Why RDKit cannot sanitise a molecule, or ""."""
    problems = Chem.DetectChemistryProblems(mol)
    if not problems:
        return ""
    if problems[0].GetType() == "AtomValenceException":
        atom = mol.GetAtomWithIdx(problems[0].GetAtomIdx())
        bonds = sum(b.GetBondTypeAsDouble() for b in atom.GetBonds())
        return f"{atom.GetSymbol()} with {bonds:g} bonds"
    return "aromatic bonds that cannot alternate"


def _trouble(positions: NDArray[Any]) -> str:
    """Why positions (N, 3) cannot be drawn, or ""."""
    if not np.isfinite(positions).all():
        return "not finite"
    if np.abs(positions).max(initial=0) > _WRITABLE:
        return "not within 9999 angstrom"
    size = float(np.ptp(positions, axis=0).max()) if len(positions) else 0.0
    if size > _LARGEST:
        return f"flown apart: {size:.0f} angstrom"
    return "collapsed" if len(positions) > 1 and size < 0.3 else ""


# --- files -------------------------------------------------------------------------------------


def write(
    molecules: Molecules, folder: Path, ids: Sequence[int], hydrogens: str = "explicit"
) -> list[Path]:
    """Writes one SDF and one XYZ a molecule, named after its id; returns the SDFs' paths.

    Bonds are the molecules' own where they have them, else EDM's table's. The SDF has kekulised
    bonds and the properties ``smiles`` (canonical, empty if not valid), ``valid`` (whether RDKit
    sanitises it), ``n_atoms``, ``fragments``, ``hydrogens``, and ``fault`` where it is not valid.
    What does not sanitise is written nevertheless, with the bonds that were found; positions that
    a molfile cannot hold are written as 0, and the property ``positions`` says so.

    The XYZ holds what was sampled, with no atom added.

    Args:
        molecules: What to write.
        folder: Made if missing.
        ids: One for each molecule.
        hydrogens: ``"explicit"``: the molecules have theirs; ``missing_hydrogens`` counts those
            that open valences still ask for. ``"removed"``: RDKit adds hydrogens
            with coordinates to the valid ones, and the property ``hydrogens`` says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, number in zip(range(len(molecules)), ids, strict=True):
        read = _read(molecules, i)
        mol, note = read.mol, "generated" if hydrogens == "explicit" else "none"
        if hydrogens != "explicit" and read.valid and not read.trouble:
            mol, note = Chem.AddHs(mol, addCoords=True), "added by RDKit"
        properties = {
            "smiles": read.smiles,
            "valid": str(read.valid).lower(),
            "n_atoms": str(mol.GetNumAtoms()),
            "fragments": str(len(Chem.GetMolFrags(mol))),
            "hydrogens": note,
        }
        if hydrogens == "explicit":
            properties["missing_hydrogens"] = str(read.missing)
        if read.fault:
            properties["fault"] = read.fault
        if read.trouble:
            properties["positions"] = read.trouble
        path = folder / f"{number:05d}.sdf"
        path.write_text(_sdf(mol, f"{number:05d}", properties, read.valid), encoding="utf-8")
        about = f"{number:05d} {read.smiles or 'not valid'}, atoms as sampled"
        _write_xyz(*molecules[i], path.with_suffix(".xyz"), about)
        paths.append(path)
    return paths


def _sdf(mol: Chem.Mol, name: str, properties: dict[str, str], valid: bool) -> str:
    mol = Chem.Mol(mol)
    mol.SetProp("_Name", name)
    # Wedges would be drawn for a flat picture; in three dimensions the positions say it all.
    block = Chem.MolToMolBlock(mol, includeStereo=valid, kekulize=valid)
    data = "".join(f">  <{key}>\n{value}\n\n" for key, value in properties.items())
    return f"{block}{data}$$$$\n"


def _write_xyz(numbers: NDArray[Any], positions: NDArray[Any], path: Path, about: str) -> None:
    rows = "".join(
        f"{_symbol(int(z)):<2} {x[0]:14.6f} {x[1]:14.6f} {x[2]:14.6f}\n"
        for z, x in zip(numbers, positions, strict=True)
    )
    path.write_text(f"{len(numbers)}\n{about}\n{rows}", encoding="utf-8")


def _symbol(z: int) -> str:
    return SYMBOLS[z] if z < len(SYMBOLS) else Chem.GetPeriodicTable().GetElementSymbol(z)


# --- three dimensions --------------------------------------------------------------------------


def orientation(numbers: ArrayLike, positions: ArrayLike) -> Array:
    """The rotation (3, 3) to a view along the thinnest principal axis, a little from above.

    ``(positions - centre) @ orientation.T`` has x to the right, y up and z towards the viewer. It
    is a proper rotation: a molecule is never shown as its mirror image. Axes point where the third
    moment is positive, so that conformers that are alike look alike.
    """
    z, x = np.asarray(numbers), np.asarray(positions, np.float64)
    heavy = x[z > 1] if (z > 1).sum() > 2 else x
    heavy = heavy - heavy.mean(0)
    axes = np.linalg.eigh(heavy.T @ heavy + 1e-9 * np.diag([3.0, 2.0, 1.0]))[1].T[::-1]
    skew = ((heavy @ axes.T) ** 3).sum(0)
    axes = axes * np.where(skew < -1e-6, -1.0, 1.0)[:, None]
    axes[2] *= np.sign(np.linalg.det(axes))
    a, b = math.radians(22), math.radians(-14)
    about_x = [[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]]
    about_y = [[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]]
    turned: Array = np.array(about_x) @ np.array(about_y) @ axes
    return turned


class _Canvas:
    """A picture with depth. Lengths are in Angstrom from its middle, y up, z to the viewer."""

    def __init__(self, width: int, height: int, scale: float, fine: int) -> None:
        """``scale``: finished pixels an Angstrom; each is the mean of ``fine`` squared."""
        self.fine, self.scale = fine, scale * fine
        self.colour = np.ones((height * fine, width * fine, 3))
        self.depth = np.full(self.colour.shape[:2], -np.inf)

    def _patch(self, low: Array, high: Array) -> tuple[tuple[slice, slice], Array, Array]:
        """The rows and columns that a box (2,) to (2,) covers, and their x and y."""
        height, width = self.depth.shape
        left, right = (width / 2 + np.array([low[0], high[0]]) * self.scale).clip(0, width)
        top, bottom = (height / 2 - np.array([high[1], low[1]]) * self.scale).clip(0, height)
        rows, columns = slice(int(top), math.ceil(bottom)), slice(int(left), math.ceil(right))
        y = (height / 2 - np.arange(rows.start, rows.stop) - 0.5) / self.scale
        x = (np.arange(columns.start, columns.stop) + 0.5 - width / 2) / self.scale
        return (rows, columns), x[None, :], y[:, None]

    def _paint(
        self, where: tuple[slice, slice], seen: NDArray[np.bool_], z: Array, n: Array, rgb: Array
    ) -> None:
        """Shades the seen part of a patch where it is nearer than what is there."""
        seen = seen & (z > self.depth[where])
        n = n[seen]
        diffuse = 0.5 + 0.5 * (n @ _LIGHT)  # half-Lambert: no black sides
        shine = (n @ _HALFWAY).clip(0) ** 48
        rim = 1 - 0.25 * (1 - n[:, 2].clip(0, 1)) ** 2
        shade = ((0.42 + 0.66 * diffuse) * rim)[:, None] * rgb
        self.colour[where][seen] = shade.clip(0, 1) * (1 - 0.42 * shine[:, None]) + (
            0.42 * shine[:, None]
        )
        self.depth[where][seen] = z[seen]

    def sphere(self, centre: Array, radius: float, rgb: Array) -> None:
        where, x, y = self._patch(centre[:2] - radius, centre[:2] + radius)
        dx, dy = np.broadcast_arrays(x - centre[0], y - centre[1])
        square = radius**2 - dx**2 - dy**2
        dz = np.sqrt(square.clip(0))
        normal = np.stack([dx, dy, dz], -1) / radius
        self._paint(where, square > 0, centre[2] + dz, normal, rgb)

    def cylinder(self, a: Array, b: Array, radius: float, rgb: Array) -> None:
        """The side of a cylinder from a to b: for each pixel the nearer root of a quadratic."""
        length = float(np.linalg.norm(b - a))
        if length < 1e-6:
            return
        u = (b - a) / length
        pad = radius + 1 / self.scale
        where, x, y = self._patch(np.minimum(a, b)[:2] - pad, np.maximum(a, b)[:2] + pad)
        dx, dy = np.broadcast_arrays(x - a[0], y - a[1])
        flat = u[0] * dx + u[1] * dy
        # |p|^2 - (p.u)^2 = r^2 for p = (dx, dy, z), as alpha z^2 - 2 beta z + gamma = 0
        alpha = max(1 - u[2] ** 2, 1e-9)
        beta = flat * u[2]
        gamma = dx**2 + dy**2 - flat**2 - radius**2
        inside = beta**2 - alpha * gamma
        z = (beta + np.sqrt(inside.clip(0))) / alpha
        along = flat + u[2] * z
        p = np.stack([dx, dy, z], -1)
        normal = (p - along[..., None] * u) / radius
        seen = (inside > 0) & (along >= 0) & (along <= length)
        self._paint(where, seen, a[2] + z, normal, rgb)

    def finish(self, background: tuple[int, int, int], clear: bool = False) -> Image.Image:
        """Adds distance haze and dark outlines, and averages to the final size.

        ``clear`` leaves what is empty transparent; the background is then the haze's colour.
        """
        empty = np.isneginf(self.depth)
        paper = np.array(background) / 255
        if not empty.all():
            near, far = self.depth[~empty].max(), self.depth[~empty].min()
            # Full haze only for molecules that are deep, or flat ones would look faded.
            haze = 0.4 * (near - self.depth) / max(near - far, 3.0)
            haze = np.where(empty, 0.0, haze)[..., None]
            self.colour = self.colour * (1 - haze) + paper * haze
            depth = np.where(empty, far - 2.0, self.depth)
            padded = np.pad(depth, 2, mode="edge")
            rows, columns = depth.shape
            drop = np.zeros_like(depth)
            for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (3, 3), (1, 3), (3, 1)):
                drop = np.maximum(drop, depth - padded[dy : dy + rows, dx : dx + columns])
            line = np.where(empty, 0.0, ((drop - 0.25) / 0.5).clip(0, 1) * 0.6)[..., None]
            self.colour = self.colour * (1 - line) + np.array([0.12, 0.13, 0.16]) * line
        self.colour[empty] = paper
        height, width = (n // self.fine for n in self.depth.shape)
        mean = self.colour.reshape(height, self.fine, width, self.fine, 3).mean((1, 3))
        picture = Image.fromarray((mean * 255).round().clip(0, 255).astype(np.uint8))
        if clear:
            solid = (~empty).reshape(height, self.fine, width, self.fine).mean((1, 3))
            picture.putalpha(Image.fromarray((solid * 255).round().astype(np.uint8)))
        return picture


def _colour(z: int) -> int:
    return _COLOURS.get(z, _UNUSUAL)


def _rgb(z: int) -> Array:
    code = _colour(z)
    return np.array([code >> 16, code >> 8 & 255, code & 255]) / 255


def _beside(i: int, j: int, x: Array, bonded: NDArray[np.bool_]) -> Array:
    """Unit vector across the bond i-j, in the plane of a neighbour, else in the picture's."""
    u = x[j] - x[i]
    others = [(x[k] - x[e]) for e in (i, j) for k in np.flatnonzero(bonded[e]) if k not in (i, j)]
    for v in (*others, np.cross(u, [0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0])):
        v = v - u * (v @ u) / max(u @ u, 1e-12)
        if np.linalg.norm(v) > 0.2:
            return np.asarray(v / np.linalg.norm(v))
    return np.array([0.0, 1.0, 0.0])


def render(
    numbers: ArrayLike,
    positions: ArrayLike,
    orders: NDArray[np.int8],
    size: tuple[int, int],
    *,
    scale: float,
    fine: int = 3,
    background: tuple[int, int, int] = (255, 255, 255),
    clear: bool = False,
) -> Image.Image:
    """Draws balls and sticks as seen along -z; the origin is in the middle.

    Args:
        numbers: Atomic numbers, (N,).
        positions: In Angstrom, x to the right, y up, (N, 3).
        orders: Bond orders 0 to 4, (N, N), symmetric; aromatic ones (4) are drawn as double.
        size: Width and height in pixels.
        scale: Pixels an Angstrom.
        fine: Each pixel is the mean of so many squared.
        background: Red, green and blue, 0 to 255.
        clear: Leave it transparent; the background is then what distant atoms fade to.
    """
    z, x = np.asarray(numbers), np.asarray(positions, np.float64)
    canvas = _Canvas(*size, scale, fine)
    for number, centre in zip(z.tolist(), x, strict=True):
        canvas.sphere(centre, _BALLS.get(number, _BALL), _rgb(number))
    for stick in _sticks(z, x, orders):
        canvas.cylinder(*stick[:3], _rgb(stick[3]))
    return canvas.finish(background, clear)


def _sticks(
    z: NDArray[Any], x: Array, orders: NDArray[np.int8]
) -> Iterator[tuple[Array, Array, float, int]]:
    """Both halves of each bond's sticks: their ends, their radius, and the atom's number."""
    for i, j in zip(*np.nonzero(np.triu(orders, 1)), strict=True):
        order = {4: 2}.get(int(orders[i, j]), int(orders[i, j]))
        radius, apart = _STICKS[order]
        across = _beside(i, j, x, orders > 0) if order > 1 else np.zeros(3)
        # Equal parts of what the balls leave free.
        reach = [_BALLS.get(int(z[k]), _BALL) for k in (i, j)]
        length = max(float(np.linalg.norm(x[j] - x[i])), 1e-6)
        middle = x[i] + (x[j] - x[i]) * np.clip((length + reach[0] - reach[1]) / 2 / length, 0, 1)
        for k in range(order):
            shift = across * apart * (k - (order - 1) / 2) * (2 if order == 2 else 1)
            yield x[i] + shift, middle + shift, radius, int(z[i])
            yield middle + shift, x[j] + shift, radius, int(z[j])


def _fitted(x: Array, size: tuple[int, int], most: float, margin: float = 0.55) -> float:
    """Pixels an Angstrom with which the atoms x (N, 3), centred, fill a picture of this size."""
    half = np.abs(x[:, :2]).max(0) + margin
    return min(most, size[0] / 2 / half[0], size[1] / 2 / half[1])


def _centred(x: Array) -> Array:
    """With the middle of its box at the origin."""
    return x - (x.max(0) + x.min(0)) / 2


# --- preview -----------------------------------------------------------------------------------


def preview(molecules: Molecules, path: Path, columns: int | None = None) -> Path:
    """Draws the first 48 molecules as one picture: each in 3D, as a formula, and its SMILES.

    Invalid molecules have a red frame and the reason, and molecules that cannot be drawn a note in
    their place. If there are hydrogens, the caption counts those that open valences still ask for.

    Args:
        molecules: With their own bonds, or with bonds by EDM's table.
        path: The PNG's path.
        columns: Cells in a row; the picture is about half as wide again as high by default.
    """
    count = min(len(molecules), _CELLS)
    height = _VIEW + _SKETCH + _CAPTION
    columns = columns or max(1, min(count, round(math.sqrt(count * 1.5 * height / _WIDTH))))
    rows = max(1, math.ceil(count / columns))
    explicit = bool((molecules.numbers == 1).any())
    size = columns * (_WIDTH + _GAP) + _GAP, rows * (height + _GAP) + _GAP
    sheet = Image.new("RGB", size, _PAPER)
    for i in range(count):
        left = _GAP + i % columns * (_WIDTH + _GAP)
        top = _GAP + i // columns * (height + _GAP)
        sheet.paste(_cell(molecules, i, explicit), (left, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _cell(molecules: Molecules, i: int, explicit: bool) -> Image.Image:
    read = _read(molecules, i)
    numbers, positions = molecules[i]
    card = Image.new("RGB", (_WIDTH, _VIEW + _SKETCH + _CAPTION), _PAPER)
    draw = ImageDraw.Draw(card)
    edge, width = (_EDGE, 1) if read.valid else (_WRONG, 2)
    box = (0, 0, card.width - 1, card.height - 1)
    draw.rounded_rectangle(box, radius=10, fill=(255, 255, 255), outline=edge, width=width)
    if read.trouble or not len(numbers):
        text = read.trouble or "no atoms"
        draw.text((_WIDTH / 2, _VIEW / 2), text, _QUIET, _font(15), anchor="mm")
    else:
        x = np.asarray(positions, np.float64)
        x = _centred((x - x.mean(0)) @ orientation(numbers, x).T)
        view = _WIDTH - 16, _VIEW - 12
        scale = _fitted(x, view, most=46)
        card.paste(render(numbers, x, read.orders, view, scale=scale), (8, 8))
    if not read.trouble and len(numbers) > 1:
        sketch = _sketch(read, (_WIDTH - 24, _SKETCH - 6))
        if sketch is not None:
            card.paste(sketch, (12, _VIEW + 2))
    caption, ink = _caption(read, explicit)
    font = _font(13)
    while draw.textlength(caption, font) > _WIDTH - 24:
        caption = caption.rstrip(".")[:-1] + "..."
    spot = _WIDTH / 2, _VIEW + _SKETCH + _CAPTION / 2 - 4
    draw.text(spot, caption, ink, font, anchor="mm")
    return card


def _caption(read: _Read, explicit: bool) -> tuple[str, tuple[int, int, int]]:
    if not read.valid:
        return "not valid" if read.trouble else f"not valid: {read.fault}", _WRONG
    remarks = []
    if "." in read.smiles:
        remarks.append(f"{read.smiles.count('.') + 1} pieces")
    if explicit and read.missing:
        remarks.append(f"{read.missing} H missing")
    return ", ".join(remarks) + ": " * bool(remarks) + read.smiles, _ODD if remarks else _INK


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _sketch(read: _Read, size: tuple[int, int]) -> Image.Image | None:
    """The structural formula, or None if RDKit cannot lay it out."""
    try:
        mol = Chem.RemoveHs(read.mol) if read.valid else Chem.Mol(read.mol)
        mol.RemoveAllConformers()
        if not read.valid:
            Chem.FastFindRings(mol)
        rdCoordGen.AddCoords(mol)
        drawing = rdMolDraw2D.MolDraw2DCairo(*size)
        options: Any = drawing.drawOptions()
        options.prepareMolsBeforeDrawing = read.valid
        options.addStereoAnnotation = False
        options.padding = 0.06
        options.fixedBondLength = 31
        options.bondLineWidth = 1.8
        options.minFontSize = 12
        if not read.valid:
            options.useBWAtomPalette()
        if read.valid:
            rdMolDraw2D.PrepareAndDrawMolecule(drawing, mol, kekulize=True)
        else:
            drawing.DrawMolecule(mol)
        drawing.FinishDrawing()
        return Image.open(BytesIO(drawing.GetDrawingText())).convert("RGB")
    except (RuntimeError, ValueError):  # whatever a senseless graph provokes: RDKit's own kinds
        return None


# --- report ------------------------------------------------------------------------------------


def exhibits(molecules: Molecules) -> list[Exhibit]:
    """Each molecule in space, as a formula, and its SMILES or why it is not valid."""
    explicit = bool((molecules.numbers == 1).any())
    shown = []
    for i in range(len(molecules)):
        read = _read(molecules, i)
        numbers, positions = molecules[i]
        parts: list[Scene | Picture] = []
        if len(numbers) and not read.trouble:
            x = np.asarray(positions, np.float64)
            x = _centred((x - x.mean(0)) @ orientation(numbers, x).T)
            view = _WIDTH, _VIEW
            parts.append(_scene(numbers, x, read.orders, view, _fitted(x, view, most=46)))
            sketch = _sketch(read, (_WIDTH, _SKETCH)) if len(numbers) > 1 else None
            if sketch is not None:
                parts.append(Picture(_png(sketch), drawing=True))
        title = rdMolDescriptors.CalcMolFormula(read.mol) if read.valid else "not valid"
        remark = read.trouble or _caption(read, explicit)[0].removeprefix("not valid: ")
        shown.append(Exhibit(tuple(parts), title, (remark, f"{len(numbers)} atoms")))
    return shown


def stages(frames: Sequence[Molecules]) -> list[Exhibit]:
    """States of one molecule, seen by a camera that the last one places, as in a film.

    Bonds are by EDM's table, or the molecule's own; a state that cannot be drawn is empty.
    """
    numbers, positions = frames[-1][0]
    side = (_VIEW, _VIEW)
    turn, scale = np.eye(3), _VIEW / 12
    if len(numbers) and not _trouble(positions):
        turn = orientation(numbers, positions)
        x = (positions - positions.mean(0)) @ turn.T
        scale = _fitted(_centred(x), side, most=46, margin=1.4)
    shown = []
    for frame in frames:
        (numbers, positions), orders = frame[0], _read(frame, 0).orders
        parts: tuple[Scene, ...] = ()
        if len(numbers) and np.isfinite(positions).all() and np.ptp(positions) <= _LARGEST:
            x = np.asarray(positions, np.float64)
            parts = (_scene(numbers, (x - x.mean(0)) @ turn.T, orders, side, scale),)
        shown.append(Exhibit(parts))
    return shown


def _scene(
    numbers: NDArray[Any], x: Array, orders: NDArray[np.int8], size: tuple[int, int], scale: float
) -> Scene:
    """What :func:`render` draws, as a scene and its still."""
    still = render(numbers, x, orders, size, scale=scale, background=_HAZE, clear=True)
    balls = [
        Ball(_triple(centre), _BALLS.get(z, _BALL), _colour(z))
        for z, centre in zip(numbers.tolist(), x, strict=True)
    ]
    sticks = [
        Stick(_triple(a), _triple(b), radius, _colour(z))
        for a, b, radius, z in _sticks(numbers, x, orders)
    ]
    return Scene(balls, sticks, Picture(_png(still)))


def _triple(x: Array) -> tuple[float, float, float]:
    a, b, c = x.tolist()
    return a, b, c


def _png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


# --- film --------------------------------------------------------------------------------------


def animate(
    frames: Molecules | Sequence[tuple[ArrayLike, ArrayLike]],
    path: Path,
    size: int = 360,
    milliseconds: int = 80,
) -> Path:
    """Draws a molecule's states as a film, seen by a camera that the last state places.

    Atoms have their current element's colour. Bonds are by EDM's table, so they appear as they
    form; there are none while an element is not in the table. Atoms out of the picture are not
    drawn, and a state that is not finite is empty.

    Args:
        frames: The states, atomic numbers (N,) and positions (N, 3) in Angstrom, in turn.
        path: ``.gif`` or ``.webp``.
        size: Side in pixels.
        milliseconds: For each state; the last one stays for 2 s.
    """
    states = [(np.asarray(z), np.asarray(x, np.float64)) for z, x in frames]
    if not states:
        raise ValueError("a film needs at least one frame")
    turn, scale = np.eye(3), size / 12
    if states[-1][1].size and not _trouble(states[-1][1]):
        numbers, x = states[-1]
        turn = orientation(numbers, x)
        # Room for the states before, which are wider as a rule.
        scale = _fitted(_centred((x - x.mean(0)) @ turn.T), (size, size), size / 6, margin=1.4)
    images = list(_drawn(states, turn, size, scale))
    durations = [milliseconds] * (len(images) - 1) + [2000]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gif":
        images = _one_palette(images)
        kind: dict[str, Any] = {"format": "GIF", "optimize": False, "disposal": 1}
    else:
        kind = {"format": "WEBP", "quality": 88, "method": 4}
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=durations, loop=0, **kind
    )
    return path


def _drawn(
    states: Sequence[tuple[NDArray[Any], Array]], turn: Array, size: int, scale: float
) -> Iterator[Image.Image]:
    reach = size / scale  # atoms further away than this are out of the picture
    for number, (z, x) in enumerate(states):
        if len(x) and np.isfinite(x).all():
            x = (x - x.mean(0)) @ turn.T
            near = np.linalg.norm(x, axis=1) < reach
            z, x = z[near], x[near]
        else:
            z, x = z[:0], x[:0]
        known = len(z) > 0 and covered(z)
        orders = bond_orders(z, x) if known else _none(len(z))
        image = render(z, x, orders, (size, size), scale=scale, fine=2)
        draw = ImageDraw.Draw(image)
        # How far the film is; it also keeps equal frames apart, which writers would merge.
        done = (number + 1) / len(states)
        draw.rectangle((0, size - 3, size, size), fill=_PAPER)
        draw.rectangle((0, size - 3, round(done * size), size), fill=_QUIET)
        yield image


def _one_palette(images: list[Image.Image]) -> list[Image.Image]:
    """All pictures in the same 256 colours, found from a few of them: no flicker."""
    some = images[:: max(1, len(images) // 8)] + images[-1:]
    strip = Image.new("RGB", (some[0].width * len(some), some[0].height))
    for i, image in enumerate(some):
        strip.paste(image, (i * image.width, 0))
    palette = strip.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return [
        image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images
    ]
