"""The sources of the worked examples: the formulas they claim, lanes that go on, and files that are refused."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from stepcast.errors import ConfigError
from training.data.characters import UNKNOWN, Characters
from training.data.csv_sequences import CsvSequencesConfig
from training.data.in_memory import Examples, Looked
from training.data.python_class import PythonConfig
from training.data.source import SPLITS, Source
from training.data.table_config import TableConfig
from training.data.tokens import Tokens
from training.data.word_vectors import WordVectors, learn_word_vectors, read_word_vectors, write_word_vectors
from training.examples.control_charts import KINDS, ControlCharts, chart
from training.examples.moving_shapes import SHAPES, Camera, MovingShapes
from training.examples.reviews import BAD, CLASSES, GOOD, TURNS, Reviews, review

FOX = "the quick brown fox jumps over the lazy dog. "
TEXT = FOX * 40 + "\u20ac" + FOX
SMALL: dict[Callable[..., Source], dict[str, Any]] = {
    Characters: {},
    ControlCharts: {"train": 3, "validation": 2, "test": 2},
    MovingShapes: {"train": 5, "validation": 2, "test": 3},
    Reviews: {"train": 40, "validation": 10, "test": 10},
}


@pytest.mark.parametrize("make", SMALL, ids=lambda make: make.__name__)
def test_source_gives_the_same_batches_again_for_the_same_seed(make: Callable[..., Source]) -> None:
    """A resumed run reads what an unbroken one would have; another seed reads something else."""
    first, second, other = (make(batch=4, seed=seed, root=Path(), **SMALL[make]) for seed in (1, 1, 2))
    assert isinstance(first, Source)
    for split in SPLITS:
        pairs = list(zip(first.batches(split, 3), second.batches(split, 3), strict=True))
        assert pairs
        for a, b in pairs:
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)
            assert a.x.shape[2] == sum(feature.width for feature in first.features)
            assert a.y.shape[2] == len(first.outputs) == len(first.classes or ())
    assert not torch.equal(next(first.batches("train", 3)).x, next(other.batches("train", 3)).x)


def test_control_charts_follow_their_formulas() -> None:
    """Noise within m +- 3 s, and on top of it exactly what each kind adds."""
    for kind, name in enumerate(KINDS):
        for seed in range(20):
            values = chart(np.random.default_rng(seed), kind, 60)[:, 0]
            rng = np.random.default_rng(seed)
            noise = 30 + 2 * rng.uniform(-3, 3, 60)
            assert np.abs(noise - 30).max() <= 6
            extra = values - noise
            draws = {"slope": rng.uniform(0.2, 0.5)} if "creasing" in name else {"height": rng.uniform(7.5, 20)}
            sign = -1 if name.startswith("d") else 1
            if name == "normal":
                np.testing.assert_allclose(extra, 0, atol=1e-5)
            elif name == "cyclic":
                assert 9.5 <= np.abs(extra).max() <= 15.01
                assert 60 / 15 - 1 <= (np.diff(np.sign(extra)) > 0).sum() <= 60 / 10 + 1
            elif "creasing" in name:
                np.testing.assert_allclose(extra, sign * draws["slope"] * np.arange(1, 61), atol=1e-5)
            else:
                heights = np.unique(extra.round(3))
                np.testing.assert_allclose(heights, sorted([0, sign * draws["height"]]), atol=1e-3)
                change = int(np.flatnonzero(np.abs(extra) > 1)[0]) + 1
                assert 20 <= change <= 41


def test_control_charts_are_many_to_one_with_masks() -> None:
    """Every kind as often, lengths within the limits, one label per series, at its last step."""
    source = ControlCharts(batch=10, seed=1, root=Path(), train=5, validation=0, test=5, lengths=(40, 60))
    assert source.readout == "last"
    counts = np.zeros(len(KINDS))
    for batch in source.batches("test"):
        assert batch.x_mask is not None
        assert batch.y_mask is not None
        lengths = batch.x_mask.sum(1)
        assert 40 <= int(lengths.min()) <= int(lengths.max()) <= 60
        assert torch.equal(batch.y_mask, torch.arange(batch.x.shape[1]) == lengths[:, None] - 1)
        counts += batch.y.sum((0, 1)).numpy()
    assert counts.tolist() == [5] * 6
    assert list(source.batches("validation")) == []
    with pytest.raises(ConfigError, match=r"lengths \[60, 40\]"):
        ControlCharts(batch=1, seed=1, root=Path(), lengths=(60, 40))


def test_moving_shapes_draw_what_their_label_says() -> None:
    """Without noise: a shape of its own area in every frame that is not hidden, inside the picture, in stretches."""
    camera = Camera(np.random.default_rng(0), 16, hidden=0.3, noise=0.0)
    areas: dict[int, list[float]] = {kind: [] for kind in range(len(SHAPES))}
    hidden = frames = 0
    for _ in range(60):
        pixels, shapes = camera.film(24)
        assert 1 <= (np.diff(shapes) != 0).sum() + 1 <= 3
        for picture, shape in zip(pixels, shapes, strict=True):
            frames += 1
            if picture.any():
                areas[int(shape)].append(picture.sum())
            else:
                hidden += 1
    assert hidden / frames == pytest.approx(0.3, abs=0.04)
    means = [np.mean(areas[kind]) for kind in range(len(SHAPES))]
    assert means[1] > means[0] > means[2] > means[3] > 4  # square, ring, cross, line
    for kind in areas:
        assert min(areas[kind]) > 0.5 * means[kind]  # nothing leaves the picture
    with pytest.raises(ConfigError, match="size 8"):
        MovingShapes(batch=1, seed=1, root=Path(), size=8)


def test_review_is_what_most_of_its_clauses_are() -> None:
    """Count praise and blame in the text itself, turned round by each negation."""
    rng = np.random.default_rng(5)
    turned = 0
    for _ in range(300):
        label, text = review(rng)
        score, sign = 0, 1
        for word in text.split():
            if word in TURNS:
                sign, turned = -1, turned + 1
            elif word in GOOD or word in BAD:
                score += sign if word in GOOD else -sign
                sign = 1
        assert CLASSES[score > 0] == label
        assert score % 2 == 1
    assert turned > 100


def test_characters_are_lanes_of_one_text(tmp_path: Path) -> None:
    """The label is the next character, windows and lanes go on without a gap, and only the first window starts."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    source = Characters(batch=3, seed=1, root=tmp_path, path="text.txt", steps=16)
    assert source.classes[-1] == UNKNOWN
    assert source.feedback[0].source == "class"
    batches = list(source.batches("train", 5))
    for batch in batches:
        assert torch.equal(batch.x[:, 1:, 0].long(), batch.y[:, :-1].argmax(2))
    for before, after in pairwise(batches):
        assert torch.equal(before.y[:, -1].argmax(1), after.x[:, 0, 0].long())
    assert [bool(batch.starts.all()) for batch in batches if batch.starts is not None] == [True] + [False] * (
        len(batches) - 1
    )
    lanes = torch.cat([batch.x[..., 0].long() for batch in batches], dim=1)
    read = "".join(source.classes[index] for index in lanes.flatten())
    part = TEXT[: round(len(TEXT) * 0.9)]
    assert read in part
    assert len(read) > len(part) - 16 - 3


def test_characters_that_training_never_saw_are_unknown(tmp_path: Path) -> None:
    """The euro sign stands in the test part only; validation has all the letters."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    source = Characters(batch=3, seed=1, root=tmp_path, path="text.txt", steps=16, encoding="one_hot")
    labels = torch.cat([batch.y.argmax(2).flatten() for batch in source.batches("test")])
    assert (labels == len(source.classes) - 1).sum() == 1
    assert source.features[0].width == len(source.classes)
    batch = next(source.batches("validation"))
    assert torch.equal(batch.x[:, 1:], batch.y[:, :-1])
    few = Characters(batch=3, seed=1, root=tmp_path, path="text.txt", steps=16, alphabet=4)
    assert few.classes == (" ", "e", "o", UNKNOWN)  # the three most frequent


def test_unreadable_or_short_text_is_refused(tmp_path: Path) -> None:
    """No such file; no UTF-8; too little for the lanes."""
    with pytest.raises(ConfigError, match=r"nothing\.txt: cannot be read"):
        Characters(batch=3, seed=1, root=tmp_path, path="nothing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.txt: cannot be read"):
        Characters(batch=3, seed=1, root=tmp_path, path="latin.txt")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ConfigError, match="5 characters are too few for 3 lanes of 64 steps"):
        Characters(batch=3, seed=1, root=tmp_path, path="short.txt")


@pytest.mark.parametrize("name", ["words.txt", "words.bin", "words.txt.gz", "words.bin.gz"])
def test_word_vectors_come_back_from_both_formats(tmp_path: Path, name: str) -> None:
    """word2vec's text and binary format, plain and compressed."""
    rng = np.random.default_rng(0)
    words = WordVectors(("the", "fine", "caf\u00e9"), rng.normal(size=(3, 5)).astype(np.float32))
    write_word_vectors(tmp_path / name, words, binary=".bin" in name)
    back = read_word_vectors(tmp_path / name)
    assert back.words == words.words
    np.testing.assert_allclose(back.vectors, words.vectors, rtol=1e-6)
    assert read_word_vectors(tmp_path / name, limit=2).words == ("the", "fine")
    assert back.known(["fine", "unheard", "the"]) == [1, 0]


def test_broken_word_vectors_are_refused(tmp_path: Path) -> None:
    """No file; a binary file that is text; a text that ends too early."""
    with pytest.raises(ConfigError, match=r"words\.txt: cannot be read as word2vec's text format"):
        read_word_vectors(tmp_path / "words.txt")
    (tmp_path / "words.bin").write_text("3 5\nno binary")
    with pytest.raises(ConfigError, match=r"words\.bin: cannot be read as word2vec's binary format"):
        read_word_vectors(tmp_path / "words.bin")
    (tmp_path / "words.txt").write_text("3 2\na 1 2\nb 1\n")
    with pytest.raises(ConfigError, match=r"words\.txt: cannot be read as word2vec's text format"):
        read_word_vectors(tmp_path / "words.txt")


def test_learned_vectors_put_words_of_one_kind_of_text_together() -> None:
    """Praise meets praise and blame meets blame; the same seed learns the same numbers."""
    rng = np.random.default_rng(2)
    sentences = [list(rng.choice(GOOD if number % 2 else BAD, 10)) for number in range(800)]
    words, again = (learn_word_vectors(sentences, 16, 7) for _ in range(2))
    np.testing.assert_array_equal(words.vectors, again.vectors)
    unit = words.vectors / np.linalg.norm(words.vectors, axis=1, keepdims=True)
    good, bad = unit[words.known(GOOD)], unit[words.known(BAD)]
    assert (good @ good.T).mean() > (good @ bad.T).mean() + 0.3


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A directory with word vectors and labelled lines."""
    vectors = np.array([[1, 0], [0, 1], [2, 2]], np.float32)
    write_word_vectors(tmp_path / "words.vec", WordVectors(("good", "bad", "don't"), vectors))
    (tmp_path / "train.tsv").write_text("pos\tGood, GOOD!\nneg\tunheard-of bad don't\nneg\tbad bad bad good\n")
    return tmp_path


def test_tokens_become_vectors_and_one_label_at_the_end(texts: Path) -> None:
    """Lower case, no punctuation, unknown words dropped, long texts cut, the class at the last word."""
    source = Tokens(batch=3, seed=1, root=texts, vectors="words.vec", train="train.tsv", test="train.tsv", max_steps=3)
    (batch,) = source.batches("test")
    assert source.classes == ("neg", "pos")
    assert source.readout == "last"
    assert source.features[0].width == 2
    rows = sorted(zip(batch.x.tolist(), batch.y.tolist(), strict=True))
    nothing = [0.0, 0.0]
    assert rows == [
        ([[0, 1], [0, 1], [0, 1]], [nothing, nothing, [1, 0]]),
        ([[0, 1], [2, 2], nothing], [nothing, [1, 0], nothing]),
        ([[1, 0], [1, 0], nothing], [nothing, [0, 1], nothing]),
    ]


def test_texts_take_four_bytes_a_word_until_a_batch_needs_their_vectors() -> None:
    """1,000 texts of 230 words with 300 numbers each would be 276 MB as vectors; the same vectors come out."""
    random = np.random.default_rng(1)
    table = random.normal(size=(50, 300)).astype(np.float32)
    places = [random.integers(0, 50, 230).tolist() for _ in range(1000)]
    texts = Looked(places, table)
    assert texts.nbytes == 1000 * (230 * 4 + 8)
    assert (texts[0] == table[places[0]]).all()
    assert (texts[-1] == table[places[-1]]).all()
    assert (texts[999] == table[places[999]]).all()
    assert texts.lengths.tolist() == [230] * 1000
    with pytest.raises(IndexError):
        texts[1000]
    assert len(Looked([], table)) == 0
    assert Examples(texts, [np.zeros((1, 2), np.float32)] * 1000).steps == [230] * 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pos\tgood\nneutral\tbad\n", r"line 2: text has the label 'neutral', training has neg, pos"),
        ("pos\tgood\nneg\tunheard of\n", r"line 2: text has no word with a vector: 'unheard of'"),
        ("pos\tgood\nbad without a tab\n", r"test\.tsv, line 2: no label, wanted label<TAB>text"),
        ("", r"test\.tsv: no lines"),
    ],
)
def test_lines_that_cannot_be_used_are_refused(texts: Path, text: str, message: str) -> None:
    """The message says which line, and what was wanted."""
    (texts / "test.tsv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Tokens(batch=1, seed=1, root=texts, vectors="words.vec", train="train.tsv", test="test.tsv")


def test_python_source_of_the_documents_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class in docs/data.md, as a user would put it into a module."""
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "echo_source.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = PythonConfig.model_validate({"kind": "python", "class": "echo_source:Echo", "options": {"steps": 5}})
    batch = next(config.open(batch=8, seed=1, root=tmp_path).batches("train"))
    assert torch.equal(batch.y[:, 1:], batch.x[:, :-1])
    assert batch.y_mask is not None
    assert batch.y_mask.tolist() == [[False, True, True, True, True]] * 8


def test_configuration_of_the_documents_is_accepted() -> None:
    """The YAML in docs/data.md is what the classes take, and its tables name every key."""
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block)["data"] for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    kinds = {"csv_sequences": CsvSequencesConfig, "table": TableConfig, "python": PythonConfig}
    assert {block["kind"] for block in blocks} == set(kinds)
    for block in blocks:
        kinds[block["kind"]].model_validate(block)
    sections = {"csv_sequences": ("## csv_sequences", "### Alignment"), "table": ("## table", "## python")}
    for kind, (start, end) in sections.items():
        section = text[text.index(start) : text.index(end)]
        missing = [key for key in kinds[kind].model_fields if not re.search(rf"\b{key}\b", section)]
        assert missing == []
