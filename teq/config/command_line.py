"""From a command line to checked runs. The only module of the package that imports Hydra."""

import datetime
import difflib
import functools
import json
import os
import re
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from teq.config.composition import Composer, flat, is_hydras, key_of, resolved, unread, without
from teq.evaluate.counts import Counts
from teq.files import disk
from teq.models.checkpoint import Checkpoint, Outline
from teq.pipeline.settings import Run
from teq.quantizers.keep import Keep
from teq.spec import Settings, UserError, option
from teq.transforms.identity import Identity

ROOT = Path(__file__).resolve().parent.parent.parent
CONF = ROOT / "conf"
INTERNAL = ("method", "quant_grid", "calibration")  # what groups' files refer to: no user sets values there
INTEGER_GROUPS = ("bits", "group_size")
BASIC = "basic"  # Hydra's launcher that runs jobs in this process
LAUNCHERS = {  # that Hydra's documentation names, with what installs them
    "joblib": "hydra-joblib-launcher",
    "ray": "hydra-ray-launcher",
    "ray_aws": "hydra-ray-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
LAYOUT = "layout"  # the node of an experiment file that says how its records are shown; no run reads it


def home() -> Path:
    """The folder for records and cached artefacts: TEQ_HOME, or `cache` beside run.py."""
    return Path(os.environ.get("TEQ_HOME") or ROOT / "cache").expanduser().absolute()


def prepare_environment() -> None:
    """Set what conf/config.yaml refers to: where the project is, where its output goes, and a name that no
    other start has, which workers inherit.
    """
    os.environ["TEQ_ROOT"] = str(ROOT)
    os.environ["TEQ_HOME"] = str(home())
    os.environ["TEQ_START"] = start_of_run()
    os.environ["TEQ_OUTPUT"] = str(output())


def start_of_run() -> str:
    """The name of this start of run.py, the same in every process that it starts and in no other start."""
    if "TEQ_START" not in os.environ:
        begin_run()
    return os.environ["TEQ_START"]


def begin_run() -> None:
    """Give this start of run.py a name of its own."""
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    os.environ["TEQ_START"] = f"{now}_{socket.gethostname()}-{os.getpid()}-{os.urandom(2).hex()}"


def output() -> Path:
    """Return the folder for logs and outcomes of this start of run.py; temporary if `home()` is read-only."""
    if disk.writable(home()):
        return home() / "hydra" / start_of_run()
    return Path(tempfile.gettempdir()) / f"teq-{start_of_run()}"


def quoted(argv: Sequence[str]) -> list[str]:
    """The command line as Hydra wants it: `-m` first, and the values of `bits` and `group_size` quoted.

    Hydra's parser takes no flag between overrides. The two are config groups whose options are called `4`,
    `-1`, ...; Hydra reads a bare 4 as a number and refuses it as the name of an option.
    """
    out = []
    argv = sorted(argv, key=lambda word: word not in ("-m", "--multirun"))
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and name in INTEGER_GROUPS and not set(value) & set("'\"[](){}"):
            word = f"{name}={','.join(repr(part) for part in value.split(','))}"
        out.append(word)
    return out


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The part of a configuration that no result depends on."""

    device: str = "auto"
    memory: str = "auto"
    batch_size: int = option(8, at_least=1, key="tasks.batch_size")


@dataclass(frozen=True)
class Job:
    """One run of a command line: the overrides that give it, the run itself, and how it is to be done."""

    overrides: list[str]
    run: Run
    options: Options
    logger: Any
    experiment: str | None
    layout: Mapping[str, Any] | None
    dimensions: Mapping[str, Any] | None  # of the architecture, as conf/model carries them
    launcher: str = BASIC  # Hydra's: any other may run the job on another host


def jobs(argv: Sequence[str]) -> list[Job]:
    """Every run of a command line. Raises UserError with one line for each that cannot be."""
    arguments, strange = get_args_parser().parse_known_args(quoted(argv))
    if strange:
        raise UserError(f"{strange[0]} is not understood: `python run.py --help` shows what is")
    found: list[Job] = []
    problems: list[str] = []
    prepare_environment()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        every, launcher = _expand(arguments.overrides, arguments.multirun)
        for overrides in every:
            try:
                ours = [line for line in overrides if not is_hydras(line)]
                _add_group_sizes(ours)
                composed, choices = _composer()(ours)
                _check_choices(composed, choices, ours)
                _check_keys(composed, choices, ours)
                found.append(replace(job(composed, choices, overrides), launcher=launcher))
            except UserError as error:
                problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return found


def job(cfg: DictConfig | dict[str, Any], choices: Mapping[str, Any], overrides: Sequence[str] = ()) -> Job:
    """The job of one composed configuration. `choices` are Hydra's: which option of each group was taken.

    From here on a configuration is plain data, which is filled in place.
    """
    cfg = without(cfg, ("hydra", LAYOUT)) if isinstance(cfg, DictConfig) else cfg
    name = str(choices["model"])
    _fill_from_recipe(cfg, name)
    run = Run(
        model=Checkpoint(
            name=name, source=_make(_source(cfg["model"]), cfg), arch=_make(cfg["model"]["arch"], cfg)
        ),
        dtype=cfg["dtype"],
        method=str(choices["method"]),
        transform=_make(cfg["method"]["transform"], cfg),
        quantizer=_make(cfg["method"]["quantizer"], cfg),
        evals=tuple(_make(_file(CONF / "eval" / f"{e}.yaml"), cfg) for e in _names(cfg["evals"])),
    )
    _check_weights(run)
    options = Options(device=cfg["device"], memory=str(cfg["memory"]), batch_size=cfg["tasks"]["batch_size"])
    experiment = choices.get("experiments")
    layout = None if experiment is None else _experiment(str(experiment)).get(LAYOUT)
    logger, dimensions = _make(cfg["logger"], cfg), cfg["model"].get("config")
    return Job(list(overrides), run, options, logger, experiment, layout, dimensions)


def _source(model: Mapping[str, Any]) -> Any:
    """Where the weights come from: `model.weights` and `model.path` come before the model's own source."""
    made_up = {"synthetic": "teq.models.Synthetic", "none": "teq.models.Outline"}
    if model["weights"] in made_up:
        return {"_target_": made_up[model["weights"]], "config": model["config"]}
    if model["weights"] is not None:
        raise UserError(
            f"model.weights={model['weights']} is not allowed: it must be null (the model's own), synthetic "
            "(random ones of true size) or none (its architecture alone)"
        )
    return {"_target_": "teq.models.Folder", "path": model["path"]} if model["path"] else model["source"]


def _check_weights(run: Run) -> None:
    """Without weights there is nothing to quantize and nothing to measure, only to count."""
    if not isinstance(run.model.source, Outline):
        return
    if not isinstance(run.transform, Identity) or not isinstance(run.quantizer, Keep):
        raise UserError(f"method={run.method} needs weights: beside model.weights=none choose method=fp")
    for evaluation in run.evals:
        if not isinstance(evaluation, Counts):
            raise UserError(
                f"evals={evaluation.name} needs weights: beside model.weights=none choose evals=[counts]"
            )


def groups() -> dict[str, list[str]]:
    """The options of each group that a user chooses from, and the experiments."""
    folders = [
        CONF / name for name in ("model", "method", "bits", "group_size", "grid", "init", "recipe", "logger")
    ]
    found = {folder.name: options(folder) for folder in folders}
    return found | {"evals": options(CONF / "eval"), "experiments": options(ROOT / "experiments")}


def options(folder: Path) -> list[str]:
    """The option names in a folder of YAML files; numbers by size."""
    names = [file.stem for file in folder.glob("*.yaml")]
    return sorted(names, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))


def _add_group_sizes(overrides: Sequence[str]) -> None:
    """Add to the group `group_size` the numbers that have no file: Hydra takes options from memory too, and
    its launchers hand these on to their workers.
    """
    for override in overrides:
        number = re.fullmatch(r"group_size=['\"]?([1-9]\d*)['\"]?", override)
        if number and not (CONF / "group_size" / f"{number[1]}.yaml").is_file():
            ConfigStore.instance().store(
                number[1], {"group_size": int(number[1])}, "group_size", package="_global_"
            )


def _expand(overrides: list[str], multirun: bool) -> tuple[list[list[str]], str]:
    """The override lists of the single jobs, as Hydra's own sweeper makes them, and the launcher's name."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        for one in parsed:
            if one.is_sweep_override() and one.key_or_group == "experiments":
                raise UserError(f"{one.input_line} names several experiments: run one after the other")
            if one.is_delete() and not is_hydras(one.input_line or ""):
                raise UserError(
                    f"{one.input_line} takes away what every run reads: leave it out, or give it a value "
                    "(null leaves it to the recipe)"
                )
        fixed = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
        experiment = _compose([o for o in fixed if o.startswith("experiments=") or is_hydras(o)])
        params = experiment.hydra.sweeper.params or {}
        if not multirun and "MULTIRUN" not in str(experiment.hydra.mode):
            swept = [o.input_line for o in parsed if o.is_sweep_override()]
            if swept:
                raise UserError(f"{swept[0]} names several values: add -m (--multirun) to run each of them")
            return [overrides], BASIC
        lines = [f"{key}={value}" for key, value in params.items()] + overrides
        every = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(lines), None)[0]
        return every, experiment.hydra.runtime.choices["hydra/launcher"]
    except (HydraException, yaml.YAMLError) as error:
        raise UserError(_one_line(error, overrides)) from error


@functools.cache
def _composer() -> Composer:
    return Composer(_compose, CONF, ROOT / "experiments", LAYOUT)


def _compose(overrides: list[str]) -> DictConfig:
    try:
        return compose("config", overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(_one_line(error, overrides)) from error


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """What Hydra says in a paragraph, as one line that names the way out."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group == "group_size":
            return f"group_size={name} is not allowed: it must be -1 (whole rows) or a whole number above 0"
        if group == "hydra/launcher" and name in LAUNCHERS:
            return f"{group}={name} is not installed: pip install {LAUNCHERS[name]}"
        if group.startswith("hydra/"):
            return f"{group}={name} is not allowed: it must be one of {', '.join(error.options)}"
        known = options(ROOT / group if group == "experiments" else CONF / group)
        return f"{group}={name} is not allowed: it must be one of {', '.join(known)}"
    text = " ".join(str(error).split())
    if isinstance(error, ConfigCompositionException) and "Could not override" in text:
        key = text.split("'")[1]
        close = difflib.get_close_matches(key, list(flat(_composer()([])[0])) + list(groups()), 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"there is no option {key!r}: {hint}`python run.py --help` lists them all"
    return f"{' '.join(overrides)}: {text}"


def _check_choices(cfg: Mapping[str, Any], choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse a choice that another one hides, and a value in the place of a whole section."""
    for section, values in _file(CONF / "config.yaml").items():
        if section in cfg and isinstance(values, dict) and not isinstance(cfg[section], dict):
            first = next(iter(values))
            raise UserError(
                f"{section}={cfg[section]} is not allowed: set its values, such as {section}.{first}"
            )
    for override in overrides:
        if choices.get("grid") is not None and override.partition("=")[0] in ("bits", "group_size"):
            raise UserError(
                f"{override} has no effect beside grid={choices['grid']}, which sets bits and group_size: "
                f"choose grid={', '.join(options(CONF / 'grid'))}"
            )


def _check_keys(cfg: Mapping[str, Any], choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse keys that only an addition (`+key=value`) or an experiment file knows: Hydra merges those in
    without a word, and nothing reads them.
    """
    name, added = choices.get("experiments"), [line for line in overrides if line.startswith("+")]
    if not added and (name is None or (name, choices["model"]) in _checked):
        return
    plain = [line for line in overrides if line not in added and not line.startswith("experiments=")]
    base, problems = _composer()(plain)[0], []
    known = [*groups(), *flat({key: node for key, node in base.items() if key not in INTERNAL})]
    for key in unread(cfg, base):
        what = f"experiments/{name}.yaml sets {key!r}, which is no option"
        if source := next((line for line in added if f"{key}.".startswith(f"{key_of(line)}.")), ""):
            key, what = key_of(source), f"{source} is read by no run"
        close = difflib.get_close_matches(key, known, 1, cutoff=0)
        problems.append(f"{what}: did you mean {close[0]}? `python run.py --help` lists them all")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    if not added:
        _checked.add((name, choices["model"]))


_checked: set[tuple[str, str]] = set()  # experiments with the model for which their keys were found good


@functools.cache
def _experiment(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(ROOT / "experiments" / f"{name}.yaml"))


def _fill_from_recipe(cfg: dict[str, Any], model: str) -> None:
    """Put the recipe's values where the user left null; the recipe's exceptions for this cell come first."""
    recipe = cfg["recipe"]  # the content of conf/recipe/<name>.yaml, or a name
    if not isinstance(recipe, dict):
        name, known = cfg["model"]["recipe"] if recipe == "auto" else recipe, options(CONF / "recipe")
        if name not in known:
            raise UserError(f"recipe={name} is not allowed: it must be one of {', '.join(known)}")
        recipe = _file(CONF / "recipe" / f"{name}.yaml")
    cell = {"model": model, "bits": cfg["bits"], "group_size": cfg["group_size"]}
    for exception in recipe.get("exceptions", []):
        if exception["when"] == cell:
            _fill(cfg, {key: value for key, value in exception.items() if key != "when"})
    _fill(cfg, {key: value for key, value in recipe.items() if key != "exceptions"})


def _fill(node: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _fill(node[key], value)
        elif node[key] is None:
            node[key] = value


def _names(evals: Any) -> list[str]:
    names = [evals] if isinstance(evals, str) else list(evals or [])
    known = options(CONF / "eval")
    for name in names:
        if name not in known:
            raise UserError(f"evals={name} is not allowed: it must be some of {', '.join(known)}")
    if not names:
        raise UserError(f"evals is empty: name at least one of {', '.join(known)}")
    return list(dict.fromkeys(names))


@functools.cache
def _file(path: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(path))


def _make(node: Any, cfg: dict[str, Any]) -> Any:
    """The settings object of a node with `_target_`; equal nodes give one object, which is frozen."""
    try:
        return _made(json.dumps(resolved(node, cfg)))
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        raise cause or UserError(" ".join(str(error).split())) from None
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from error


@functools.cache
def _made(text: str) -> Any:
    return instantiate(json.loads(text), _convert_="all")
