"""Architectures: where a family's decoder blocks are, and its sites: which layer feeds which linears."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.files import disk
from teq.spec import Settings, UserError, option

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Arch(Settings):
    """A model family as data: where its blocks are, its sites, and the configuration values it depends on.

    `sites` maps each source to the linears that read its output; names are relative to the block. The
    `model_type` of its models' configurations is its name where it is not given.
    """

    name: str = option(hashed=False)
    model_type: str = option("", hashed=False)
    blocks: str
    sites: dict[str, Any]
    requires: dict[str, Any]
    because: str = option(hashed=False)  # why `requires` is required, for the message


@dataclass(frozen=True)
class Site:
    """A source and the linears that read its output. Names are full module paths; `name` is the source's."""

    name: str
    block: int
    source: "nn.Module"
    targets: dict[str, "nn.Linear"]

    @property
    def width(self) -> int:
        """Return the number of channels: the length of the site's scale vector."""
        return next(iter(self.targets.values())).in_features

    def largest(self) -> "Tensor":
        """Return the targets' largest weight by magnitude in each input channel, `[in]`, fp32."""
        import torch

        return torch.stack([target.weight.abs().amax(0).float() for target in self.targets.values()]).amax(0)


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
    found = []
    for index, (block_name, block) in enumerate(blocks(model, arch).items()):
        inside = linears(block_name, block)
        for source, names in arch.sites.items():
            targets = {f"{block_name}.{t}": inside.get(f"{block_name}.{t}") for t in names}
            missing = [name for name, module in targets.items() if module is None]
            if missing:
                raise UserError(
                    f"arch={arch.name} names the linear {missing[0]!r}, which the model does not have"
                )
            found.append(make_site(f"{block_name}.{source}", index, _source(block, source, arch), targets))
    if not found:
        raise UserError(
            f"arch={arch.name} has no site in this model: there is nothing that a transform could train"
        )
    return found


def _source(block: "nn.Module", name: str, arch: Arch) -> "nn.Module":
    try:
        return block.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"arch={arch.name} names the source {name!r}, which the model does not have"
        ) from None


def make_site(name: str, block: int, source: "nn.Module", targets: dict[str, "nn.Linear"]) -> Site:
    """Return the site; refuse it when one vector cannot scale its source's output and its targets' input."""
    site = Site(name, block, source, targets)
    channels = source.weight.shape[0]
    if channels != site.width:
        raise UserError(
            f"site {name} -> {', '.join(targets)} is refused: its source gives {channels} channels, its "
            f"targets read {site.width} (as under grouped-query attention); leave it out of the arch"
        )
    return site
