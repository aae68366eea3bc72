"""Folding: scales go into the weights, the float function stays the same, and a probe proves it."""

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teq.models.arch import Arch, Site, block_sites, blocks, linears, sites
from teq.models.blocks import block_inputs, no_casts_to_fp32, run_block
from teq.models.lazy import present
from teq.spec import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)
CLIP = "clip/"  # before a linear's name: the bounds of its folded weight, among the scales of the sites


def site_scales(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return the scale vectors of a fitted transform by site, without what was kept with them."""
    return {name: tensor for name, tensor in tensors.items() if "/" not in name}


def folded_tensors(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return what a quantizer takes of a fitted transform: scale vectors by site, and weight bounds."""
    return site_scales(tensors) | {name: t for name, t in tensors.items() if name.startswith(CLIP)}


@dataclass(frozen=True)
class Folding:
    """What a set of scales does to each parameter: fp32 tensors by full linear or norm name."""

    columns: dict[str, "Tensor"]  # reader of a site -> s [in]: weight columns are multiplied
    rows: dict[str, "Tensor"]  # source -> s [out]: weight rows (or a norm's weight) and bias are divided
    bounds: dict[str, "Tensor"] = field(default_factory=dict)  # linear -> what `weight` clamps to

    @classmethod
    def of(cls, sites: list[Site], scales: Mapping[str, "Tensor"]) -> "Folding":
        """Return the folding of `scales`; sites without one stay, `clip/<linear>` bounds a weight."""
        scaled = [site for site in sites if site.name in scales]
        return cls(
            columns={
                reader: site.over_inputs(scales[site.name])
                for site in scaled
                for reader in (*site.targets, *site.kept)
            },
            rows={site.name: site.over_outputs(scales[site.name]) for site in scaled},
            bounds={name.removeprefix(CLIP): b for name, b in scales.items() if name.startswith(CLIP)},
        )

    def weight(self, name: str, linear: "nn.Module") -> "Tensor":
        """Return a folded copy of a linear's weight `[out, in]`, in fp32, or fp64 where the model is.

        Where it has bounds, each of so many equal parts of a row is clamped to its own: to a magnitude `[out,
        parts]`, or between a lower and an upper bound `[2, out, parts]`.
        """
        import torch

        exact = torch.promote_types(linear.weight.dtype, torch.float32)
        weight = linear.weight.detach().to(exact, copy=True)
        if name in self.columns:
            weight.mul_(self.columns[name].to(weight))
        if name in self.rows:
            weight.div_(self.rows[name].to(weight)[:, None])
        if name in self.bounds:
            bound = self.bounds[name].to(weight)[..., None]  # [out, parts, 1], or two of them
            lower, upper = bound if bound.ndim == 4 else (-bound, bound)
            weight.unflatten(1, (upper.shape[1], -1)).clamp_(lower, upper)
        return weight

    def divided(self, name: str, module: "nn.Module") -> dict[str, "Tensor"]:
        """Return a source's one-dimensional parameters (norm weight, biases) over s, in their own dtype.

        The weight w of a norm that multiplies by 1 + w becomes (1 + w) / s - 1.
        """
        import torch

        out = {}
        for key, value in module.named_parameters(recurse=False):
            if value.ndim == 1 and name in self.rows:
                exact = value.detach().to(torch.promote_types(value.dtype, torch.float32))
                added = norm_offset(module) if key == "weight" else 0
                out[f"{name}.{key}"] = ((exact + added) / self.rows[name].to(exact) - added).to(value.dtype)
        return out


def norm_offset(norm: "nn.Module") -> int:
    """Return c of a norm whose output is (c + weight) * x_hat + bias: 0, or 1 as in Gemma.

    The norm is asked, in the host's memory, so that a device is not waited for: with weights of 0 its output
    is 0, or half of that with weights of 1. Raises UserError where it is neither.
    """
    import torch
    from torch.func import functional_call

    given = {name: torch.zeros(p.shape, device="cpu") for name, p in norm.named_parameters()}
    x = torch.linspace(-1, 2, given["weight"].numel(), device="cpu")[None]
    without, with_one = (
        functional_call(norm, {**given, "weight": torch.full_like(given["weight"], w)}, (x,)) for w in (0, 1)
    )
    if not without.any():
        return 0
    if torch.allclose(2 * without, with_one):
        _say_offset(type(norm).__name__)
        return 1
    raise UserError(
        f"{type(norm).__name__} multiplies neither by its weight nor by 1 + weight: no scale folds into it; "
        "leave its site out of the arch"
    )


@functools.cache
def _say_offset(kind: str) -> None:
    log.info("%s multiplies by 1 + weight: scales fold into it as (1 + weight) / s - 1", kind)


@dataclass(frozen=True)
class FoldedBlock:
    """A decoder block of a `FoldedModel`; its module is as it was loaded.

    `changed` are the parameters that folding changes and nothing quantizes, by full name: of norms, biases,
    and the weights of what a site keeps.
    """

    name: str
    module: "nn.Module"
    linears: "dict[str, nn.Linear]"
    changed: "dict[str, Tensor]"
    folding: Folding

    def weight(self, name: str) -> "Tensor":
        """Return the folded weight `[out, in]` of a linear in fp32, a copy."""
        return self.exact_weight(name).float()

    def exact_weight(self, name: str) -> "Tensor":
        """Return it in fp32, or in fp64 where the model is."""
        return self.folding.weight(name, self.linears[name])


class FoldedModel:
    """A model with scales folded into it, block by block; the model itself is not changed."""

    def __init__(self, model: "nn.Module", arch: Arch, scales: "Mapping[str, Tensor]") -> None:
        self.model, self.arch, self.sites = model, arch, sites(model, arch)
        self.folding = Folding.of(self.sites, scales)

    def __len__(self) -> int:
        """Return how many blocks there are."""
        return len(blocks(self.model, self.arch))

    def __iter__(self) -> "Iterator[FoldedBlock]":
        """Yield the blocks, first to last; each is in memory until the next one is asked for."""
        for index, (name, module) in enumerate(blocks(self.model, self.arch).items()):
            with present(module):
                yield FoldedBlock(name, module, linears(name, module), self._changed(index), self.folding)

    def _changed(self, block: int) -> "dict[str, Tensor]":
        found = {}
        for site in (site for site in self.sites if site.block == block):
            found |= self.folding.divided(site.name, site.source)
            for name, module in site.kept.items():
                if name in self.folding.columns:
                    found[f"{name}.weight"] = self.folding.weight(name, module).to(module.weight.dtype)
        return found


def fold(sites: list[Site], scales: Mapping[str, "Tensor"]) -> None:
    """Multiply targets and divide sources in place; the model's float function is unchanged."""
    import torch

    folding = Folding.of(sites, scales)
    readers = {name: module for site in sites for name, module in (site.targets | site.kept).items()}
    touched = {site.name: site.source for site in sites} | readers
    new = {}
    for name, module in touched.items():
        divided = folding.divided(name, module)
        new |= {(module, key.rpartition(".")[2]): value for key, value in divided.items()}
        if name in readers or isinstance(module, torch.nn.Linear):
            new[module, "weight"] = folding.weight(name, module)
    with torch.no_grad():
        for (module, key), value in new.items():
            getattr(module, key).copy_(value)


def check_equivalence(model: "nn.Module", arch: Arch, tolerance: float = 1e-6) -> None:
    """Fold random scales from 0.01 to 100 into each site of a block and compare the block's output.

    One block of each kind is probed: sliding and full attention, blocks of other modules or shapes. Works on
    a copy of the block in fp64 in the host's memory: the model is never touched, and a device that it hardly
    fits need not hold the copy. Raises UserError with the name of the site whose folding changes the
    function.
    """
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, 16), generator=generator).to(device)
    chosen = one_of_each_kind(model, arch)
    hidden, keywords = block_inputs(model, arch, tokens, count=max(chosen) + 1)
    hidden = hidden.cpu().double()
    for index, (name, block) in enumerate(blocks(model, arch).items()):
        if index in chosen:
            with present(block):
                _check_block(
                    arch,
                    model.config,
                    index,
                    name,
                    block,
                    hidden,
                    _exact(keywords[index]),
                    generator,
                    tolerance,
                )


def one_of_each_kind(model: "nn.Module", arch: Arch) -> list[int]:
    """Return the indices of the first blocks of each kind: type of attention, modules, shapes."""
    types = getattr(model.config, "layer_types", None) or []
    first: dict[Any, int] = {}
    for index, block in enumerate(blocks(model, arch).values()):
        modules = tuple((name, type(m)) for name, m in block.named_modules())
        shapes = tuple(p.shape for p in block.parameters())
        first.setdefault((*types[index : index + 1], modules, shapes), index)
    return list(first.values())


def _check_block(
    arch: Arch,
    config: "PretrainedConfig",
    index: int,
    name: str,
    original: "nn.Module",
    hidden: "Tensor",
    kwargs: dict[str, Any],
    generator: "torch.Generator",
    tolerance: float,
) -> None:
    import torch

    here = {
        id(t): t.detach().to("cpu", torch.float64 if t.is_floating_point() else t.dtype, copy=True)
        for t in (*original.parameters(), *original.buffers())
    }
    for parameter in original.parameters():
        here[id(parameter)] = torch.nn.Parameter(here[id(parameter)], requires_grad=False)
    block = copy.deepcopy(original, here)  # which takes what `here` holds for what it finds
    with torch.no_grad(), no_casts_to_fp32():
        expected = run_block(block, hidden, kwargs)
        for site in block_sites(arch, config, index, name, block):
            s = torch.empty(site.width, dtype=torch.float64).uniform_(-2, 2, generator=generator)
            changed = (site.source, *site.targets.values(), *site.kept.values())
            folded = [p for m in changed for p in m.parameters(recurse=False)]
            kept = [parameter.clone() for parameter in folded]
            fold([site], {site.name: 10**s})
            change = (run_block(block, hidden, kwargs) - expected).norm() / expected.norm()
            if not change <= tolerance:
                raise UserError(
                    f"site {site.name} -> {', '.join(site.targets)} of arch={arch.name} is refused: folding "
                    f"random positive scales into block {index} changes its output by {change:.1e} "
                    f"(relative), at most {tolerance:.0e} is allowed; correct the site in "
                    f"conf/model/arch/{arch.name}.yaml"
                )
            for parameter, value in zip(folded, kept, strict=True):
                parameter.copy_(value)


def _exact(value: Any) -> Any:
    """Return keyword arguments with their tensors in host memory, floating-point ones as fp64."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    if isinstance(value, tuple | list):
        return type(value)(_exact(v) for v in value)
    return {k: _exact(v) for k, v in value.items()} if isinstance(value, dict) else value
