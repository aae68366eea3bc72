"""The head of a model: what is done to its logits."""

import pytest

from teq.models.arch import families
from teq.models.head import check_head
from teq.spec import UserError


@pytest.mark.parametrize("family", families())
def test_a_model_that_bends_its_logits_is_refused(tiny, family):
    """Further than its configuration says: the same model passes as it is."""
    lm = tiny(family)
    check_head(lm.model, lm.arch)
    lm.model.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits / 2))
    with pytest.raises(UserError, match="does more to its logits"):
        check_head(lm.model, lm.arch)
