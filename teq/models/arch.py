"""Sites: which norm or linear feeds which linears, folding scales into them, and the proof that nothing
changes.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teq.spec import Settings, UserError, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CLIP = "clip/"  # before a linear's name: the bounds of its folded weight, among the scales of the sites


@dataclass(frozen=True, kw_only=True)
class Arch(Settings):
    """A model family as data: where its blocks are, its sites, and the configuration values it depends on.

    `sites` maps each source to the linears that read its output; names are relative to the block.
    """

    name: str = option(hashed=False)
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
        """Channels: the length of the site's scale vector."""
        return next(iter(self.targets.values())).in_features

    def largest(self) -> "Tensor":
        """The targets' largest weight by magnitude in each input channel, `[in]`, fp32."""
        import torch

        return torch.stack([target.weight.abs().amax(0).float() for target in self.targets.values()]).amax(0)


def blocks(model: "nn.Module", arch: Arch) -> dict[str, "nn.Module"]:
    """The decoder blocks by full name, first to last. Raises UserError where `arch` does not describe the
    model.
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
            "have: choose the model's own family with model/arch=opt|bloom|llama"
        ) from None
    return {f"{arch.blocks}.{i}": block for i, block in enumerate(stack)}


def linears(block_name: str, block: "nn.Module") -> dict[str, "nn.Linear"]:
    """The linears inside a block by full name: exactly what is quantized."""
    from torch import nn

    return {f"{block_name}.{name}": m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def sites(model: "nn.Module", arch: Arch) -> list[Site]:
    """Every site of the model, block by block in the arch's order. Raises UserError when there is none."""
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
            found.append(_site(f"{block_name}.{source}", index, block.get_submodule(source), targets))
    if not found:
        raise UserError(
            f"arch={arch.name} has no site in this model: there is nothing that a transform could train"
        )
    return found


def _site(name: str, block: int, source: "nn.Module", targets: dict[str, "nn.Linear"]) -> Site:
    """The site, refused when one vector cannot scale both its source's output and its targets' input."""
    site = Site(name, block, source, targets)
    channels = source.weight.shape[0]
    if channels != site.width:
        raise UserError(
            f"site {name} -> {', '.join(targets)} is refused: its source gives {channels} channels, its "
            f"targets read {site.width} (as under grouped-query attention); leave it out of the arch"
        )
    return site


@dataclass(frozen=True)
class Folding:
    """What a set of scales does to each parameter: fp32 tensors by full linear or norm name."""

    columns: dict[str, "Tensor"]  # linear -> s [in]: weight columns are multiplied
    rows: dict[str, "Tensor"]  # source -> s [out]: weight rows (or a norm's weight) and bias are divided
    bounds: dict[str, "Tensor"] = field(default_factory=dict)  # linear -> [out, parts]: see `weight`

    @classmethod
    def of(cls, sites: list[Site], scales: Mapping[str, "Tensor"]) -> "Folding":
        """Sites without scales stay as they are; a tensor `clip/<linear>` bounds that linear's weight."""
        scaled = [site for site in sites if site.name in scales]
        return cls(
            columns={target: scales[site.name] for site in scaled for target in site.targets},
            rows={site.name: scales[site.name] for site in scaled},
            bounds={name.removeprefix(CLIP): b for name, b in scales.items() if name.startswith(CLIP)},
        )

    def weight(self, name: str, linear: "nn.Linear") -> "Tensor":
        """A folded copy of a linear's weight `[out, in]`: in fp32, or fp64 where the model is; never less.

        Where it has bounds `[out, parts]`, each of that many equal parts of a row is clamped to its own.
        """
        import torch

        exact = torch.promote_types(linear.weight.dtype, torch.float32)
        weight = linear.weight.detach().to(exact, copy=True)
        if name in self.columns:
            weight.mul_(self.columns[name].to(weight))
        if name in self.rows:
            weight.div_(self.rows[name].to(weight)[:, None])
        if name in self.bounds:
            bound = self.bounds[name].to(weight)[..., None]  # [out, parts, 1]
            weight.unflatten(1, (bound.shape[1], -1)).clamp_(-bound, bound)
        return weight

    def divided(self, name: str, module: "nn.Module") -> dict[str, "Tensor"]:
        """The one-dimensional parameters of a source (a norm's weight, any bias) divided by s, in their
        own dtype.
        """
        import torch

        out = {}
        for key, value in module.named_parameters(recurse=False):
            if value.ndim == 1 and name in self.rows:
                exact = value.detach().to(torch.promote_types(value.dtype, torch.float32))
                out[f"{name}.{key}"] = (exact / self.rows[name].to(exact)).to(value.dtype)
        return out


def fold(sites: list[Site], scales: Mapping[str, "Tensor"]) -> None:
    """Multiply targets and divide sources in place; the model's float function is unchanged."""
    import torch

    folding = Folding.of(sites, scales)
    touched = {site.name: site.source for site in sites} | {
        n: m for site in sites for n, m in site.targets.items()
    }
    new = {}
    for name, module in touched.items():
        new |= {
            (module, key.rpartition(".")[2]): value for key, value in folding.divided(name, module).items()
        }
        if isinstance(module, torch.nn.Linear):
            new[module, "weight"] = folding.weight(name, module)
    with torch.no_grad():
        for (module, key), value in new.items():
            getattr(module, key).copy_(value)


class _Caught(Exception):
    pass


def block_inputs(model: "nn.Module", arch: Arch, tokens: "Tensor") -> tuple["Tensor", dict[str, Any]]:
    """What the first block is called with for `tokens [batch, token]`: hidden `[batch, token, width]` and
    keywords.
    """
    import torch

    caught: dict[str, Any] = {}

    def catch(_: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught["hidden"] = args[0] if args else kwargs["hidden_states"]
        caught["kwargs"] = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        raise _Caught

    first = next(iter(blocks(model, arch).values()))
    with _hook(first, catch), torch.no_grad(), one_sequence_a_row(), contextlib.suppress(_Caught):
        model(tokens, use_cache=False)
    return caught["hidden"], caught["kwargs"]


def first_inputs(
    model: "nn.Module", arch: Arch, windows: "Tensor", kept: "torch.device | None" = None
) -> tuple[list["Tensor"], dict[str, Any]]:
    """The first block's inputs for `windows [sample, token]`, one `[1, token, width]` each, on the device
    `kept` (the model's), and its keywords, the same for all of them.
    """
    device, hidden = model.get_input_embeddings().weight.device, []
    for window in windows:
        one, kwargs = block_inputs(model, arch, window[None].to(device))
        hidden.append(one.to(kept or device))
    return hidden, kwargs


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Context manager: transformers takes each row of tokens for one sequence, which it is without a mask.

    Otherwise it reads the positions back to see that, and the host waits for the device in every forward
    pass. Fake tensors cannot be read: of them it would prepare for packed sequences.
    """
    from transformers import masking_utils

    kept = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = kept


@contextlib.contextmanager
def _hook(module: "nn.Module", hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run_block(block: "nn.Module", hidden: "Tensor", kwargs: dict[str, Any]) -> "Tensor":
    """A block's output hidden states `[batch, token, width]`, whatever else its family returns beside
    them.
    """
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def check_equivalence(model: "nn.Module", arch: Arch, tolerance: float = 1e-6) -> None:
    """Fold random scales from 0.01 to 100 into each site of the first block and compare the block's output.

    Works on a copy of the block in fp64 in the host's memory: the model is never touched, and a device that
    it hardly fits need not hold the copy. Raises UserError with the name of the site whose folding changes
    the function.
    """
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, 16), generator=generator).to(device)
    hidden, kwargs = block_inputs(model, arch, tokens)
    hidden, kwargs = hidden.cpu().double(), _exact(kwargs)
    name, original = next(iter(blocks(model, arch).items()))
    here = {
        id(t): t.detach().to("cpu", torch.float64 if t.is_floating_point() else t.dtype, copy=True)
        for t in (*original.parameters(), *original.buffers())
    }
    for parameter in original.parameters():
        here[id(parameter)] = torch.nn.Parameter(here[id(parameter)], requires_grad=False)
    block = copy.deepcopy(original, here)  # which takes what `here` holds for what it finds
    with torch.no_grad():
        expected = run_block(block, hidden, kwargs)
        for source, names in arch.sites.items():
            targets = {f"{name}.{t}": block.get_submodule(t) for t in names}
            site = _site(f"{name}.{source}", 0, block.get_submodule(source), targets)
            s = torch.empty(site.width, dtype=torch.float64).uniform_(-2, 2, generator=generator)
            folded = [p for m in (site.source, *site.targets.values()) for p in m.parameters(recurse=False)]
            kept = [parameter.clone() for parameter in folded]
            fold([site], {site.name: 10**s})
            change = (run_block(block, hidden, kwargs) - expected).norm() / expected.norm()
            if not change <= tolerance:
                raise UserError(
                    f"site {source} -> {', '.join(names)} of arch={arch.name} is refused: folding random "
                    f"positive scales into block 0 changes its output by {change:.1e} (relative), at most "
                    f"{tolerance:.0e} is allowed; correct the site in conf/model/arch/{arch.name}.yaml"
                )
            for parameter, value in zip(folded, kept, strict=True):
                parameter.copy_(value)


def _exact(value: Any) -> Any:
    """Tensors inside keyword arguments in the host's memory, those of numbers as fp64; the rest as it is."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    if isinstance(value, tuple | list):
        return type(value)(_exact(v) for v in value)
    return {k: _exact(v) for k, v in value.items()} if isinstance(value, dict) else value
