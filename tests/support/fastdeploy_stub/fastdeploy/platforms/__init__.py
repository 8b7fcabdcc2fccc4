"""Which class a backend's name means on this platform."""

import enum


class _Backend(enum.Enum):
    APPEND_ATTN = enum.auto()
    FLASH_ATTN = enum.auto()
    FLASH_MASK_ATTN = enum.auto()
    MLA_ATTN = enum.auto()
    DSA_ATTN = enum.auto()  # since 2.6
    PLAS_ATTN = enum.auto()
    DECODE_UNIFIED_ATTN = enum.auto()  # since 2.7's development


class CUDAPlatform:
    device_name = "gpu"

    def is_cuda(self):
        return True

    @classmethod
    def get_attention_backend_cls(cls, selected_backend):
        names = {
            _Backend.APPEND_ATTN: "AppendAttentionBackend",
            _Backend.FLASH_ATTN: "FlashAttentionBackend",
            _Backend.FLASH_MASK_ATTN: "FlashMaskAttentionBackend",
            _Backend.MLA_ATTN: "MLAAttentionBackend",
            _Backend.DSA_ATTN: "DSAAttentionBackend",
            _Backend.PLAS_ATTN: "PlasAttentionBackend",
            _Backend.DECODE_UNIFIED_ATTN: "DecodeUnifiedAttentionBackend",
        }
        if selected_backend not in names:
            raise ValueError("Invalid attention backend you specified.")
        return "fastdeploy.model_executor.layers.attention." + names[selected_backend]


class CPUPlatform(CUDAPlatform):
    device_name = "cpu"

    def is_cuda(self):
        return False


current_platform = CUDAPlatform()
