"""Exported folders: every tensor comes back to the bit, and what a format cannot hold is refused."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import teq
from teq import config, record
from teq.__main__ import main
from teq.export import awq, compressed_tensors, formats, gguf, gptq, words, writer
from teq.files.digests import tensor_digest
from teq.grid import Grid
from teq.models import Folder
from teq.models.arch import families
from teq.pipeline.store import DATA
from teq.quantizers.quantized import restore, round_to_nearest
from teq.spec import UserError
from teq.verbs import export
from teq.verbs import run as cli

SHORT = ["ppl.limit=2", "ppl.context=64", "evals=[python-docs]", "gptq.samples=4", "gptq.length=64"]
HALF = "quant_grid.scale_dtype=float16"
BOUNDS = ["method=teq", "train.objective=block", "train.bounds_lr=0.02", "train.steps=4", "train.length=64"]
GGUF = ["bits=4", "group_size=32", "symmetric=true", HALF]


def exported(folder, form, *overrides):
    """Export a tiny model. Returns its plan and the model that its run evaluated."""
    plan, weights, finished = export.found_run([*SHORT, *overrides], form)
    writer.write(plan, weights, finished, form, folder, "a test")
    model = plan.checkpoint.load(plan.dtype, "cpu").model
    restore(model, weights.tensors(), plan.grid)
    return plan, model


def tensors_of(folder):
    """Every tensor of a folder's shards by name."""
    from safetensors.torch import load_file

    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 70), st.integers(0, 99))
def test_words_are_one_little_endian_stream_a_row(bits, rows, columns, seed):
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = words.words(codes, bits)
    stream = [sum(int(c) << (bits * i) for i, c in enumerate(row)) for row in codes]
    expected = [[(s >> (32 * i)) & 0xFFFFFFFF for i in range(packed.shape[1])] for s in stream]
    assert (packed.long() & 0xFFFFFFFF).tolist() == expected
    assert torch.equal(words.codes_of(packed, bits, columns), codes.to(torch.uint8))


@settings(deadline=None)
@given(
    st.sampled_from(
        [(compressed_tensors, b) for b in range(2, 9)] + [(gptq, b) for b in gptq.BITS] + [(awq, 4)]
    ),
    st.sampled_from([-1, 16, 32]),
    st.booleans(),
)
def test_what_is_packed_comes_back_to_the_bit(form_bits, group_size, symmetric):
    form, bits = form_bits
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="float16")
    linear = round_to_nearest(torch.randn(32, 96, generator=torch.Generator().manual_seed(bits)), grid)
    back = form.unpacked(form.packed(linear, grid), grid)
    assert writer.digests(back, bits) == writer.digests(linear, bits)


@pytest.mark.parametrize("bits", gguf.TYPES)
def test_ggufs_own_code_dequantizes_to_our_grid(bits):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    grid = Grid(bits=bits, group_size=32, symmetric=True, scale_dtype="float16")
    linear = round_to_nearest(torch.randn(8, 96, generator=torch.Generator().manual_seed(bits)), grid)
    rows = gguf.blocks_of(linear, bits)
    theirs = dequantize(rows.numpy(), GGMLQuantizationType[gguf.TYPES[bits]])
    assert torch.equal(torch.from_numpy(theirs), linear.dequantize(grid))
    assert writer.digests(gguf.linear_of(rows, bits), bits) == writer.digests(linear, bits)


def test_compressed_tensors_own_code_unpacks_our_words():
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="needs the export extra"
    )
    for bits in range(2, 9):
        codes = torch.randint(2**bits, (32, 96))
        theirs = helpers.pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
        assert torch.equal(theirs, words.words(codes, bits))


@pytest.mark.parametrize(
    ("form", "overrides"),
    [
        ("compressed-tensors", ["model=tiny-llama", "method=smoothquant", "bits=3", "group_size=32"]),
        ("compressed-tensors", ["model=tiny-opt", "method=gptq", "grid=w8", "symmetric=true"]),
        ("compressed-tensors", ["model=tiny-bloom", "method=rtn", "bits=5", "group_size=64"]),
        ("compressed-tensors", ["model=tiny-llama", "bits=3", "group_size=32", *BOUNDS]),
        ("compressed-tensors", ["model=tiny-gemma3", "method=smoothquant", "bits=4", "group_size=32"]),
        ("compressed-tensors", ["model=tiny-phi3", "method=smoothquant", "bits=4", "group_size=32"]),
        ("gptq", ["model=tiny-llama", "method=gptq-ao", "bits=3", "group_size=32", HALF, "dtype=float16"]),
        ("awq", ["model=tiny-llama", "method=rtn", "bits=4", "group_size=32", HALF, "dtype=float16"]),
        ("awq", ["model=tiny-llama", "method=rtn", "bits=4", "group_size=-1", HALF, "dtype=float16"]),
        ("gptq", ["model=tiny-opt", "method=gptq-ao", "bits=4", "group_size=-1", HALF, "dtype=float16"]),
    ],
)
def test_a_folder_holds_the_model_that_was_evaluated(tmp_path, form, overrides):
    """Weights, and everything that folding changed: norms and biases."""
    plan, model = exported(
        tmp_path / "out", form, "smoothquant.samples=4", "smoothquant.length=64", *overrides
    )
    tensors, state = tensors_of(tmp_path / "out"), model.state_dict()
    for name, linear in writer.read(plan, form, tmp_path / "out"):
        weight = linear.dequantize(plan.grid).to(model.dtype)
        assert torch.equal(weight, model.get_parameter(f"{name}.weight")), name
    others = {name for part in plan.names for name in part if name.removesuffix(".weight") not in plan.shapes}
    assert all(torch.equal(tensors[name], state[name]) for name in others)
    index = json.loads((tmp_path / "out" / writer.INDEX).read_text())["weight_map"]
    assert index.keys() == tensors.keys()
    suffixes = {key.rpartition(".")[2] for key in tensors.keys() - others}
    assert formats.find(form).PACKED in suffixes and "weight" not in suffixes
    assert [file.name for file in tmp_path.iterdir() if file.name not in ("home", "user")] == ["out"]


@pytest.mark.parametrize(
    ("dtype", "scales", "symmetric"),
    [
        ("float32", "float16", False),
        ("float32", "bfloat16", True),
        ("bfloat16", "float16", False),
        ("float16", "float32", True),
        ("float16", "float16", True),
    ],
)
def test_loaders_that_multiply_in_the_dtype_of_scales_get_our_weights(tmp_path, dtype, scales, symmetric):
    """As compressed-tensors multiplies: scales are cast to the model's dtype unless it asks to dequantize."""
    given = ["model=tiny-llama", "method=rtn", "group_size=32", f"symmetric={symmetric}", f"dtype={dtype}"]
    plan, model = exported(tmp_path / "out", "compressed-tensors", *given, f"quant_grid.scale_dtype={scales}")
    tensors = tensors_of(tmp_path / "out")
    asked = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for name, linear in writer.read(plan, "compressed-tensors", tmp_path / "out"):
        scale = tensors[f"{name}.weight_scale"]
        scale = scale if asked.get("dequantize") else scale.to(model.dtype)
        steps = (linear.codes.float() - linear.zero.repeat_interleave(32, 1)).to(scale.dtype)
        weight = steps * scale.repeat_interleave(32, 1)
        assert torch.equal(weight.to(model.dtype), model.get_parameter(f"{name}.weight")), name


@pytest.mark.parametrize(
    ("form", "overrides"),
    [("compressed-tensors", ["bits=3"]), ("gptq", ["bits=3", HALF]), ("gguf", GGUF)],
)
def test_a_tuned_model_is_exported_as_it_was_tuned(tmp_path, form, overrides):
    argv = ["model=tiny-llama", "method=rtn", "finetune=scales+norms", "group_size=32", *overrides, *SHORT]
    plan, weights, finished = export.found_run([*argv, "tune.steps=5", "tune.length=64"], form)
    manifest = writer.write(plan, weights, finished, form, tmp_path / "out", "a test")
    assert weights.folder.parent.name == "tuned"
    tuned, norm = weights.tensors(), "model.layers.0.input_layernorm.weight"
    assert not torch.equal(
        tuned[f"param/{norm}"], plan.checkpoint.load("float32", "cpu").model.get_parameter(norm)
    )
    kept = getattr(torch, manifest["dtype"])
    assert manifest["tensors"][norm] == tensor_digest(tuned[f"param/{norm}"].to(kept))
    for name, linear in writer.read(plan, form, tmp_path / "out"):
        assert torch.equal(linear.scale, tuned[f"{name}/scale"].float()), name


@pytest.mark.parametrize(("form", "size"), [("gptq", 32), ("awq", 32), ("compressed-tensors", None)])
def test_whole_rows_of_4_bits_are_stored_in_groups_where_kernels_take_no_rows(tmp_path, form, size):
    argv = ["model=tiny-llama", "method=rtn", "bits=4", "group_size=-1", HALF]
    plan, _ = exported(tmp_path / "out", form, *argv)
    told = formats.find(form).configuration(plan)
    weights = told["config_groups"]["group_0"]["weights"] if size is None else told
    assert weights["group_size"] == size
    if size is not None:
        scales = tensors_of(tmp_path / "out")["model.layers.0.mlp.down_proj.scales"]
        assert scales.shape == (160 // size, 64) and (scales == scales[:1]).all()


def test_an_order_of_columns_that_is_the_natural_one_is_not_written(tmp_path):
    """With one group in a row act-order changes no column's group; wider rows of the same model have two."""
    given = ["model=tiny-opt", "method=gptq-ao", "bits=4", "group_size=64", HALF, "dtype=float16"]
    exported(tmp_path / "out", "gptq", *given)
    told = json.loads((tmp_path / "out" / writer.MANIFEST).read_text())["linears"]
    ordered = {name.rpartition(".")[2] for name, digests in told.items() if "g_idx" in digests}
    assert ordered == {"fc2"}


def test_activations_that_awq_loaders_scale_get_scales_of_one(tmp_path):
    """transformers replaces them in BLOOM, and leaves what a checkpoint lacks unset."""
    given = ["model=tiny-bloom", "method=rtn", "bits=4", "group_size=32", HALF, "dtype=float16"]
    exported(tmp_path / "out", "awq", *given)
    tensors = tensors_of(tmp_path / "out")
    for i in range(2):
        rows = tensors[f"transformer.h.{i}.mlp.dense_h_to_4h.qweight"].shape[1] * 8
        assert torch.equal(tensors[f"transformer.h.{i}.mlp.gelu_impl.scales"], torch.ones(rows).half())


def test_tied_embeddings_stay_tied_and_a_folder_is_read_tensor_by_tensor(tmp_path):
    (job,) = config.jobs(["model=tiny-llama"])
    model = job.run.model.load("float32", "cpu").model
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    job.run.model.tokenizer().save_pretrained(tmp_path / "tied")
    path = f"model.path={tmp_path / 'tied'}"
    exported(tmp_path / "out", "compressed-tensors", "model=tiny-llama", path, "method=rtn", "group_size=32")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_the_card_says_what_the_record_says(tmp_path):
    exported(
        tmp_path / "out", "compressed-tensors", "model=tiny-llama", "method=gptq", "bits=3", "group_size=32"
    )
    (finished,) = record.load(config.home() / "records")
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.match(r"---\nlibrary_name: transformers\n(.+\n)+---\n", card)
    ppl = finished.metrics["python-docs"]["values"]["ppl"]
    assert re.search(rf"\| python-docs +\| ppl +\| {re.escape(f'{ppl:.4g}')} ± ", card)
    for words_ in (
        "3 bits, asymmetric, groups of 32",
        "4.094 bits per",
        "4 windows of 64 tokens of python-docs",
    ):
        assert words_ in card
    assert finished.id in card and "compressed-tensors>=0.18" in card


@pytest.mark.parametrize(
    ("form", "overrides", "message"),
    [
        ("awq", ["bits=3"], r"awq holds 4 bits, this run has 3: choose --format compressed-tensors"),
        ("awq", ["bits=4"], r"awq holds float16 scales only.*quant_grid\.scale_dtype=float16"),
        ("compressed-tensors", ["method=gptq-ao"], r"no column order.*: choose --format gptq"),
        ("compressed-tensors", ["bits=1"], r"holds 2 to 8 bits.*choose bits=2 or more"),
        ("compressed-tensors", ["group_size=64"], r"does not divide the 160 inputs.*: choose group_size=32"),
        ("gptq", ["bits=5", HALF], r"gptq holds 2, 3, 4, 8 bits.*: choose --format compressed-tensors"),
        ("gguf", ["bits=4", HALF], r"symmetric grids.*: choose --format compressed-tensors"),
        ("gguf", ["model=tiny-opt", *GGUF], r"llama architectures, this model is opt: choose --format"),
        (
            "gptq",
            ["model=tiny-gpt2"],
            r"no format is written for transformer\.h\.0\.attn\.c_attn, .*not exported",
        ),
        *(
            (
                "compressed-tensors",
                [f"model=tiny-{name}"],
                r"into transformer\.h\.0\.self.*: choose --format gptq",
            )
            for name in ("falcon", "falcon-2norms", "falcon-sequential")
        ),
        (
            "compressed-tensors",
            ["model=tiny-qwen3_moe"],
            r"no format is written for model\.layers\.0\.mlp\.experts, .*not exported",
        ),
        ("compressed-tensors", ["method=fp"], r"in floating point is not exported"),
        ("gtpq", [], r"--format gtpq is not allowed: did you mean gptq\?"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_the_run(
    own_home, form, overrides, message, capsys, tmp_path
):
    argv = ["model=tiny-llama", "method=rtn", "group_size=32", *overrides]
    assert main(["export", *argv, "--format", form, "--to", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (own_home / "store" / "weights").exists() and not (tmp_path / "out").exists()


def test_a_run_is_exported_by_its_id_alike(tmp_path, capsys, caplog, own_home):
    argv = ["model=tiny-llama", "method=rtn", "group_size=32", *SHORT]
    assert main(["export", *argv, "--to", str(tmp_path / "first")]) == 0
    (finished,) = record.load(own_home / "records")
    assert main(["export", finished.id, "--to", str(tmp_path / "second")]) == 0
    first, second = (tensors_of(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert main(["export", finished.id, "--to", str(tmp_path / "second")]) == 2
    assert re.search(r"--to .*second exists", capsys.readouterr().err)
    assert main(["export", "0123456789abcdef", "--to", str(tmp_path / "third")]) == 2
    assert "there is no record of a run '0123456789abcdef'" in capsys.readouterr().err
    for file in own_home.glob(f"store/weights/*/{DATA}"):
        file.unlink()
    assert main(["export", finished.id, "--to", str(tmp_path / "third")]) == 2
    assert "are not in the cache any more" in capsys.readouterr().err
    caplog.clear()
    with caplog.at_level("INFO"):
        assert main(["export", *argv, "--to", str(tmp_path / "third")]) == 0
    assert re.search(r"weights \w+: computing", caplog.text)  # made again, not silently
    assert json.loads((tmp_path / "third" / writer.MANIFEST).read_text())["id"] == finished.id


@pytest.mark.parametrize(
    ("form", "why"), [("compressed-tensors", "No space left on device"), ("gguf", r"is the disk full\? ")]
)
def test_a_full_disk_leaves_nothing(small_disk, form, why):
    disk = small_disk(100)
    with pytest.raises(UserError, match=rf"cannot be written \({why}"):
        exported(disk / "out", form, "model=tiny-llama", "method=rtn", *GGUF)
    assert list(disk.iterdir()) == []


def test_a_quantized_folder_is_not_quantized_again(tmp_path, own_home):
    exported(tmp_path / "out", "compressed-tensors", "model=tiny-llama", "method=rtn", "group_size=32")
    argv = ["model=tiny-llama", f"model.path={tmp_path / 'out'}", *SHORT]
    for method in ("rtn", "teq-fp"):
        with pytest.raises(UserError, match=rf"is quantized already and method={method} would"):
            cli.checked_jobs([*argv, f"method={method}"])
    assert cli.checked_jobs([*argv, "method=fp"])


def test_a_quantized_folder_is_a_model_to_evaluate(tmp_path, own_home):
    pytest.importorskip("compressed_tensors", reason="needs the export extra")
    exported(tmp_path / "out", "compressed-tensors", "model=tiny-llama", "method=rtn", "group_size=32")
    assert main(["cache"]) == 0
    (first,) = record.load(own_home / "records")
    (job,) = config.jobs(["model=tiny-llama", f"model.path={tmp_path / 'out'}", "method=fp", *SHORT])
    cli.run_job(job)
    found = [one for one in record.load(own_home / "records") if one.id == job.run.key()]
    assert found[0].metrics["python-docs"]["values"] == first.metrics["python-docs"]["values"]


REFUSED = ("gpt2", "qwen3_moe", "falcon", "falcon-2norms", "falcon-sequential")  # see the test of refusals


@pytest.mark.parametrize(
    ("form", "model"),
    [("gguf", "llama"), *(("compressed-tensors", name) for name in families() if name not in REFUSED)],
)
def test_stock_code_generates_what_our_model_generates(tmp_path, form, model):
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="needs the export extra")
    run = f"model=tiny-{model} method=rtn {' '.join([*GGUF, *SHORT])}"
    exported(tmp_path / "out", form, *run.split())
    ours, tokenizer = teq.load(run)
    theirs, _ = teq.load(tmp_path / "out")
    prompt = tokenizer("The quick brown fox", return_tensors="pt")
    made = [model.generate(**prompt, do_sample=False, max_new_tokens=24) for model in (ours, theirs)]
    assert torch.equal(*made)


def test_load_of_the_module_is_all_that_it_adds():
    with pytest.raises(AttributeError, match="has no attribute 'save'"):
        teq.save  # noqa: B018


def test_a_checkpoint_without_the_prefix_of_its_model_is_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"h.0.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tensors = Folder(path=str(tmp_path)).tensors("float16")
    assert tensors["transformer.h.0.weight"].dtype == torch.float16
    with pytest.raises(UserError, match=r"lacks transformer\.h\.1\.weight"):
        tensors["transformer.h.1.weight"]
