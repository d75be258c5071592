"""What transformers computed once, labs of random checkpoints, and the requests that are asked of both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file

from executor.image import ArrayPixels
from executor.make_checkpoint import make_random_checkpoint
from planner.plan import Plan
from planner.workload import parse_image
from tests.oracle.lab import PIXELS, Answer, Lab
from tests.oracle.oracle import process
from tests.oracle.settings import SETTINGS, Setting

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from threads, and these wait for one another where the cores are taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Golden:
    """What transformers computed with the stored tiny model in float32, and a Lab of a float32 checkpoint of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        shutil.copyfile(DATA / "tiny_config.json", folder / "config.json")
        # stored in bfloat16, and exact there
        weights = {n: t.float() for n, t in load_file(DATA / "tiny.safetensors").items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.lab = Lab(folder)
        with np.load(DATA / "tiny_expected.npz") as arrays:
            self.expected = {name: torch.from_numpy(arrays[name]) for name in arrays}
        self.ids = self.expected["input_ids"].tolist()
        self.grids = [(int(h), int(w)) for _, h, w in self.expected["grid_thw"]]
        self.images = [parse_image(f"{14 * w}x{14 * h}", **PIXELS) for h, w in self.grids]
        values = self.expected["pixel_values_x40"].float() / 40
        split = values.split([h * w for h, w in self.grids])
        self.pixels = [ArrayPixels(v, i) for v, i in zip(split, self.images, strict=True)]

    def plan(
        self,
        setting: str | Setting | None = None,
        *,
        new_tokens: int = 12,
        spare_rows: int = 0,
        budget_bytes: int | None = None,
    ) -> Plan:
        workload = self.lab.workload(self.images, len(self.ids) + spare_rows, new_tokens)
        return self.lab.plan(workload, setting, budget_bytes=budget_bytes)

    def run(self, plan: Plan, **changes: Any) -> Answer:
        return self.lab.run(plan, self.pixels, self.ids, **changes)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(tmp_path_factory.mktemp("golden") / "tiny")


@pytest.fixture(scope="session")
def settings() -> dict[str, Setting]:
    return SETTINGS


@pytest.fixture(scope="session", params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> str:
    """Each setting's name in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Lab of a random checkpoint by specification and seed, made once."""
    made: dict[tuple[str, int], Lab] = {}

    def lab(specification: str, seed: int = 0) -> Lab:
        key = (specification, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / specification.replace(":", "-")
            make_random_checkpoint(specification, folder, seed=seed)
            made[key] = Lab(folder)
        return made[key]

    return lab


class Pictures:
    """The images of a request: files, as planned, transformers' pixel values."""

    def __init__(self, paths: Sequence[Path], lab: Lab) -> None:
        self.paths = tuple(paths)
        self.images = [parse_image(str(path), **PIXELS) for path in paths]
        self.batch = process(lab.folder, paths)


# name -> crops as (file, left, top, width, height, scaled to)
CROPS: dict[str, tuple[tuple[str, tuple[int, int, int, int], tuple[int, int]], ...]] = {
    "square": (("astronaut.jpg", (100, 20, 380, 300), (280, 280)),),
    "wide strip": (("earth_3840x2160.jpg", (0, 900, 3840, 1200), (590, 46)),),
    "tall": (("astronaut.jpg", (180, 0, 290, 512), (99, 461)),),
    "needs upscaling": (("earth_3840x2160.jpg", (1900, 1000, 1939, 1027), (39, 27)),),
    "two at once": (
        ("astronaut.jpg", (0, 0, 300, 250), (151, 123)),
        ("earth_3840x2160.jpg", (1000, 500, 2500, 1500), (260, 170)),
    ),
}


@pytest.fixture(scope="session")
def crops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ...]]:
    """Five requests' image files, cut from the examples."""
    folder = tmp_path_factory.mktemp("crops")
    files: dict[str, tuple[Path, ...]] = {"no image": ()}
    for name, parts in CROPS.items():
        paths = []
        for number, (source, box, size) in enumerate(parts):
            path = folder / f"{name.replace(' ', '-')}-{number}.png"
            with Pillow.open(EXAMPLES / source) as picture:
                picture.crop(box).resize(size, Pillow.Resampling.BICUBIC).save(path)
            paths.append(path)
        files[name] = tuple(paths)
    return files


@pytest.fixture(scope="session", params=["no image", *CROPS])
def request_name(request: pytest.FixtureRequest) -> str:
    """Each request's name in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def pictures(crops: dict[str, tuple[Path, ...]], labs: Any) -> dict[str, Pictures]:
    """The five requests and one without an image; every tiny checkpoint has the same preprocessor_config.json."""
    return {name: Pictures(paths, labs("tiny")) for name, paths in crops.items()}
