"""Attention layers of DeepSeek-V3.2, GLM-5 and DeepSeek-V4 at test size, from public operators.

Random weights, 256 hidden channels and 4 heads; heads, latents, index keys, pages and windows have
the models' sizes. The layers are here and not in the package because nobody would serve them: their
matrix products are NumPy's, made once for a whole prompt, so that a step's rows do not depend on
where the prompt is cut and the operators are all that a test sees. A server has layers of its own,
which it connects to the operators by `fastattn.backends`.

=========== ====================================================================================
pages       pages of a cache: assigned, reused, and NaN wherever no token lives
weights     configurations, random weights, rotary tables, and the projections of prompts
select      logits and top-k of a step, over gathered keys or in their pages
v32, v4     the layers: one step of any mixture of prefill, chunks and decoding
dense       the same layers in fp64, over all keys with a mask; shares no code with them
cuts        runs of a layer, and what of two runs must agree
ranks       a layer whose heads are spread over processes
=========== ====================================================================================
"""
