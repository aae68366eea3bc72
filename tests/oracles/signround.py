"""Write signround.safetensors: what auto-round 0.16.1 itself computes on small linears and on one block.

    python tests/oracles/signround.py        # an environment with torch and auto-round, without this project

It calls auto-round's `SignRoundQuantizer.quantize_block`, so that loop, `WrapperLinear`, quantization
functions, `SignSGD`, schedule and sampler are theirs; no arithmetic is repeated here. Everything is float32
on one thread; K = 20 steps, learning rate 1/K falling linearly to 0 (step k, from 0, has (1 - k/K)/K).

Inputs, for the cases of one linear: `weight [24, 96]` (its first 32 columns are positive in row 1, negative
in row 2), `inputs [64, 96]`, `targets [64, 24]` (those of the unquantized linear plus noise, so that the
targets are no function of the inputs, as with a quantized prefix).
Each step sees all inputs as one sample of 64 tokens. For the block `fc2(silu(fc1(x)))`, without biases:
`block.fc1.weight [48, 32]`, `block.fc2.weight [32, 48]`, `block.inputs [8, 6, 32]`, `block.targets` alike;
`block.batches [20, 3]` are the samples that each step sees.

Cases: `asym` (3 bits, groups of 32), `asym_tail` (groups of 40: the last holds 16 columns), `sym` (groups of
32), `asym_fp16` (scales rounded to float16), all of one linear; `block` (3 bits, groups of 32; the second
linear's last group holds 16 columns; linears `fc1` and `fc2`).

For each case `<case>.` (`block.fc1.`, `block.fc2.` for the linears of the block), n = 1, 5 and 20:

    n.value [out, in]           V after n steps, in units of a code; starts at 0, never clamped
    n.min_scale [out, groups]   factor of the group's minimum after n steps, as used: clamped to 0..1
    n.max_scale [out, groups]   that of its maximum
    n.codes [out, in] uint8     clamp(round(w / scale + V) + zero, 0, 7) with them
    n.scale [out, groups]       float32, in `asym_fp16` float16. Symmetric: negative where the largest weight
                                is positive or both ends are equally far from 0
    n.zero [out, groups]        round(-minimum / scale), symmetric 4; w' = scale * (codes - zero)
    best.codes [out, in] uint8  those that auto-round returns

and for each case (`block.`, not its linears):

    losses [20]                 mean squared error that step k (from 0) sees, before it moves; not times 1000
    best [1] int64              the number of steps after which the returned parameters were: the first
                                smallest of `losses`, so never those after the last step

Signs of gradients decide everything, and another processor sums in another order: a test should allow few
differing entries. The smallest nonzero gradient of any step, over the median of that step's, is printed.
"""

import copy
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from auto_round.algorithms.block_runner import BlockForwardRunner
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.data_type.utils import revert_tensor_by_pad
from auto_round.version import __version__
from safetensors.torch import save_file

STEPS, KEPT, BITS, SEED = 20, (1, 5, 20), 3, 5
CASES = {
    "asym": {"group_size": 32},
    "asym_tail": {"group_size": 40},
    "sym": {"group_size": 32, "sym": True},
    "asym_fp16": {"group_size": 32, "scale_dtype": torch.float16},
}


class Linear(torch.nn.Module):
    """A block of one linear: auto-round replaces the children of a block."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(columns, rows, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the linear's output."""
        return self.linear(hidden_states)


class Block(torch.nn.Module):
    """Two linears with a SiLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(48, 32, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        return self.fc2(torch.nn.functional.silu(self.fc1(hidden_states)))


class Recorder(SignRoundQuantizer):
    """auto-round's quantizer, which notes losses, batches and parameters as it goes."""

    def __init__(self, batch: int) -> None:
        config = SignRoundConfig(iters=STEPS, bits=BITS)
        config.finalize_scheme()
        super().__init__(config)
        runner = BlockForwardRunner(batch_size=batch, amp=False, enable_torch_compile=False)
        self.runner, self.batch = runner, batch
        self.found, self.losses, self.batches, self.margin = {}, [], [], float("inf")

    model_context = SimpleNamespace(amp=False, is_diffusion=False)
    compress_context = SimpleNamespace(
        enable_torch_compile=False, low_gpu_mem_usage=False, cache_device="cpu", clear_memory=lambda: None
    )

    @property
    def calibration_context(self):
        return SimpleNamespace(batch_size=self.batch)

    @property
    def block_forward(self):
        return self.runner

    def _get_loss(self, pred, ref, indices, *rest):
        self.batches.append(list(indices))
        return super()._get_loss(pred, ref, indices, *rest)

    def _scale_loss_and_backward(self, scaler, loss):
        self.losses.append(loss.item())
        return super()._scale_loss_and_backward(scaler, loss)

    def _step(self, scaler, optimizer, lr_schedule):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad.abs()
                nonzero = grad[grad > 0]
                if nonzero.numel():
                    self.margin = min(self.margin, float(nonzero.min() / nonzero.median()))
        super()._step(scaler, optimizer, lr_schedule)
        if (done := len(self.losses)) in KEPT:
            for name, module in self.block.named_modules():
                if hasattr(module, "orig_layer"):
                    self.found |= {f"{name}.{done}.{key}": t for key, t in parameters(module).items()}


@torch.no_grad()
def parameters(module) -> dict[str, torch.Tensor]:
    """Return what a WrapperLinear has now; asking for its weight clamps the factors, as its next use does."""
    weight, scale, zero = module._qdq_weight(module.value, module.min_scale, module.max_scale)
    rows, columns = weight.shape
    padding = -columns % module.orig_layer.group_size
    value = revert_tensor_by_pad(module.value.detach(), weight.shape, padding)
    scale = scale.reshape(rows, -1)
    zero = torch.as_tensor(zero, dtype=torch.float32)
    zero = zero.reshape(rows, -1) if zero.dim() else zero.expand(rows, scale.shape[1])
    found = {"value": value, "codes": codes(weight, scale, zero, module.orig_layer.group_size)}
    found |= {key: getattr(module, key).detach().reshape(rows, -1) for key in ("min_scale", "max_scale")}
    found |= {"scale": scale, "zero": zero}
    return {key: tensor.clone().contiguous() for key, tensor in found.items()}


def codes(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the codes of a dequantized weight, which auto-round does not keep."""
    each = [t.repeat_interleave(group_size, 1)[:, : weight.shape[1]].float() for t in (scale, zero)]
    found = weight / each[0] + each[1]
    assert (found - found.round()).abs().max() < 1e-3
    return found.round().to(torch.uint8)


def run(block, inputs: list[torch.Tensor], targets: list[torch.Tensor], batch: int, **given):
    """Return the recorder and the tensors of a case, named from the linear on."""
    for linear in block.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.bits, linear.act_bits, linear.data_type = BITS, 16, "int"
            linear.sym, linear.scale_dtype = False, torch.float32
            vars(linear).update(given)
    recorder = Recorder(batch)
    recorder.block = block
    place = SimpleNamespace(block_index=0, block_cnt=1, block_name="block")
    recorder.quantize_block(block, inputs, {}, targets, None, place)
    best = min(range(STEPS), key=recorder.losses.__getitem__)
    made = recorder.found
    for name, linear in block.named_modules():
        if isinstance(linear, torch.nn.Linear):
            zero = torch.as_tensor(linear.zp, dtype=torch.float32)
            found = codes(
                linear.weight.detach(), linear.scale, zero.expand_as(linear.scale), linear.group_size
            )
            made[f"{name}.best.codes"] = found
    made |= {"losses": torch.tensor(recorder.losses), "best": torch.tensor([best])}
    return recorder, made


def main() -> None:
    """Run all cases and write the file."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    linear = Linear(24, 96)
    weight = linear.linear.weight.data = normal(24, 96) / 8
    weight[1, :32], weight[2, :32] = weight[1, :32].abs(), -weight[2, :32].abs()
    inputs = normal(64, 96) * (1 + normal(96).abs())
    targets = linear(inputs).detach() + normal(64, 24) / 4
    saved = {"weight": linear.linear.weight.detach().clone(), "inputs": inputs, "targets": targets}
    for case, given in CASES.items():
        recorder, made = run(copy.deepcopy(linear), [inputs[None]], [targets[None]], 1, **given)
        saved |= {f"{case}.{key.removeprefix('linear.')}": tensor for key, tensor in made.items()}
        print(f"{case}: best after {made['best'].item()}, margin {recorder.margin:.1e}")
    block = Block()
    block.fc1.weight.data, block.fc2.weight.data = normal(48, 32) / 5, normal(32, 48) / 6
    inputs = normal(8, 6, 32)
    targets = block(inputs).detach() + normal(8, 6, 32) / 20
    saved |= {"block.inputs": inputs, "block.targets": targets}
    saved |= {f"block.{name}.weight": getattr(block, name).weight.detach().clone() for name in ("fc1", "fc2")}
    random.seed(SEED)
    recorder, made = run(block, list(inputs.split(1)), list(targets.split(1)), 3, group_size=32)
    saved |= {f"block.{key}": tensor for key, tensor in made.items()}
    saved["block.batches"] = torch.tensor(recorder.batches)
    print(f"block: best after {made['best'].item()}, margin {recorder.margin:.1e}")
    source = (
        f"auto-round {__version__}, torch {torch.__version__}; tests/oracles/signround.py says what each is"
    )
    save_file(saved, Path(__file__).with_suffix(".safetensors"), {"source": source})


if __name__ == "__main__":
    main()
