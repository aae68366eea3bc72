"""The formats by name, and what they have in common: what none of them holds, and which holds a model."""

from collections.abc import Sequence
from importlib.machinery import PathFinder
from types import ModuleType

from teq.export import awq, compressed_tensors, gguf, gptq
from teq.export.plan import Plan
from teq.models.layers import replaced
from teq.spec import UserError, did_you_mean

FORMATS: dict[str, ModuleType] = {each.NAME: each for each in (compressed_tensors, gptq, awq, gguf)}
DEFAULT = compressed_tensors.NAME
HALF = (gptq.NAME, awq.NAME, gguf.NAME)  # formats whose scales are float16


def find(name: str) -> ModuleType:
    """Return a format. Raises UserError for an unknown one."""
    if name not in FORMATS:
        raise UserError(f"--format {name} is not allowed: {did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def check_loader(name: str, path: Sequence[str], way_out: str) -> None:
    """Raise UserError where the library that loads a format is not found on `path`."""
    form = find(name)
    if PathFinder.find_spec(form.MODULE, path) is None:
        raise UserError(f"{form.INSTALL[0]} is not installed, which loads {name}: {way_out}")


def check(name: str, plan: Plan) -> None:
    """Raise UserError where a format cannot hold a model, naming one that can."""
    if (layer := replaced(plan.outline)) is not None:
        raise UserError(
            f"no format is written for {layer}, which transformers does not build of nn.Linear (a Conv1D, "
            "fused experts): such a model can be run and evaluated, not exported"
        )
    reason = find(name).refusal(plan) or _tail(plan)
    if reason is not None:
        able = [one for one, each in FORMATS.items() if not (each.refusal(plan) or _tail(plan))]
        raise UserError(f"{reason}: {f'choose --format {able[0]}' if able else _instead(plan)}")
    if name in HALF and plan.grid.scale_dtype != "float16":
        raise UserError(
            f"{name} holds float16 scales only, this run has {plan.grid.scale_dtype}: run it with "
            f"quant_grid.scale_dtype=float16, or choose --format {DEFAULT}"
        )


def _tail(plan: Plan) -> str | None:
    """Return why no format holds a model: a shorter last group."""
    size = plan.grid.group_size
    odd = None if size == -1 else next((n for n, (_, width) in plan.shapes.items() if width % size), None)
    return odd and (
        f"no format holds a shorter last group, and group_size={size} does not divide the "
        f"{plan.shapes[odd][1]} inputs of {odd}"
    )


def _instead(plan: Plan) -> str:
    """Return what to run instead of a model that no format holds."""
    widths = {width for _, width in plan.shapes.values()}
    fits = next((size for size in (128, 64, 32, 16) if not any(width % size for width in widths)), -1)
    return "no format holds it; choose bits=2 or more" if plan.grid.bits == 1 else f"choose group_size={fits}"
