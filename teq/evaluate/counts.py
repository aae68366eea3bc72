"""What TEQ trains, counted: the columns of the paper's Table 9.

Counting is an evaluation like any other, on a model that needs no weights (`model.weights=none`): so it runs
through the one command, leaves a record, and the table that shows it is a layout and nothing else.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.device.runtime import Runtime
from teq.models.arch import blocks, sites
from teq.stage import Evaluation, Metric

if TYPE_CHECKING:
    from teq.models.checkpoint import LM


@dataclass(frozen=True, kw_only=True)
class Counts(Evaluation):
    """Reads shapes alone."""

    name = "counts"

    def measure(self, lm: "LM", runtime: Runtime) -> Metric:
        """Count blocks, linears, sites and numbers.

        `applicable_linears` are those that a site's scale reaches, `linears` all (with the output head),
        `groups` the sites; in `total` an output head that is tied to the embedding is counted again.
        """
        from torch import nn

        found = sites(lm.model, lm.arch)
        total = sum(parameter.numel() for parameter in lm.model.parameters())
        head, embedding = lm.model.get_output_embeddings().weight, lm.model.get_input_embeddings().weight
        values: dict[str, Any] = {
            "blocks": len(blocks(lm.model, lm.arch)),
            "applicable_linears": sum(len(site.targets) for site in found),
            "linears": sum(isinstance(module, nn.Linear) for module in lm.model.modules()),
            "groups": len(found),
            "trained": sum(site.width for site in found),
            "total": total + (head.numel() if head is embedding else 0),
        }
        return Metric(values)
