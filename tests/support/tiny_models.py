"""Files of tiny random models, and their forward pass in fp64, written apart from the package.

The forward pass takes the tensors of a folder by Hugging Face's names. It rotates by complex
numbers, makes one query's attention at a time and has neither a cache nor a batch.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, HEADS, KV, DIM, MLP, VOCABULARY = 3, 48, 4, 2, 64, 80, 300
WINDOW = 40

#: model_type of each architecture.
TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}

#: Its GGUF files' layers that see all keys.
_FULL = [False, False, True]


def config_of(architecture: str, **more) -> dict:
    told = {
        "model_type": TYPES[architecture],
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": DIM,
        "intermediate_size": MLP,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
    }
    if architecture == "gemma3":
        told.update(
            sliding_window=WINDOW,
            layer_types=["full_attention" if f else "sliding_attention" for f in _FULL],
            rope_local_base_freq=1000.0,
            query_pre_attn_scalar=100,
        )
    return {**told, **more}


def tensors_of(architecture: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.normal(size=(rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        around = 0.0 if architecture == "gemma3" else 1.0
        return (around + 0.3 * rng.normal(size=size)).astype(np.float32)

    q, kv = HEADS * DIM, KV * DIM
    found = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": norm(HIDDEN),
    }
    if architecture != "gemma3":
        found["lm_head.weight"] = matrix(VOCABULARY, HIDDEN)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if architecture == "gemma3":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for n in range(LAYERS):
        own = {f"{name}.weight": norm(HIDDEN) for name in norms}
        for name, rows, columns in (
            ("self_attn.q_proj", q, HIDDEN),
            ("self_attn.k_proj", kv, HIDDEN),
            ("self_attn.v_proj", kv, HIDDEN),
            ("self_attn.o_proj", HIDDEN, q),
            ("mlp.gate_proj", MLP, HIDDEN),
            ("mlp.up_proj", MLP, HIDDEN),
            ("mlp.down_proj", HIDDEN, MLP),
        ):
            own[f"{name}.weight"] = matrix(rows, columns)
        if architecture == "qwen2":
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                own[f"self_attn.{name}_proj.bias"] = rng.normal(size=rows).astype(np.float32)
        if architecture in ("qwen3", "gemma3"):
            own["self_attn.q_norm.weight"], own["self_attn.k_norm.weight"] = norm(DIM), norm(DIM)
        found.update({f"model.layers.{n}.{name}": x for name, x in own.items()})
    return found


def _bytes_vocabulary() -> list[str]:
    from fastattn.models.tokenizer import _BYTE_TO_CHAR

    letters = [_BYTE_TO_CHAR[b] for b in range(256)]
    return [*letters, "th", "the", *(f"<|{i}|>" for i in range(VOCABULARY - 258))]


MERGES = [["t", "h"], ["th", "e"]]


def write_folder(folder: Path, architecture: str, seed: int = 0, **more) -> dict[str, np.ndarray]:
    """A checkpoint's folder; its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(architecture, seed)
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config_of(architecture, **more)))
    tokens = _bytes_vocabulary()
    tokenizer = {
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": MERGES},
        "pre_tokenizer": {"type": "ByteLevel"},
        "added_tokens": [{"id": 258, "content": tokens[258], "special": True}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tensors


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, architecture: str, seed: int = 0) -> None:
    """The same model as a converter writes it; not of Gemma, whose windows have a fixed pattern."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(_bytes_vocabulary())
    writer.add_token_types([1] * 258 + [3] * (VOCABULARY - 258))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, x in tensors_of(architecture, seed).items():
        if name in top:
            writer.add_tensor(top[name], x)
            continue
        _, _, number, rest = name.split(".", 3)
        module, kind = rest.rsplit(".", 1)
        if architecture == "llama" and module[-6:] in ("q_proj", "k_proj"):
            # A converter makes neighbours of channels that are half of a head apart.
            x = x.reshape(-1, 2, DIM // 2, HIDDEN).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(f"blk.{number}.{_GGUF_NAMES[module]}.{kind}", np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(
    architecture: str, tensors: dict[str, np.ndarray], tokens, *, bf16: bool = False
) -> np.ndarray:
    """Logits [T, vocabulary], fp64; with `bf16` the attention's inputs and output are rounded."""
    told = config_of(architecture)

    def rounded(x):
        return x.astype(ml_dtypes.bfloat16).astype(np.float64) if bf16 else x

    gemma = architecture == "gemma3"
    w = {k: v.astype(np.float64) for k, v in tensors.items()}
    table = w["model.embed_tokens.weight"]

    def rms(x, name):
        return x / np.sqrt((x**2).mean() + 1e-5) * (w[name + ".weight"] + gemma)

    def angle(n, position):
        local = gemma and not _FULL[n]
        theta = told["rope_local_base_freq"] if local else told["rope_theta"]
        return position * theta ** (-np.arange(DIM // 2) * 2 / DIM)

    def rotated(x, n, position):
        turned = (x[: DIM // 2] + 1j * x[DIM // 2 :]) * np.exp(1j * angle(n, position))
        return np.concatenate([turned.real, turned.imag])

    keys: list[list] = [[] for _ in range(LAYERS)]
    results = []
    for position, token in enumerate(tokens):
        x = table[token] * (np.sqrt(HIDDEN) if gemma else 1)
        for n in range(LAYERS):
            p = f"model.layers.{n}."

            def heads(kind, y, p=p, n=n, position=position):
                name = f"{p}self_attn.{kind}_proj."
                z = w[name + "weight"] @ y + w.get(name + "bias", 0.0)
                z = rounded(z.reshape(-1, DIM))
                if kind == "v":
                    return z
                norm = f"{p}self_attn.{kind}_norm"
                if norm + ".weight" in w:
                    z = np.stack([rms(head, norm) for head in z])
                return rounded(np.stack([rotated(head, n, position) for head in z]))

            y = rms(x, p + "input_layernorm")
            q = heads("q", y)
            keys[n].append((heads("k", y), heads("v", y)))
            seen = keys[n] if not gemma or _FULL[n] else keys[n][-WINDOW:]
            scale = (told["query_pre_attn_scalar"] if gemma else DIM) ** -0.5
            out = []
            for h in range(HEADS):
                s = np.array([k[h // (HEADS // KV)] @ q[h] * scale for k, _ in seen])
                e = np.exp(s - s.max())
                out.append(sum(a * v[h // (HEADS // KV)] for a, (_, v) in zip(e / e.sum(), seen)))
            add = w[p + "self_attn.o_proj.weight"] @ rounded(np.concatenate(out))
            x = x + (rms(add, p + "post_attention_layernorm") if gemma else add)
            y = rms(x, p + ("pre_feedforward" if gemma else "post_attention") + "_layernorm")
            gate, up = w[p + "mlp.gate_proj.weight"] @ y, w[p + "mlp.up_proj.weight"] @ y
            if gemma:
                gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            else:
                gate = gate / (1 + np.exp(-gate))
            add = w[p + "mlp.down_proj.weight"] @ (gate * up)
            x = x + (rms(add, p + "post_feedforward_layernorm") if gemma else add)
        results.append(w.get("lm_head.weight", table) @ rms(x, "model.norm"))
    return np.stack(results)
