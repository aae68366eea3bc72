"""SmoothQuant's scales (arXiv 2211.10438, equation 4) on our sites, for weights alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.data.texts import Calibration
from teq.device.runtime import Runtime
from teq.models.arch import Site
from teq.spec import option
from teq.stage import Load, Made, OnStep, Transform

if TYPE_CHECKING:
    from torch import Tensor, nn

    from teq.transforms.activations import Block, Hook


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Transform):
    """`alpha` is the share of the activations' range that the weights take over."""

    group = "smoothquant"
    calib: Calibration
    samples: int = option(at_least=1)
    length: int = option(at_least=2)
    alpha: float = option(0.5, at_least=0, at_most=1)

    def fit(self, load: Load, runtime: Runtime, on_step: OnStep) -> Made:
        """Compute the scales from each channel's largest magnitude on the calibration windows."""
        import torch

        from teq.device.memory import on_host
        from teq.transforms.activations import from_ones, reader, watched_blocks

        lm, largest, scales = load(), {}, {}
        windows = self.windows(lm.tokenizer)

        def note(site: Site) -> "Hook":
            def hook(_: "nn.Module", args: tuple["Tensor", ...], *__: Any) -> None:
                found = site.tied(args[0].abs().flatten(0, -2).amax(0).float()).amax(1)
                largest[site.name] = found.maximum(largest.get(site.name, found))

            return hook

        def watch(block: "Block") -> "list[tuple[nn.Module, Hook]]":
            return [(reader(site), note(site)) for site in block.sites]

        for block in watched_blocks(lm.model, lm.arch, windows, watch, "activation ranges"):
            for site in block.sites:
                w = site.largest()  # an expert may be without tokens: it keeps 1 as dead channels do
                scales[site.name] = self.scale(largest.get(site.name, torch.zeros_like(w)), w)
        return on_host(from_ones(scales)), {"sites": list(scales)}

    def scale(self, x: "Tensor", w: "Tensor") -> "Tensor":
        """Return `s = max|X|^alpha / max|W|^(1 - alpha)` of each channel, `[width]`, fp32.

        X is divided by s and W multiplied, as everywhere here. A channel whose maxima tell nothing, because
        one of them is 0, keeps 1; the official code clamps it to 1e-5, which would round its weights away.
        """
        import torch

        return torch.where((x > 0) & (w > 0), x**self.alpha / w ** (1 - self.alpha), 1.0)
