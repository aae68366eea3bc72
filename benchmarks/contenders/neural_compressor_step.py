"""One step of TEQ training by Intel neural-compressor's own modules, in an environment that has them.

    python3 -m venv NC
    NC/bin/pip install torch==2.13.0 transformers==5.23.0 numpy PyYAML pydantic safetensors
    NC/bin/pip install py-cpuinfo prettytable psutil deprecated platformdirs
    NC/bin/pip install --no-deps neural-compressor==3.10

Its TEQLinearFakeQuant stands in place of every linear of the blocks, as its `add_tuning_scale` puts it there:
the targets of a site share one trained vector, any other linear has ones. The loss is the model's own full
cross-entropy, and autograd does the rest.
"""

import contextlib
from collections.abc import Iterator

import torch
from neural_compressor.torch.algorithms.weight_only.modules import TEQLinearFakeQuant
from torch import Tensor, nn

from teq.models import arch
from teq.models.checkpoint import LM
from teq.transforms.teq.settings import Teq

BETAS = (0.9, 0.9)  # as ours: the paper's section 3.2


class NeuralCompressor:
    """A contender for `benchmarks.contenders.worker`: it keeps the model to itself."""

    def __init__(self, lm: LM, settings: Teq) -> None:
        self.model, grid = lm.model, settings.grid
        kind, device = lm.model.dtype, lm.device
        scheme = "sym" if grid.symmetric else "asym"
        trained: dict[str, nn.Parameter] = {}  # by target
        for site in arch.sites(lm.model, lm.arch):
            # its fake quantization computes in the dtype of the weights, its scales have to follow
            alpha = nn.Parameter(torch.ones(site.width, dtype=kind, device=device))
            trained |= dict.fromkeys(site.targets, alpha)
        for block_name, block in arch.blocks(lm.model, lm.arch).items():
            for name, linear in arch.linears(block_name, block).items():
                ones = nn.Parameter(
                    torch.ones(linear.in_features, dtype=kind, device=device), requires_grad=False
                )
                module = TEQLinearFakeQuant(
                    linear, trained.get(name, ones), grid.bits, grid.group_size, scheme
                )
                parent, _, key = name.rpartition(".")
                setattr(lm.model.get_submodule(parent), key, module)
        distinct = {id(alpha): alpha for alpha in trained.values()}
        self.optimizer = torch.optim.Adam(distinct.values(), lr=settings.lr, betas=BETAS)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Its modules are in place for good."""
        yield

    def step(self, tokens: Tensor) -> float:
        """Forward, backward and Adam's update on `tokens [1, token]`; returns the loss."""
        loss = self.model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
