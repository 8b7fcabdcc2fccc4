"""The layer of a model that calls the backend, with the heads and scales of one rank."""

import numpy as np
import paddle
from paddle.base.framework import EagerParamBase


class Attention(paddle.nn.Layer):
    """Attributes of FastDeploy's ``Attention``; `scales` are s of ``x ~ code * s / max_bound``.

    Static FP8 scales are made for all heads of the model on every rank, INT8 ones for the channels
    of the rank's own heads. Both multipliers have the model's dtype.
    """

    def __init__(self, fd_config, layer_id, place, scales=None, **options):
        super().__init__()
        model, parallel = fd_config.model_config, fd_config.parallel_config
        size = parallel.tensor_parallel_size
        self.fd_config = fd_config
        self.layer_id = layer_id
        self.num_heads = model.num_attention_heads // size
        self.kv_num_heads = max(1, model.num_key_value_heads // size)
        self.head_dim = self.qk_head_dim = self.v_head_dim = model.head_dim
        self.use_neox_rotary_style = False
        self.qkv_bias = self.qkv_scale = self.linear_shift = self.linear_smooth = None
        self.out_scale = -1.0
        self.sinks = None
        self.sliding_window = 0
        for name, value in options.items():
            setattr(self, name, value)
        kind = getattr(fd_config.quant_config, "kv_cache_quant_type", None)
        if kind is None:
            return  # no quantisation method: the layer has none of the attributes below
        self.cache_quant_type_str = {"int8": "cache_int8", "float8_e4m3fn": "cache_fp8"}.get(
            kind, kind
        )
        self.quant_max_bound = 127.0 if kind == "int8" else 448.0
        self.quant_min_bound = -self.quant_max_bound
        if kind.startswith("block_wise"):
            return
        count = self.kv_num_heads * self.head_dim if kind == "int8" else model.num_key_value_heads
        for name, s in zip("kv", scales):
            assert s.shape == (count,)
            quant, dequant = self.quant_max_bound / s, s / self.quant_max_bound
            setattr(self, f"cache_{name}_scale", self._parameter(quant, place))
            setattr(self, f"cache_{name}_out_scale", self._parameter(dequant, place))

    @staticmethod
    def _parameter(values, place):
        import ml_dtypes

        bits = np.asarray(values).astype(ml_dtypes.bfloat16).view(np.uint16)
        parameter = EagerParamBase.from_tensor(paddle.to_tensor(bits, place=place))
        parameter.stop_gradient = False
        return parameter

    def forward(
        self,
        q=None,
        k=None,
        v=None,
        qkv=None,
        compressed_kv=None,
        k_pe=None,
        forward_meta=None,
    ):
        return forward_meta.attn_backend.forward(
            q, k, v, qkv, compressed_kv, k_pe, self, forward_meta
        )
