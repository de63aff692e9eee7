"""Scenes: disjoint splits, determinism, geometry."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from lightvlm.reference_vlm import digits
from lightvlm.reference_vlm.backgrounds import _COLUMNS, make_background
from lightvlm.reference_vlm.scenes import NAMES, TrainingScenes, make_scenes, place


def test_splits_are_disjoint_complete_and_stratified():
    _, labels = digits.load_digits()
    splits = [digits.split_indices(split) for split in digits.SPLITS]
    assert [len(split) for split in splits] == [1297, 200, 300]
    assert np.array_equal(np.sort(np.concatenate(splits)), np.arange(1797))
    for split in splits:
        share = np.bincount(labels[split], minlength=10) / len(split)
        assert np.abs(share - np.bincount(labels) / 1797).max() < 0.01


def test_photograph_regions_are_disjoint():
    edges = [edge for columns in _COLUMNS for edge in columns]
    assert edges == sorted(edges)
    assert len(set(edges)) == len(edges)


@pytest.mark.parametrize("split", digits.SPLITS)
def test_scenes_use_digits_of_their_split_only(split):
    own = set(digits.split_indices(split).tolist())
    used = {digit.sample for scene in make_scenes(split, 8, 0) for digit in scene.digits}
    assert used <= own


def test_training_bank_uses_training_digits_only():
    own = set(digits.split_indices("train").tolist())
    source = TrainingScenes(seed=0, renderings=1, backgrounds=4)
    assert {digit.sample for scene in source.draw(20) for digit in scene.digits} <= own


def test_scenes_are_deterministic_and_independent_of_count():
    first, second = make_scenes("test", 5, 3), make_scenes("test", 3, 3)
    for a, b in zip(first, second, strict=False):
        assert np.array_equal(a.image, b.image)
        assert a.digits == b.digits
    assert not np.array_equal(first[0].image, make_scenes("test", 1, 4)[0].image)


def test_scene_geometry_and_colours():
    counts = set()
    for scene in make_scenes("val", 40, 1):
        assert scene.image.shape == (128, 128, 3)
        assert scene.image.dtype == np.uint8
        x = np.array([digit.x for digit in scene.digits])
        y = np.array([digit.y for digit in scene.digits])
        counts.add(len(x))
        assert (np.diff(x) >= 12).all()
        apart = np.maximum(np.abs(x[:, None] - x), np.abs(y[:, None] - y))
        assert (apart[~np.eye(len(x), dtype=bool)] >= 28).all()
        assert len({digit.colour for digit in scene.digits}) == len(x)
        assert {digit.colour for digit in scene.digits} <= set(NAMES)
        assert all(24 <= digit.size <= 28 for digit in scene.digits)
    assert counts == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("count", [1, 2, 6])
def test_placement_stays_inside(count):
    centres = place(count, np.random.default_rng(0))
    assert centres.shape == (count, 2)
    assert (centres >= digits.CANVAS // 2).all()
    assert (centres <= 128 - digits.CANVAS // 2).all()


def test_unaugmented_glyphs_keep_their_ink():
    images, _ = digits.load_digits()
    samples = digits.split_indices("val")[:20]
    glyphs, sizes = digits.render_glyphs(samples, np.random.default_rng(0), 0.0)
    assert glyphs.shape == (20, digits.CANVAS, digits.CANVAS)
    # A glyph's ink covers the share of its box that the original's does, give or take the soft threshold.
    ink = glyphs.mean((1, 2)) / 255 * digits.CANVAS**2
    expected = (images[samples] > 0.38).mean((1, 2)) * (sizes * 1.0) ** 2
    assert np.corrcoef(ink, expected)[0, 1] > 0.9
    assert (np.abs(ink / expected - 1) < 0.5).all()


def test_backgrounds_stay_dull():
    rng = np.random.default_rng(0)
    for _ in range(30):
        background = make_background("test", rng)
        assert background.shape == (128, 128, 3)
        assert background.max() <= 130


@pytest.mark.parametrize(
    "arguments", [("training", 1, 0), ("", 1, 0), ("test", -1, 0), ("test", 1, -1)], ids=str
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must"):
        make_scenes(*arguments)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    real_import = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    digits.load_digits.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'lightvlm\[demo\]'"):
        digits.load_digits()
