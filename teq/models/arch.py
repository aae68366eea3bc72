"""Architectures: where a family's decoder blocks are, and its sites: which layer feeds which linears."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.files import disk
from teq.spec import Settings, UserError, did_you_mean, option

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

WIRING = ("targets", "heads", "parts", "part")  # of a site whose channels are not the source's one to one


@dataclass(frozen=True, kw_only=True)
class Arch(Settings):
    """A model family as data: where its blocks are, its sites, and the configuration values it depends on.

    `sites` maps each source to the linears that read its output; names are relative to the block.
    `more_sites` are those beyond the paper's, None where they are not used. A source may be mapped to
    `targets` with `heads`, the name of a value of the model's configuration, `parts` and `part`: see `Site`.
    The `model_type` of its models' configurations is its name where it is not given.
    """

    name: str = option(hashed=False)
    model_type: str = option("", hashed=False)
    blocks: str
    sites: dict[str, Any]
    more_sites: dict[str, Any] | None = option(None, omitted=None)
    requires: dict[str, Any]
    because: str = option(hashed=False)  # why `requires` is required, for the message


@dataclass(frozen=True)
class Site:
    """A source and the linears that read its output. Names are full module paths; `name` is the source's.

    The source's output channels are `[heads, parts, n]`, of which those of `part` are the site's; the
    targets' input channels are `[heads, repeats, n]`, because query heads may share a key-value head.
    """

    name: str
    block: int
    source: "nn.Module"
    targets: dict[str, "nn.Linear"]
    heads: int = 1
    parts: int = 1
    part: int = 0

    @property
    def width(self) -> int:
        """Return the number of channels: the length of the site's scale vector."""
        return self.source.weight.shape[0] // self.parts

    @property
    def inputs(self) -> int:
        """Return the number of the targets' input channels."""
        return next(iter(self.targets.values())).in_features

    def over_inputs(self, s: "Tensor") -> "Tensor":
        """Return a site's vector `[width]` over the targets' input channels `[in]`."""
        repeats = self.inputs // self.width
        return s if repeats == 1 else s.view(self.heads, 1, -1).expand(-1, repeats, -1).flatten()

    def over_outputs(self, s: "Tensor") -> "Tensor":
        """Return a site's vector `[width]` over the source's output channels `[out]`, 1 at the others."""
        if self.parts == 1:
            return s
        rows = s.new_ones(self.heads, self.parts, self.width // self.heads)
        rows[:, self.part] = s.view(self.heads, -1)
        return rows.flatten()

    def tied(self, x: "Tensor") -> "Tensor":
        """Return a vector over the targets' input channels `[in]` as `[width, repeats]`."""
        return x.view(self.heads, -1, self.width // self.heads).mT.reshape(self.width, -1)

    def largest(self) -> "Tensor":
        """Return the targets' largest weight by magnitude in each channel, `[width]`, fp32."""
        import torch

        found = torch.stack([target.weight.abs().amax(0).float() for target in self.targets.values()])
        return self.tied(found.amax(0)).amax(1)


def blocks(model: "nn.Module", arch: Arch) -> dict[str, "nn.Module"]:
    """Return the decoder blocks by full name, first to last.

    Raises UserError where `arch` does not describe the model.
    """
    for key, wanted in arch.requires.items():
        value = getattr(model.config, key, wanted)
        if value != wanted:
            raise UserError(
                f"{key}={value!r} in the model's configuration is not supported by arch={arch.name}: "
                f"{arch.because}"
            )
    try:
        stack = model.get_submodule(arch.blocks)
    except AttributeError:
        raise UserError(
            f"arch={arch.name} looks for blocks at {arch.blocks!r}, which {type(model).__name__} does not "
            f"have: choose the model's own family with model/arch={'|'.join(families())}"
        ) from None
    found = {f"{arch.blocks}.{i}": block for i, block in enumerate(stack)}
    _check_covered(found, arch)
    return found


def by_block(names: "Iterable[str]", model: "nn.Module", arch: Arch) -> dict[str, list[str]]:
    """Return which of the full names lie in each block, by the block's name; "" has those in no block."""
    found: dict[str, list[str]] = {name: [] for name in (*blocks(model, arch), "")}
    depth = arch.blocks.count(".") + 2  # words of a block's name
    for name in names:
        owner = ".".join(name.split(".")[:depth])
        found[owner if owner in found else ""].append(name)
    return found


def families() -> list[str]:
    """Return the names of the known families: the files of conf/model/arch."""
    return sorted(file.stem for file in (disk.project() / "conf" / "model" / "arch").glob("*.yaml"))


def _check_covered(blocks: "dict[str, nn.Module]", arch: Arch) -> None:
    """Raise UserError, naming them, if matrices inside the blocks belong to no linear."""
    from torch import nn

    found: dict[str, str] = {}  # by relative name, the same in all blocks
    for block in blocks.values():
        linear = {id(m.weight) for m in block.modules() if isinstance(m, nn.Linear)}
        for name, parameter in block.named_parameters():
            if parameter.ndim > 1 and id(parameter) not in linear:
                owner = type(block.get_submodule(name.rpartition(".")[0])).__name__
                found[name] = f"{name} {list(parameter.shape)} of {owner}"
    if found:
        raise UserError(
            f"arch={arch.name} is refused: no rule quantizes these weights of the blocks, which are no "
            f"nn.Linear: {', '.join(found.values())}; evaluate the model with method=fp"
        )


def linears(block_name: str, block: "nn.Module") -> dict[str, "nn.Linear"]:
    """Return the linears inside a block by full name: exactly what is quantized."""
    from torch import nn

    return {f"{block_name}.{name}": m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def sites(model: "nn.Module", arch: Arch) -> list[Site]:
    """Return every site, block by block in the arch's order. Raises UserError when there is none."""
    found = [
        site
        for index, (name, block) in enumerate(blocks(model, arch).items())
        for site in block_sites(arch, model.config, index, name, block)
    ]
    if not found:
        raise UserError(
            f"arch={arch.name} has no site in this model: there is nothing that a transform could train"
        )
    return found


def block_sites(
    arch: Arch, config: "PretrainedConfig", index: int, block_name: str, block: "nn.Module"
) -> Iterator[Site]:
    """Yield the sites of one block in the arch's order.

    Raises UserError when one vector cannot scale a source's output and its targets' input.
    """
    inside = linears(block_name, block)
    for source, entry in (arch.sites | (arch.more_sites or {})).items():
        wiring = entry if isinstance(entry, dict) else {"targets": entry}
        for key in wiring:
            if key not in WIRING:
                raise UserError(f"arch={arch.name}: site {source} sets {key!r}: {did_you_mean(key, WIRING)}")
        targets = {f"{block_name}.{t}": inside.get(f"{block_name}.{t}") for t in wiring["targets"]}
        missing = [name for name, module in targets.items() if module is None]
        if missing:
            raise UserError(
                f"arch={arch.name} names the linear {missing[0]!r}, which the model does not have"
            )
        heads, parts = wiring.get("heads"), wiring.get("parts", 1)
        if heads is not None and not hasattr(config, heads):
            raise UserError(
                f"arch={arch.name} reads {heads!r}, which the model's configuration does not have"
            )
        count = 1 if heads is None else getattr(config, heads)
        part = wiring.get("part", 0)
        module = _source(block, source, arch)
        site = Site(f"{block_name}.{source}", index, module, targets, count, parts, part)
        channels = module.weight.shape[0]
        fits = site.inputs % site.width == 0 if heads else site.inputs == site.width
        if not fits or channels % (count * parts) or not 0 <= part < parts:
            raise UserError(
                f"site {site.name} -> {', '.join(targets)} is refused: its source gives {channels} channels "
                f"(heads={count}, part {part} of {parts}), its targets read {site.inputs} (grouped-query "
                "attention needs heads); correct it or leave it out of the arch"
            )
        yield site


def _source(block: "nn.Module", name: str, arch: Arch) -> "nn.Module":
    try:
        return block.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"arch={arch.name} names the source {name!r}, which the model does not have"
        ) from None
