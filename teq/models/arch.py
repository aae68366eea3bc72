"""Architectures: where a family's decoder blocks are, and its sites: which layer feeds which linears."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teq.files import disk
from teq.spec import Settings, UserError, did_you_mean, option

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

# of a site whose channels are not the source's one to one, or whose readers are not only linears
WIRING = ("targets", "heads", "parts", "part", "kept")


@dataclass(frozen=True, kw_only=True)
class Arch(Settings):
    """A model family as data: where its blocks are, its sites, and the configuration values it depends on.

    `sites` maps each source to the linears that read its output; names are relative to the block.
    `more_sites` are those beyond the paper's, None where they are not used. A source may be mapped to
    `targets` with `heads`, the name of a value of the model's configuration, `parts` and `part`: see `Site`;
    and with `kept`, modules that read its output too and stay in floating point. A name may contain one `*`:
    in a source it matches any text, which replaces the `*` of its targets; in the targets of a source without
    one it matches every linear of that form. `kept` takes none.
    The `model_type` of its models' configurations is its name where it is not given.
    """

    name: str = option(hashed=False)
    model_type: str = option("", hashed=False)
    blocks: str
    sites: dict[str, Any]
    more_sites: dict[str, Any] | None = option(None, omitted=None)
    requires: dict[str, Any]
    because: str = option(hashed=False)  # why `requires` is required, for the message

    @property
    def kept(self) -> set[str]:
        """Return the modules that read a site and stay in floating point: the routers of experts."""
        every = (self.sites | (self.more_sites or {})).values()
        return {name for one in every if isinstance(one, Mapping) for name in one.get("kept", ())}


@dataclass(frozen=True)
class Site:
    """A source and the linears that read its output. Names are full module paths; `name` is the source's.

    The source's output channels are `[heads, parts, n]`, of which those of `part` are the site's; the
    targets' input channels are `[heads, repeats, n]`, because query heads may share a key-value head. The
    linears of one of `groups` read the same tokens of the source's output; where there are several, each is
    an expert, which reads those that are `routed` to it. `kept` read it too and are not quantized.
    """

    name: str
    block: int
    source: "nn.Module"
    groups: tuple[dict[str, "nn.Linear"], ...]
    heads: int = 1
    parts: int = 1
    part: int = 0
    kept: dict[str, "nn.Module"] = field(default_factory=dict)
    routed: bool = False  # the source is inside an expert: its name has something in the place of `*`

    @property
    def targets(self) -> dict[str, "nn.Linear"]:
        """Return the linears that read the source's output, by full name."""
        return {name: linear for group in self.groups for name, linear in group.items()}

    @property
    def width(self) -> int:
        """Return the number of channels: the length of the site's scale vector."""
        return self.source.weight.shape[0] // self.parts

    @property
    def inputs(self) -> int:
        """Return the number of the targets' input channels."""
        return next(iter(self.groups[0].values())).in_features

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
            module = name.rpartition(".")[0]
            if parameter.ndim > 1 and id(parameter) not in linear and module not in arch.kept:
                found[name] = (
                    f"{name} {list(parameter.shape)} of {type(block.get_submodule(module)).__name__}"
                )
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
    from torch import nn

    modules = dict(block.named_modules())
    inside = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    for pattern, entry in (arch.sites | (arch.more_sites or {})).items():
        wiring = entry if isinstance(entry, dict) else {"targets": entry}
        for key in wiring:
            if key not in WIRING:
                raise UserError(f"arch={arch.name}: site {pattern} sets {key!r}: {did_you_mean(key, WIRING)}")
        heads, parts = wiring.get("heads"), wiring.get("parts", 1)
        if heads is not None and not hasattr(config, heads):
            raise UserError(
                f"arch={arch.name} reads {heads!r}, which the model's configuration does not have"
            )
        count = 1 if heads is None else getattr(config, heads)
        part = wiring.get("part", 0)
        for source, star in _matches(pattern, modules, arch, "source").items():
            targets = [name if star is None else name.replace("*", star) for name in wiring["targets"]]
            groups = _groups(targets, block_name, inside, arch)
            kept = {
                f"{block_name}.{name}": modules[name] for name in wiring.get("kept", ()) if name in modules
            }
            if quantized := [name for name in kept if kept[name] in inside.values()]:
                raise UserError(
                    f"arch={arch.name} keeps {quantized[0]} in floating point, which is an nn.Linear: these "
                    "are all quantized, list it among the targets"
                )
            module, name = modules[source], f"{block_name}.{source}"
            site = Site(name, index, module, groups, count, parts, part, kept, routed=bool(star))
            channels = module.weight.shape[0]
            fits = site.inputs % site.width == 0 if heads else site.inputs == site.width
            if not fits or channels % (count * parts) or not 0 <= part < parts:
                raise UserError(
                    f"site {site.name} -> {', '.join(site.targets)} is refused: its source gives {channels} "
                    f"channels (heads={count}, part {part} of {parts}), its targets read {site.inputs} "
                    "(grouped-query attention needs heads); correct it or leave it out of the arch"
                )
            yield site


def _matches(pattern: str, modules: "dict[str, nn.Module]", arch: Arch, what: str) -> dict[str, str | None]:
    """Return the modules that a name means, and what its `*` stands for in each (None without one).

    Raises UserError where there is none.
    """
    if "*" in pattern:
        before, _, after = pattern.partition("*")
        rule = re.compile(f"{re.escape(before)}(.*){re.escape(after)}")
        found = {name: match[1] for name in modules if (match := rule.fullmatch(name))}
    else:
        found = {pattern: None} if pattern in modules else {}
    if not found:
        raise UserError(f"arch={arch.name} names the {what} {pattern!r}, which the model does not have")
    return found


def _groups(
    targets: list[str], block_name: str, inside: "dict[str, nn.Linear]", arch: Arch
) -> "tuple[dict[str, nn.Linear], ...]":
    """Return the linears that `targets` mean by full name, those for which a `*` stands alike together."""
    groups: dict[str | None, dict[str, nn.Linear]] = {}
    for target in targets:
        for name, star in _matches(target, inside, arch, "linear").items():
            groups.setdefault(star, {})[f"{block_name}.{name}"] = inside[name]
    return tuple(groups.values())
