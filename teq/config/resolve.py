"""From one composed configuration to its job: settings resolved, recipe filled in, classes instantiated."""

import contextlib
import functools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from teq.config.options import LAYOUT, experiment, folder, option_names, read
from teq.data import PERPLEXITY
from teq.device.runtime import Runtime
from teq.evaluate.counts import Counts
from teq.evaluate.tasks import FOLDERS
from teq.finetune.settings import PARTS
from teq.models.arch import families, sites
from teq.models.checkpoint import Checkpoint, Outline
from teq.models.synthetic import skeleton
from teq.pipeline.settings import Run
from teq.quantizers.keep import Keep
from teq.spec import UserError, did_you_mean
from teq.transforms.identity import Identity

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LM_EVAL = re.compile(r"lm_eval/([^:]+)(?::(\d+))?")
DEFAULT = "default"  # in a map of limits: those that it does not name
AUTO = "auto"  # the model whose file names no checkpoint
BASIC = "basic"  # Hydra's launcher that runs jobs in this process


@dataclass(frozen=True)
class Job:
    """One run of a command line: the overrides that give it, the run itself, and how it is to be done."""

    overrides: list[str]
    run: Run
    options: Runtime
    logger: Any
    experiment: str | None
    layout: Mapping[str, Any] | None
    dimensions: Mapping[str, Any] | None  # of the architecture, as conf/model carries them
    launcher: str = BASIC  # Hydra's: any other may run the job on another host


def job(cfg: DictConfig | dict[str, Any], choices: Mapping[str, Any], overrides: Sequence[str] = ()) -> Job:
    """Return the job of one composed configuration. `choices` are the options taken of Hydra's groups.

    From here on a configuration is plain data, which is filled in place.
    """
    cfg = without(cfg, ("hydra", LAYOUT)) if isinstance(cfg, DictConfig) else cfg
    name, model = str(choices["model"]), cfg["model"]
    if name == AUTO:
        name = _auto_name(model)
    cfg["eval_dtype"] = cfg["eval_dtype"] or cfg["dtype"]  # by hand, not the recipe's
    _fill_from_recipe(cfg, name)
    source = _make(_source(model), cfg)
    grid = cfg["quant_grid"]
    grid["search"] = grid["search"] or cfg["method"].get("search", "none")
    if cfg["awq"]["clip"] is None:
        cfg["awq"]["clip"] = cfg["method"].get("clip", True)
    transform = _make(cfg["method"]["transform"], cfg)
    evaluations = tuple(_make(node, cfg) for node in _evaluations(cfg))
    counted = any(isinstance(evaluation, Counts) for evaluation in evaluations)
    family = model.get("arch") or _family(source, name)
    arch = _arch(family, cfg["sites"], read=counted or not isinstance(transform, Identity))
    run = Run(
        model=Checkpoint(name=name, source=source, arch=_make(arch, cfg)),
        dtype=cfg["dtype"],
        eval_dtype=cfg["eval_dtype"],
        method=str(choices["method"]),
        transform=transform,
        quantizer=_make(cfg["method"]["quantizer"], cfg),
        finetune=_finetune(cfg),
        evals=evaluations,
    )
    _check_weights(run)
    options = Runtime(device=cfg["device"], memory=str(cfg["memory"]), batch_size=cfg["tasks"]["batch_size"])
    named = choices.get("experiments")
    layout = None if named is None else experiment(str(named)).get(LAYOUT)
    logger = None if cfg["logger"] is None else _make(cfg["logger"], cfg)
    dimensions = model.get("config")
    return Job(list(overrides), run, options, logger, named, layout, dimensions)


def _finetune(cfg: dict[str, Any]) -> Any:
    """Return the last stage, None without one: `finetune` comes before what the method's file says."""
    parts = cfg["finetune"] = str(cfg["finetune"] or cfg["method"].get("finetune", "none"))
    if parts not in ("none", *PARTS):
        raise UserError(f"finetune={parts} is not allowed: {did_you_mean(parts, ('none', *PARTS))}")
    return None if parts == "none" else _make(cfg["finetuning"], cfg)


def _source(model: Mapping[str, Any]) -> Any:
    """Return the source of the weights: `model.weights` and `model.path` come before the model's own."""
    made_up = {"synthetic": "teq.models.Synthetic", "none": "teq.models.Outline"}
    if model["weights"] in made_up:
        if model["config"] is None:
            raise UserError(
                f"model.weights={model['weights']} needs dimensions, which model=auto has not: choose a "
                "model of conf/model"
            )
        return {"_target_": made_up[model["weights"]], "config": model["config"]}
    if model["weights"] is not None:
        raise UserError(
            f"model.weights={model['weights']} is not allowed: it must be null (the model's own), synthetic "
            "(random ones of true size) or none (its architecture alone)"
        )
    if not model["path"] or (model["config"] is None and _is_hub_id(model["path"])):
        return model["source"]
    return {"_target_": "teq.models.Folder", "path": model["path"]}


def _is_hub_id(path: str) -> bool:
    """Return whether a path is no folder here and could be the name of a repository of the hub."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).is_dir()


def _auto_name(model: Mapping[str, Any]) -> str:
    """Return the name of the checkpoint that model=auto is pointed to: the last part of its path."""
    if not model["path"]:
        raise UserError("model=auto needs a checkpoint: give model.path=<folder or hub id>")
    return Path(model["path"]).expanduser().absolute().name


def _family(source: Any, name: str) -> dict[str, Any]:
    """Return the file of conf/model/arch that describes a checkpoint, by its configuration's model_type.

    Of several it is the first whose sites the model has.
    """
    dimensions, files = source.dimensions(), folder("conf") / "model" / "arch"
    every = [read(files / f"{family}.yaml") for family in families()]
    found = [arch for arch in every if arch.get("model_type", arch["name"]) == dimensions.model_type]
    if not found:
        known = sorted({arch.get("model_type", arch["name"]) for arch in every})
        raise UserError(
            f"{name} has model_type={dimensions.model_type}, which is no known family: it must be one of "
            f"{', '.join(known)}; describe it in conf/model/arch/{dimensions.model_type}.yaml"
        )
    for arch in found[:-1]:
        with contextlib.suppress(UserError):
            sites(skeleton(dimensions), instantiate(arch))
            return arch
    return found[-1]


def _arch(arch: dict[str, Any], chosen: str, read: bool) -> dict[str, Any]:
    """Return the node of the architecture, without sites beyond the paper's where none is to be `read`."""
    if chosen not in ("paper", "all"):
        raise UserError(f"sites={chosen} is not allowed: it must be paper or all")
    if chosen == "all" and not arch.get("more_sites"):
        raise UserError(f"sites=all: arch={arch['name']} has the paper's sites alone: choose sites=paper")
    paper = chosen == "paper" or not read
    return {key: value for key, value in arch.items() if not (paper and key == "more_sites")}


def _check_weights(run: Run) -> None:
    """Reject everything that needs weights where there are none: only counting does without."""
    if not isinstance(run.model.source, Outline):
        return
    if not isinstance(run.transform, Identity) or not isinstance(run.quantizer, Keep):
        raise UserError(f"method={run.method} needs weights: beside model.weights=none choose method=fp")
    for evaluation in run.evals:
        if not isinstance(evaluation, Counts):
            raise UserError(
                f"evals={evaluation.name} needs weights: beside model.weights=none choose evals=[counts]"
            )


def without(cfg: DictConfig, keys: Sequence[str]) -> dict[str, Any]:
    """Return a configuration as plain data, interpolations unresolved, without some of its top keys."""
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key not in keys]))


def _fill_from_recipe(cfg: dict[str, Any], model: str) -> None:
    """Put the recipe's values where the user left null; the recipe's exceptions for this cell come first."""
    recipe = cfg["recipe"]  # the content of conf/recipe/<name>.yaml, or a name
    if not isinstance(recipe, dict):
        name = cfg["model"]["recipe"] if recipe == "auto" else recipe
        known = option_names(folder("conf") / "recipe")
        if name not in known:
            raise UserError(f"recipe={name} is not allowed: it must be one of {', '.join(known)}")
        recipe = read(folder("conf") / "recipe" / f"{name}.yaml")
    cell = {"model": model, "bits": cfg["bits"], "group_size": cfg["group_size"]}
    for exception in recipe.get("exceptions", []):
        if exception["when"].items() <= cell.items():
            _fill(cfg, {key: value for key, value in exception.items() if key != "when"})
    _fill(cfg, {key: value for key, value in recipe.items() if key != "exceptions"})


def _fill(cfg: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        section, leaves = (cfg[key], value) if isinstance(cfg[key], dict) else (cfg, {key: value})
        for name, leaf in leaves.items():  # a map of limits is a leaf: the user's is not filled up
            if section[name] is None:
                section[name] = leaf


def _evaluations(cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the node of each evaluation; `lm_eval/<task>:<shots>` becomes one of lm-eval's tasks.

    A limit that is a map by task, or by text for perplexity, is resolved here: each takes its own, so that
    its key is that of the plain number; one that is not named takes the entry `default`, else everything.
    """
    evals = cfg["evals"]
    names = [evals] if isinstance(evals, str) else list(evals or [])
    files = option_names(folder("conf") / "eval")
    known, nodes = ", ".join([*files, "lm_eval/<task>[:<shots>]"]), []
    if not names:
        raise UserError(f"evals is empty: name at least one of {known}")
    for name in dict.fromkeys(names):
        if of_lm_eval := LM_EVAL.fullmatch(str(name)):
            given = {"task": of_lm_eval[1], "num_fewshot": of_lm_eval[2] and int(of_lm_eval[2])}
            nodes.append(read(folder("conf") / "eval" / "lm_eval" / "task.yaml") | given)
        elif name in files:
            nodes.append(read(folder("conf") / "eval" / f"{name}.yaml"))
        else:
            raise UserError(f"evals={name} is not allowed: it must be some of {known}")
    for section, field, named in (("tasks", "task", FOLDERS), ("ppl", "corpus", PERPLEXITY)):
        limit = cfg[section]["limit"]
        if not isinstance(limit, dict):
            continue
        allowed = [DEFAULT, *dict.fromkeys([*named, *(node[field] for node in nodes if field in node)])]
        if unknown := next((name for name in limit if name not in allowed), None):
            raise UserError(f"{section}.limit={unknown} is not allowed: {did_you_mean(unknown, allowed)}")
        nodes = [
            node | {"limit": limit.get(node[field], limit.get(DEFAULT))} if field in node else node
            for node in nodes
        ]
    return nodes


def _make(node: Any, cfg: dict[str, Any]) -> Any:
    """Return the settings object of a node with `_target_`; equal nodes give one object, which is frozen."""
    try:
        return _made(json.dumps(_resolved(node, cfg)))
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


def _resolved(part: Any, root: dict[str, Any]) -> Any:
    """Return `part` of the plain configuration `root` with its interpolations replaced.

    A text that is one reference, such as `${train.steps}`, takes the value there; OmegaConf does the rest.
    """
    if isinstance(part, dict):
        return {key: _resolved(value, root) for key, value in part.items()}
    if isinstance(part, list):
        return [_resolved(value, root) for value in part]
    if not isinstance(part, str) or "${" not in part:
        return part
    if reference := REFERENCE.fullmatch(part):
        with contextlib.suppress(KeyError, TypeError):  # of which OmegaConf says what is wrong
            return _resolved(functools.reduce(operator.getitem, reference[1].split("."), root), root)
    return OmegaConf.to_container(OmegaConf.create({**root, "_part": part}), resolve=True)["_part"]
