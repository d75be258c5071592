"""planner.workspace against what really happens: allocator events of the profiler, and the products that torch is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from planner.workspace import Machine, gemm_shapes, outside, peak_bytes

THREADS = 2  # the table of oneDNN's scratch was measured with two
SCALARS_BYTES = 64  # torch wraps a Python number in a tensor of 4 or 8 bytes
CONFIG = {
    "vocab_size": 3000,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "rope_scaling": {"mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 2,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "fullatt_block_indexes": [1],
    },
}
TILINGS: dict[str, dict[str, int]] = {
    "whole": {},
    "tiles": {
        "patch_rows": 512,
        "window_rows": 512,
        "query_rows": 256,
        "query_heads": 4,
        "vision_mlp_rows": 512,
        "merger_rows": 128,
        "prompt_rows": 128,
        "prompt_heads": 1,
        "prompt_mlp_rows": 256,
        "vocabulary_rows": 1024,
    },
    "odd": {
        "patch_rows": 300,
        "window_rows": 64,
        "query_rows": 333,
        "query_heads": 16,
        "vision_mlp_rows": 100,
        "merger_rows": 63,
        "prompt_rows": 101,
        "prompt_heads": 2,
        "prompt_mlp_rows": 90,
        "vocabulary_rows": 700,
    },
}


def recorded_peak(call: Callable[[], object]) -> int:
    """Largest sum of live bytes in the CPU allocator while `call` runs, above what was live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        call()
    assert recording.profiler is not None
    events = [e for e in recording.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


class Products(TorchDispatchMode):
    """Notes every matrix product by (rows, inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, int, int]] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.calls += 1
            self.found.add((left.shape[0], left.shape[1], right.shape[1]))
        elif name in ("mv", "addmv"):
            self.found.add((1, args[-2].shape[1], args[-2].shape[0]))
        return func(*args, **(kwargs or {}))


def needs_avx512(dtype: str) -> None:
    """oneDNN's blocks for 16-bit products were measured on CPUs with AVX-512, with AMX and without; others take other kernels."""
    if dtype != "float32" and not torch.cpu._is_avx512_supported():
        pytest.skip(
            "16-bit products take other blocks on a CPU without AVX-512: nobody measured them"
        )


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def build(make_model: Any, make_shape: Any) -> Callable[..., Any]:
    """A model of 3B's widths with two blocks, one layer, zero weights, one image and text."""
    d, inner, e, f = 1280, 3420, 2048, 11008
    sizes = {"visual.patch_embed.proj": (d, 3, 2, 14, 14), "visual.merger.mlp.0": (4 * d, 4 * d)}
    sizes |= {
        "visual.merger.mlp.2": (e, 4 * d),
        "lm_head": (3000, e),
        "model.embed_tokens": (3000, e),
    }
    ones = ["visual.merger.ln_q", "model.norm"]
    for i in range(2):
        block = f"visual.blocks.{i}."
        sizes |= {block + "attn.qkv": (3 * d, d), block + "attn.proj": (d, d)}
        sizes |= {block + "mlp.gate_proj": (inner, d), block + "mlp.up_proj": (inner, d)}
        sizes |= {block + "mlp.down_proj": (d, inner)}
        ones += [block + "norm1", block + "norm2"]
    layer = "model.layers.0."
    sizes |= {layer + "self_attn.q_proj": (e, e), layer + "self_attn.o_proj": (e, e)}
    sizes |= {layer + "self_attn.k_proj": (256, e), layer + "self_attn.v_proj": (256, e)}
    sizes |= {layer + "mlp.gate_proj": (f, e), layer + "mlp.up_proj": (f, e)}
    sizes |= {layer + "mlp.down_proj": (e, f)}
    ones += [layer + "input_layernorm", layer + "post_attention_layernorm"]
    weights: dict[str, torch.Tensor] = {}
    for name, size in sizes.items():
        weights[f"{name}.weight"] = torch.zeros(size, dtype=torch.bfloat16)
        weights[f"{name}.bias"] = torch.zeros(size[0], dtype=torch.bfloat16)
    for name in ones:
        weights[f"{name}.weight"] = torch.ones(e if "model" in name else d, dtype=torch.bfloat16)

    def make(dtype: str, **options: Any) -> Any:
        # 36 x 42 has ragged windows and tiles; the others and their rows are multiples of the tiles
        image, text = options.pop("request", ((32, 48), 128))
        patches = image[0] * image[1]
        ids = [1, *[500] * (patches // 4), *[2] * (text - 1)]
        positions = torch.arange(700).expand(3, -1)
        shape = make_shape(CONFIG, dtype)
        pixels = [torch.zeros(patches, 1176)]
        return make_model(shape, weights, [image], pixels, ids, positions, **options)

    return make


def options_of(tiling: str) -> dict[str, Any]:
    # "whole" has 32 windows: two full batches, whose outputs must not coexist
    requests = {"odd": ((36, 42), 3), "whole": ((32, 64), 128), "tiles": ((32, 48), 128)}
    return {**TILINGS[tiling], "request": requests[tiling]}


def every_step(model: Any) -> Iterator[tuple[Any, Any, Callable[[], object], bool]]:
    """(step, kind, a call of it, whether it decodes) of every step of vision, prefill and one decoded token."""
    for function, step, w, v in model.vision_steps():
        yield (
            step,
            step.kind,
            lambda f=function, s=step, w=w, v=v: f(model.vision_run, s, w, v),
            False,
        )
    rows = len(model.ids)
    run = model.text_run(model.ids, 0, model.spans)
    for function, step, w, v in model.text_steps("prefill", model.x, rows):
        yield step, step.kind, lambda f=function, s=step, w=w, v=v: f(run, s, w, v), False
    run = model.text_run([5], rows, ())
    for function, step, w, v in model.text_steps(
        "decode", model.empty((1, model.shape.text.hidden)), 1
    ):
        yield step, step.kind, lambda f=function, s=step, w=w, v=v: f(run, s, w, v), True


@pytest.mark.parametrize(
    ("dtype", "tiling"),
    [("bfloat16", "whole"), ("bfloat16", "tiles"), ("bfloat16", "odd"), ("float32", "tiles")],
)
@torch.inference_mode()
def test_every_step_takes_outside_the_arena_what_is_predicted(
    build: Any, two_threads: None, dtype: str, tiling: str
) -> None:
    needs_avx512(dtype)
    model = build(dtype, **options_of(tiling))
    machine = Machine(threads=THREADS, amx=torch.cpu._is_amx_tile_supported())
    rows = len(model.ids)
    seen, wrong = set(), []
    for step, kind, call, decode in every_step(model):
        if kind == "embed_tokens":
            call()  # reading the table is the runtime's business
            continue
        if (kind, decode) in seen and kind != "lm_head":
            call()
            continue
        seen.add((kind, decode))
        recorded = recorded_peak(call)
        predicted = peak_bytes(
            outside(
                kind, model.shape, model.tiles, model.images, rows, rows + 1, machine, decode=decode
            )
        )
        exact = dtype == "float32" or tiling != "odd"
        slack = SCALARS_BYTES if exact else 64 * 1024
        if kind == "lm_head":
            slack = 64 * 1024  # vocabularies as narrow as this one were not measured
        if not recorded - slack <= predicted <= recorded + (slack if exact else 4 * 2**20):
            wrong.append((step.id, recorded, predicted))
    assert not wrong


SMALL_TILES = {
    "patch_rows": 37,
    "window_rows": 81,
    "query_rows": 29,
    "query_heads": 1,
    "vision_mlp_rows": 53,
    "merger_rows": 5,
    "prompt_rows": 7,
    "prompt_heads": 1,
    "prompt_mlp_rows": 11,
    "vocabulary_rows": 100,
}


@pytest.mark.parametrize("tiles", [{}, SMALL_TILES, {"prompt_rows": 49, "window_rows": 1}])
@torch.inference_mode()
def test_every_step_multiplies_the_shapes_that_are_predicted(
    tiny: Any, tiles: dict[str, int]
) -> None:
    model = tiny.model(**tiles)
    multiplied: dict[tuple[str, bool], set[tuple[int, int, int]]] = {}
    for _, kind, call, decode in every_step(model):
        with Products() as products:
            call()
        multiplied.setdefault((kind, decode), set()).update(products.found)
    for (kind, decode), found in multiplied.items():
        predicted = gemm_shapes(
            kind,  # type: ignore[arg-type]
            model.shape,
            model.tiles,
            model.images,
            len(model.ids),
            decode=decode,
        )
        assert found == predicted, kind


@torch.inference_mode()
def test_priming_multiplies_every_shape_of_the_real_run_in_fewer_calls(tiny: Any) -> None:
    found = []
    for priming in (False, True):
        model = tiny.model(priming=priming, **SMALL_TILES)
        with Products() as products:
            for _, _, call, _ in every_step(model):
                call()
        found.append(products)
    real, primed = found
    assert primed.found == real.found
    assert primed.calls < real.calls / 2


@torch.inference_mode()
def test_no_step_ever_takes_an_n_by_n_object(build: Any, two_threads: None) -> None:
    model = build("float32", query_rows=256, query_heads=4, window_rows=64, prompt_rows=128)
    patches = model.images[0].patches
    for step, kind, call, _ in every_step(model):
        if kind in ("window_attn", "full_attn", "self_attn"):
            # scores of one head alone would be four times as much
            assert 0 < recorded_peak(call) < patches * patches, step.id


def test_packing_for_amx_is_two_copies_of_the_keys_in_a_call(build: Any) -> None:
    model = build("bfloat16", query_rows=512, query_heads=4)
    plain, packed = (
        peak_bytes(
            outside(
                "full_attn",
                model.shape,
                model.tiles,
                model.images,
                381,
                400,
                Machine(threads=2, amx=amx),
            )
        )
        for amx in (False, True)
    )
    keys = 2 * model.images[0].patches * 4 * 80 * 2
    block = 2 * 512 * 80 * 2
    assert packed - plain == keys + block


def test_a_card_splits_keys_only_where_multiprocessors_stand_idle(build: Any) -> None:
    model = build("bfloat16", query_rows=2048)
    card = Machine(kind="cuda", kernel="flash", sm_count=84)

    def names(kind: Any, decode: bool) -> set[str]:
        found = outside(
            kind, model.shape, model.tiles, model.images, 381, 8000, card, decode=decode
        )
        return {piece.name for piece in found}

    assert "split_output" in names("self_attn", True)
    assert names("full_attn", False) == {"output", "logsumexp", "rng_state", "unused"}
