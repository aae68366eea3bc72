"""Running blocks, and the head of a model."""

import pytest

from teq import config
from teq.models.head import check_head
from teq.spec import UserError


def test_a_model_that_bends_its_logits_is_refused():
    (job,) = config.jobs(["model=tiny-llama"])
    lm = job.run.model.load("float32", "cpu")
    plain = lm.model.forward

    def bent(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits / 2
        return out

    lm.model.forward = bent
    with pytest.raises(UserError, match="does more to its logits"):
        check_head(lm.model, lm.arch)
