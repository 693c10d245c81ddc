"""Weights that are turned into another type after the load: which, when, and within which
memory."""

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import Reference, active_memory, read, submit, texts
from mlx.utils import tree_flatten
from mlx_lm import convert, load
from mlx_lm.models.mla import QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from tiny_models import CONFIGS, make_adapter

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.batch.kv_memory import KVMemory
from mlx_lm_ext.bench.random_model import COMMON, LLAMA, write_model
from mlx_lm_ext.engine import dequantize
from mlx_lm_ext.engine.models import BatchModelProvider
from mlx_lm_ext.errors import RequestError

QUANTIZED = (
    nn.QuantizedLinear,
    nn.QuantizedEmbedding,
    QuantizedSwitchLinear,
    QuantizedMultiLinear,
)
# The groups of quantized weights go into all of their sizes.
MIXTURE = dict(
    moe_intermediate_size=64, num_experts_per_tok=2, rms_norm_eps=1e-6, rope_theta=1e4
)
MODELS = {
    "llama": LLAMA,
    "tied": dict(LLAMA, tie_word_embeddings=True),
    "qwen3_moe": dict(
        COMMON | MIXTURE,
        model_type="qwen3_moe",
        num_hidden_layers=2,
        num_experts=4,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        head_dim=16,
        tie_word_embeddings=False,
        norm_topk_prob=True,
    ),
    "deepseek_v3": dict(
        CONFIGS["deepseek_v2"] | MIXTURE,
        model_type="deepseek_v3",
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
    ),
}
TOO_MUCH = ["--max-kv-bytes", "1000T"]


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory):
    """Makes the folder of a model as ``mlx_lm.convert`` writes it, once."""
    folders = {}

    def make(name="llama", group_size=32, bits=4, mode="affine", dtype="bfloat16"):
        key = (name, group_size, bits, mode, dtype)
        if key not in folders:
            folder = tmp_path_factory.mktemp("models")
            config = MODELS[name]
            plain = write_model(folder / "plain", config["model_type"], config)
            folders[key] = folder / "converted"
            quantization = {}
            if bits is not None:
                quantization = dict(q_group_size=group_size, q_bits=bits, q_mode=mode)
            convert(
                str(plain),
                str(folders[key]),
                quantize=bits is not None,
                dtype=dtype,
                **quantization,
            )
        return folders[key]

    return make


@pytest.fixture
def on_device(monkeypatch):
    """Names another device. Its arrays are still those of the CPU."""
    return lambda kind: monkeypatch.setattr(dequantize, "device_kind", lambda: kind)


def arguments(*argv):
    return make_parser().parse_args(argv)


def load_as_served(folder, *argv):
    """The model as the generation thread has it after the load."""
    provider = BatchModelProvider(arguments("--model", str(folder), *argv))
    provider.switch_to(provider.default_key)
    return provider


def quantized_layers(model):
    return [m for _, m in model.named_modules() if isinstance(m, QUANTIZED)]


def types(model):
    return {a.dtype for _, a in tree_flatten(model.parameters())}


def nbytes(model):
    return sum(a.nbytes for _, a in tree_flatten(model.parameters()))


def exact_reference(folder, adapter_path=None):
    """Answers of the model as it is, with all that is computed in float32: its quantized
    weights are then those of a float32 model."""
    reference = Reference(folder, adapter_path=adapter_path)
    reference.model.set_dtype(mx.float32)
    return reference


@pytest.mark.parametrize(
    "name, weights",
    [
        ("llama", {}),
        ("llama", dict(group_size=64)),
        ("llama", dict(bits=8)),
        ("llama", dict(bits=3)),
        ("llama", dict(dtype="float16")),
        ("llama", dict(bits=None)),
        ("llama", dict(bits=None, dtype="float16")),
        ("llama", dict(mode="mxfp4")),
        ("llama", dict(mode="mxfp8", bits=8)),
        ("llama", dict(mode="nvfp4", group_size=16)),
        ("tied", {}),
        ("tied", dict(mode="mxfp4")),
        ("qwen3_moe", {}),
        ("qwen3_moe", dict(mode="mxfp4")),
        ("deepseek_v3", {}),
        ("deepseek_v3", dict(bits=None)),
    ],
)
def test_answers_are_those_of_the_same_weights_in_float32(
    name, weights, make_folder, start_engine, on_device
):
    on_device("cpu-linux")
    folder = make_folder(name, **weights)
    engine = start_engine("llama", "--model", str(folder))
    model = engine.model_provider.model
    assert not quantized_layers(model)
    assert types(model) == {mx.float32}
    prompts = texts(3)
    jobs = [submit(engine, prompt, max_tokens=8) for prompt in prompts]
    reference = exact_reference(folder)
    expected = [reference.tokens(prompt, 8) for prompt in prompts]
    assert [read(job) for job in jobs] == expected


def test_adapter_is_applied_to_converted_layers(
    make_folder, start_engine, tmp_path, on_device
):
    on_device("cpu-linux")
    folder = make_folder()
    adapter = make_adapter(tmp_path / "adapter", folder)
    engine = start_engine(
        "llama", "--model", str(folder), "--adapter-path", str(adapter)
    )
    assert not quantized_layers(engine.model_provider.model)
    tokens = read(submit(engine, "hello", max_tokens=8))
    reference = exact_reference(folder, str(adapter))
    assert tokens == reference.tokens("hello", 8)
    assert tokens != exact_reference(folder).tokens("hello", 8)


def test_model_and_draft_model_of_a_request_are_converted(
    make_folder, model_folder, start_engine, on_device
):
    on_device("cpu-linux")
    engine = start_engine("llama", "--allow-models", "any")
    folder, draft = make_folder(), make_folder(bits=8)
    job = submit(
        engine, "hello", max_tokens=4, model=str(folder), draft_model=str(draft)
    )
    assert read(job) == exact_reference(folder).tokens("hello", 4)
    provider = engine.model_provider
    for model in (provider.model, provider.draft_model):
        assert types(model) == {mx.float32}


def test_bytes_of_kv_are_those_of_the_new_type(make_folder, on_device):
    on_device("cpu-linux")
    was, now = (
        KVMemory(load_as_served(make_folder(), "--dequantize", how).model)
        for how in ("off", "auto")
    )
    assert now.nbytes(3, 100) == 2 * was.nbytes(3, 100)
    assert now.limit < was.limit


@pytest.mark.parametrize(
    "kind, how, bits, is_converted",
    [
        ("cpu-linux", "auto", 4, True),
        ("cpu-linux", "auto", None, True),
        ("cpu-linux", "on", 4, True),
        ("cpu-linux", "off", 4, False),
        ("cpu-darwin", "auto", 4, False),
        ("cpu-darwin", "on", None, True),
        ("cuda", "auto", 4, True),
        ("cuda", "auto", None, False),
        ("cuda", "on", None, False),
        ("cuda", "off", 4, False),
        ("metal", "auto", 4, False),
        ("metal", "auto", None, False),
        ("metal", "on", 4, True),
        ("metal", "on", None, False),
    ],
)
def test_device_and_argument_decide(
    kind, how, bits, is_converted, make_folder, on_device, caplog
):
    caplog.set_level("INFO")
    on_device(kind)
    folder = make_folder(bits=bits)
    before, _ = load(str(folder))
    model = load_as_served(folder, "--dequantize", how).model
    lines = [r.message for r in caplog.records if "weights" in r.message]
    if is_converted:
        dtype = mx.float32 if kind.startswith("cpu") else mx.bfloat16
        assert types(model) == {dtype}
        (line,) = lines
        name = str(dtype).rpartition(".")[2]
        assert f"weights to {name} (" in line and "--dequantize off" in line
    else:
        assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
        assert types(model) == types(before) and not lines


@pytest.mark.parametrize(
    "mode, dtype",
    [("affine", "bfloat16"), ("affine", "float16"), ("mxfp4", "bfloat16")],
)
def test_gpu_weights_get_the_16_bit_type_that_the_model_computes_in(
    mode, dtype, make_folder, on_device
):
    on_device("cuda")
    folder = make_folder(mode=mode, dtype=dtype)
    model = load_as_served(folder).model
    assert types(model) == {getattr(mx, dtype)}
    exact, _ = load(str(folder))
    exact.set_dtype(mx.float32)
    w, layer = model.layers[0].mlp.up_proj.weight, exact.layers[0].mlp.up_proj
    # The product with the unit matrix is what the packed weights stand for.
    unit = layer(mx.eye(w.shape[1])).T
    assert mx.array_equal(w, unit.astype(w.dtype))


@pytest.mark.parametrize("value, dtype", [(1.5, mx.bfloat16), (1.001, mx.float32)])
def test_gpu_weights_are_float32_where_16_bits_would_lose_parts_of_norms(
    value, dtype, make_folder, on_device
):
    on_device("cuda")
    model, _ = load(str(make_folder()))
    norm = model.layers[0].input_layernorm
    norm.weight = mx.full(norm.weight.shape, value, dtype=mx.float32)
    dequantize.convert([model], arguments())
    assert model.layers[0].mlp.up_proj.weight.dtype == norm.weight.dtype == dtype
    assert (norm.weight == value).all() or dtype == mx.bfloat16


@pytest.mark.parametrize("norm_type", [mx.bfloat16, mx.float32])
def test_parameters_that_the_model_keeps_in_float32_stay(
    norm_type, make_folder, on_device
):
    on_device("cuda")
    model, _ = load(str(make_folder("deepseek_v3")))
    norm, gate = model.model.norm, model.layers[1].mlp.gate
    norm.weight = norm.weight.astype(norm_type)
    bias = mx.full(gate.e_score_correction_bias.shape, 1.001, dtype=mx.float32)
    gate.e_score_correction_bias = bias
    dequantize.convert([model], arguments())
    assert gate.e_score_correction_bias is bias
    del gate.e_score_correction_bias
    assert types(model) == {mx.bfloat16}


def test_experts_have_scales_of_their_own(on_device):
    on_device("cpu-linux")
    plain = SwitchLinear(64, 32, 4, bias=True)
    plain.weight *= mx.array([1, 10, 100, 1000])[:, None, None]
    model = nn.Sequential(plain.to_quantized(16, 4, "nvfp4", global_scale=True))
    dequantize.convert([model], arguments())
    (layer,) = model.layers
    assert type(layer) is SwitchLinear and mx.array_equal(layer.bias, plain.bias)
    error = mx.abs(layer.weight - plain.weight).max(axis=(1, 2))
    assert (error < 0.2 * mx.abs(plain.weight).max(axis=(1, 2))).all()


def test_layer_that_quantizes_its_input_becomes_a_plain_one(on_device):
    on_device("cpu-linux")
    plain = nn.Linear(64, 32, bias=False)
    model = nn.Sequential(nn.QQLinear.from_linear(plain)).eval()
    dequantize.convert([model], arguments())
    (layer,) = model.layers
    assert type(layer) is nn.Linear
    error = mx.abs(layer.weight - plain.weight).max()
    assert error < 0.2 * mx.abs(plain.weight).max()


def test_layer_of_another_kind_is_named_and_stays(on_device, caplog):
    class Packed(nn.QuantizedLinear):
        pass

    caplog.set_level("INFO")
    on_device("cpu-linux")
    model = nn.Sequential(Packed(64, 32), nn.QuantizedLinear(64, 32))
    dequantize.convert([model], arguments())
    assert [type(layer) for layer in model.layers] == [Packed, nn.Linear]
    assert caplog.messages[0] == "Layers that stay quantized: Packed"


def test_weights_that_do_not_fit_stay_as_they_are(
    make_folder, start_engine, on_device, caplog
):
    caplog.set_level("INFO")
    on_device("cpu-linux")
    engine = start_engine("llama", "--model", str(make_folder()), *TOO_MUCH)
    assert quantized_layers(engine.model_provider.model)
    (line,) = (m for m in caplog.messages if "weights" in m)
    assert "No room" in line and "float32 the weights take 0.00 GB" in line
    assert "KV needs 1000000.00 GB" in line
    tokens = read(submit(engine, "hello", max_tokens=4))
    assert tokens == Reference(make_folder()).tokens("hello", 4)


def test_model_that_has_to_be_converted_and_does_not_fit_is_refused(
    make_folder, on_device, monkeypatch
):
    on_device("metal")
    argv = ["--model", str(make_folder()), "--dequantize", "on", *TOO_MUCH]
    provider = BatchModelProvider(arguments(*argv))
    monkeypatch.setattr(dequantize.Conversion, "run", None)
    before = active_memory()
    for _ in range(2):
        with pytest.raises(
            RequestError, match="--dequantize on: .* bfloat16"
        ) as raised:
            provider.switch_to(provider.default_key)
        assert "\n" not in str(raised.value)
        # The error that goes to the client does not hold the arrays. What other tests have
        # left may be freed meanwhile.
        gc.collect()
        assert mx.get_active_memory() <= before


@pytest.mark.parametrize("missing, is_converted", [(0, True), (10, False)])
def test_fits_if_a_tenth_of_the_memory_is_left(
    missing, is_converted, make_folder, on_device, monkeypatch
):
    on_device("cpu-linux")
    folders = make_folder(), make_folder("tied")
    models = [load(str(folder))[0] for folder in folders]
    after = sum(nbytes(exact) for exact in map(converted, folders))
    memory = -(-after * 10 // 9) - missing
    monkeypatch.setattr(dequantize, "usable_memory", lambda: memory)
    dequantize.convert(models, arguments())
    assert [not quantized_layers(model) for model in models] == [is_converted] * 2


@pytest.mark.parametrize("missing, is_converted", [(0, True), (1, False)])
def test_fits_if_the_largest_layer_can_be_converted(
    missing, is_converted, make_folder, on_device, monkeypatch
):
    on_device("cpu-linux")
    model, _ = load(str(make_folder()))
    exact = converted(make_folder())
    largest = max(a.nbytes for _, a in tree_flatten(exact.parameters()))
    memory = nbytes(exact) + largest - missing
    monkeypatch.setattr(dequantize, "usable_memory", lambda: memory)
    dequantize.convert([model], arguments())
    assert (not quantized_layers(model)) is is_converted


def converted(folder):
    model, _ = load(str(folder))
    dequantize.convert([model], arguments("--dequantize", "on"))
    return model


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-kv-bytes", "2GB"],
        ["--use-prompt-cache", "--radix-cache-size", "2GB"],
    ],
)
def test_memory_is_left_for_the_kv_that_arguments_name(
    argv, make_folder, on_device, monkeypatch
):
    on_device("cpu-linux")
    monkeypatch.setattr(dequantize, "usable_memory", lambda: 2 * 10**9)
    assert quantized_layers(load_as_served(make_folder(), *argv).model)
    assert not quantized_layers(load_as_served(make_folder()).model)


@pytest.mark.parametrize("quantize", [True, False])
def test_peak_is_the_new_weights_and_one_layer(quantize, on_device):
    on_device("cpu-linux")
    layers = [nn.Linear(512, 512) for _ in range(32)]
    model = nn.Sequential(*layers)
    model.set_dtype(mx.bfloat16)
    if quantize:
        nn.quantize(model)
    mx.eval(model.parameters())
    del layers
    others = active_memory() - nbytes(model)
    mx.reset_peak_memory()
    dequantize.convert([model], arguments())
    mx.eval(model.parameters())
    assert types(model) == {mx.float32}
    of_layer = nbytes(model) / 32
    assert mx.get_peak_memory() - others < nbytes(model) + 2 * of_layer
