"""python -m training train | evaluate | export CONFIG.yaml [--set key=value]... [--out models]"""

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stepcast.arguments import Parser
from stepcast.errors import ConfigError, ManifestError
from stepcast.manifest import MODEL_FILE, Feature, Manifest, Output, read_manifest, sha256_of
from stepcast.predictive import Predictive

from .backtest import FITTED, Forecaster, backtest, predictive_of, tables, trained, with_kept, write_json, write_page
from .calibration import calibrate
from .check import check_held_out, check_names
from .checkpoint import BEST_FILE, check_meaning, fitting, load_checkpoint, load_weights
from .comparison import as_dict
from .data.source import Source, Split
from .data.table import TableSource
from .evaluate import answers, evaluate
from .export import describe, next_version, publish, stage, state_tensors
from .job import Job, fit, open_job
from .metrics import Result
from .network import Network
from .parallel import join, leading, leave
from .peers import PEERS, chosen
from .probabilistic import DistributionMetrics
from .progress import Progress
from .report import Forecast, forecast_of, print_report, write_report
from .segments import labelled
from .skill import Measurement, skill_table
from .stepper import Stepper
from .sweep import sweep
from .train import History

DISTANCES = (1, 6, 24)
PLOT_FILE = "test_week.png"


def main(argv: list[str] | None = None, prog: str = "python -m training") -> int:
    """Run a command; 2 for a wrong configuration, 1 for a model that could not be proved."""
    arguments = _parser(prog).parse_args(argv)
    console = Console(quiet=not leading())
    try:
        return COMMANDS[arguments.command](open_job(arguments, console))
    except (ConfigError, ManifestError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        leave()


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Train, measure and export models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "train a network, measure it on the test split, and write models/<name>/<version>/"),
        ("evaluate", "measure an exported model one step at a time"),
        ("export", "write a model from the best checkpoint of a run"),
        ("backtest", "compare a model with its baselines, on the test rows or from several origins"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, help="YAML file")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
        command.add_argument("--out", type=Path, default=Path("models"), help="model repository (default: models)")
        command.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints (default: runs)")
        command.add_argument("--version", type=int, help="default: train and export the next, evaluate the highest")
        if name == "train":
            command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
            command.add_argument("--tensorboard", action="store_true", help="write event files beside the checkpoints")
            command.add_argument("--sweep", type=Path, metavar="FILE", help="train many times, with values from ranges")
        if name == "evaluate":
            command.add_argument("--split", choices=("train", "validation", "test"), default="test")
            command.add_argument("--report", type=Path, help="directory for metrics.json, plots and report.html")
        if name == "backtest":
            _backtest_arguments(command)
    return parser


def _backtest_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--origins", type=int, help="train before each of so many; default: measure the exported model"
    )
    command.add_argument("--no-refit", action="store_true", help="train before the first origin alone")
    command.add_argument("--window", choices=("expanding", "sliding"), default="expanding", help="of the training rows")
    command.add_argument("--without", action="append", default=[], choices=FITTED, help="leave a baseline out")
    command.add_argument(
        "--peers", default="", metavar="NAMES", help=f"train networks of others too: {','.join(PEERS)}"
    )
    command.add_argument("--keep-peers", action="store_true", help="keep rows of peers that --json's FILE has")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every score")
    command.add_argument("--page", type=Path, metavar="FILE", help="write the tables between a page's marks")


def train(job: Job) -> int:
    """Train, and let the leading process export; of a sweep the best trial."""
    if job.arguments.sweep:
        return export(sweep(job))
    world = join(job.config.training.device)
    if not world.leads:
        fit(job, world)
        return 0
    tensorboard = job.run_directory / "tensorboard" if job.arguments.tensorboard else None
    with Progress(job.config.training.epochs, console=job.console, tensorboard=tensorboard) as progress:
        network, history = fit(job, world, progress)
    job.console.print(f"best epoch {history.best_epoch + 1}, {history.updates} updates", highlight=False)
    return _export(job, network, history)


def export(job: Job) -> int:
    """Export the best weights of an earlier run."""
    network = Network.of(job.config.network, job.source)
    check_names(network, job.source, job.config)
    check_held_out(network, job.source, job.config)
    path = job.run_directory / BEST_FILE
    if not path.exists():
        raise ConfigError(f"{path}: no such file. Train first.")
    load_weights(network, path)
    saved = load_checkpoint(job.run_directory, torch.device("cpu"))
    with fitting(path):
        check_meaning(saved or {}, job.source)
    return _export(job, network, History(**saved["history"]) if saved else None)


def _export(job: Job, network: Network, history: History | None) -> int:
    """Calibrate, stage, measure as served, publish."""
    out: Path = job.arguments.out
    factors = calibrate(network, job.source, job.config, partial(job.console.print, highlight=False))
    staged = stage(network, job.source, out)
    try:
        stepper = Stepper(staged, state_tensors(network))
        version = job.arguments.version or next_version(out, job.config.name)
        manifest = describe(
            network, job.source, job.config, sha256=sha256_of(staged / MODEL_FILE), version=version, metrics={}
        )
        metrics = _measure(job, stepper, manifest, plot=staged / PLOT_FILE)
        if factors:
            metrics["spread_factors"] = factors
        if history is not None:
            metrics["training"] = history.as_dict()
        provenance = manifest.provenance.model_copy(update={"metrics": metrics})
        final = publish(staged, manifest.model_copy(update={"provenance": provenance}), out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    job.console.print(f"wrote {final}", highlight=False)
    return 0


def evaluate_model(job: Job) -> int:
    """Measure a model that was exported before."""
    directory = job.arguments.out / job.config.name / str(_exported_version(job))
    manifest = read_manifest(directory)
    _check_fits(job.source, manifest)
    split = job.arguments.split
    if not any(labelled(batch) for batch in job.source.batches(split)):
        raise ConfigError(f"data: no label in the {split} split, nothing could be measured")
    stepper = Stepper.of(directory, manifest)
    if job.arguments.split == "test":
        _measure(job, stepper, manifest)
    if job.arguments.split != "test" or job.arguments.report:
        result = _evaluate(job, stepper, manifest, job.arguments.split)
        print_report(result, job.console)
        if job.arguments.report:
            write_report(job.arguments.report, result, _forecast(job, stepper, manifest), manifest.provenance)
    return 0


def _check_fits(source: Source, manifest: Manifest) -> None:
    """See that the data has what the model takes and says.

    Raises:
        ConfigError: other features or outputs, or the same ones read in another way.
    """
    for verb, wanted, given in (
        ("takes", manifest.features, source.features),
        ("gives", manifest.points, source.outputs),
    ):
        took, got = (", ".join(_named(one) for one in some) for some in (wanted, given))
        if took != got:
            raise ConfigError(f"data: {manifest.name}/{manifest.version} {verb} {took}, the data gives {got}")
    for model, data in zip(manifest.features, source.features, strict=True):
        if model.categories != data.categories:
            took, got = (", ".join(map(repr, one.categories or ())) or "none" for one in (model, data))
            raise ConfigError(
                f"data: feature {data.name!r} has the categories {got}, in {manifest.name}/{manifest.version} {took}. "
                "List these in the recipe, in this order: categories."
            )
        if model.calendar is not None and (model.calendar, model.ahead) != (data.calendar, data.ahead):
            raise ConfigError(
                f"data: feature {data.name!r} is {data.unit}, in {manifest.name}/{manifest.version} {model.unit}"
            )


def _named(one: Feature | Output) -> str:
    return f"{one.name!r} ({one.width} wide)" if isinstance(one, Feature) and one.width > 1 else repr(one.name)


def _forecast(job: Job, stepper: Stepper, manifest: Manifest) -> Forecast | None:
    """What is drawn of a regression: a series of the split's first batch."""
    if manifest.task != "regression":
        return None
    summary = manifest.readout == "last"
    found = answers(stepper, job.source, job.arguments.split, streaming=manifest.streaming, summary=summary)
    forecast = manifest.distribution
    predictive = None if forecast is None else Predictive(manifest.outputs, forecast)
    return forecast_of(manifest.points, *next(found), predictive)


def _evaluate(job: Job, stepper: Stepper, manifest: Manifest, split: Split) -> Result:
    """The masked metrics of a split."""
    forecast = manifest.distribution
    return evaluate(
        stepper,
        job.source,
        split,
        streaming=manifest.streaming,
        summary=manifest.readout == "last",
        distribution=None if forecast is None else DistributionMetrics(manifest.outputs, forecast),
    )


def _measure(job: Job, stepper: Stepper, manifest: Manifest, plot: Path | None = None) -> dict[str, Any]:
    """Test metrics; for a table of series also what they are worth."""
    result = _evaluate(job, stepper, manifest, "test")
    print_report(result, job.console)
    metrics: dict[str, Any] = {"test": result.summary()}
    if isinstance(job.source, TableSource) and job.source.targets and manifest.streaming:
        measurement = Measurement(stepper, job.source)
        skills = measurement.skills(DISTANCES)
        job.console.print(skill_table(job.source, skills))
        metrics["skill"] = {f"{s.ahead} ahead": as_dict(s, job.source.targets) for s in skills}
        if plot is not None:
            measurement.plot_week(plot)
    return metrics


def compare(job: Job) -> int:
    """Backtest an exported model on the recipe's test rows, or the recipe from several origins."""
    arguments, source = job.arguments, job.source
    if not isinstance(source, TableSource) or not source.targets:
        raise ConfigError(f"data.kind: {job.config.data.kind}, a backtest needs a table with targets")

    def told(line: str) -> None:
        job.console.print(line, highlight=False)

    peers = chosen(arguments.peers)
    result = backtest(
        job.config,
        source,
        _published(job) if arguments.origins is None else trained(job.config, told),
        origins=arguments.origins,
        refit=not arguments.no_refit,
        window=arguments.window,
        fitted=[kind for kind in FITTED if kind not in arguments.without],
        peers=peers,
        distances=DISTANCES,
        told=told,
    )
    for table in tables(result):
        job.console.print(table)
    scores = result.as_dict()
    if arguments.keep_peers and arguments.json:
        scores, gone = with_kept(scores, arguments.json)
        for title in gone:
            told(f"{title}: was measured beside other forecasts, and is left out. Train it again: --peers")
    if arguments.json:
        write_json(arguments.json, scores)
    if arguments.page:
        write_page(arguments.page, scores)
    return 0


def _published(job: Job) -> Forecaster:
    """The exported model, whatever the source's splits."""
    directory = job.arguments.out / job.config.name / str(_exported_version(job))
    manifest = read_manifest(directory)
    _check_fits(job.source, manifest)
    if not manifest.streaming:
        raise ConfigError(f"{directory}: is no model that can be stepped, a backtest needs one")
    predictive = predictive_of(manifest.outputs, manifest.distribution)
    return lambda source: (Stepper.of(directory, manifest), predictive)


def _exported_version(job: Job) -> int:
    return job.arguments.version or next_version(job.arguments.out, job.config.name) - 1


COMMANDS = {"train": train, "evaluate": evaluate_model, "export": export, "backtest": compare}

if __name__ == "__main__":
    sys.exit(main())
