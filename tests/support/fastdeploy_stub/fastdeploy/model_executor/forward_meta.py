"""A step's metadata: an attribute that nobody has set is None."""

import enum


class ForwardMode(enum.IntEnum):
    EXTEND = enum.auto()
    DECODE = enum.auto()
    MIXED = enum.auto()
    NATIVE = enum.auto()

    def is_decode(self):
        return self is ForwardMode.DECODE

    def is_mixed(self):
        return self is ForwardMode.MIXED

    def is_native(self):
        return self is ForwardMode.NATIVE


class ForwardMeta:
    def __init__(self, **fields):
        self.__dict__.update(
            step_use_cudagraph=False,
            rope_already_applied=False,
            forward_mode=ForwardMode.MIXED,
            pre_caches_length=0,
            is_dummy_or_profile_run=False,
            exist_prefill=False,
        )
        self.__dict__.update(fields)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, None)
        return None
