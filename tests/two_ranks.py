"""run.py as one of torchrun's ranks, noting what of the blocks' weights this rank holds between the passes.

Used by tests/test_ranks.py. TEQ_TEST_FAIL=<rank> lets the training fail on that rank alone.
"""

import json
import os
import sys

from torch.distributed.tensor import DTensor

import run
from teq import config, ranks

shard, average, rank = ranks.shard, ranks.average, os.environ["RANK"]
blocks = []


def noting_shard(model, arch):
    """What `shard` does, with the bytes of the whole weights noted."""
    from teq.arch import blocks as blocks_of

    blocks[:] = blocks_of(model, arch).values()
    whole = held()
    shard(model, arch)
    note({"whole": whole})


def noting_average(parameters):
    """What `average` does, just after a backward pass."""
    if rank == os.environ.get("TEQ_TEST_FAIL"):
        raise OSError("the disk is full")
    average(parameters)
    note({"held": held(), "plain": sum(not isinstance(p, DTensor) for b in blocks for p in b.parameters())})


def held():
    """Bytes of the blocks' weights in this process."""
    local = (p.to_local() if isinstance(p, DTensor) else p for b in blocks for p in b.parameters())
    return sum(p.untyped_storage().nbytes() for p in local)


def note(what):
    """Keep it for the test."""
    with (config.home() / f"rank-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    ranks.shard, ranks.average = noting_shard, noting_average
    sys.exit(run.main(sys.argv[1:]))
