// Chooses the instance of TileKernel for a call. Included after attention_kernel.h and, like it,
// without a guard, once for every instruction set.

TileFunction FindTileFunction(const AttentionParams& p) {
  TileFunction result = nullptr;
  AttentionHeadDims::Dispatch(p.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if (p.paged && IsQuantized(p.cache.type)) {
      DispatchFormat(p.cache.type, p.cache.dtype, [&](auto format) {
        using Kv = decltype(format);
        if constexpr (Kv::Value::kQuantized) result = &TileKernel<kDim, Kv, true>::Run;
      });
    } else {
      dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kE4M3, DType::kE5M2,
               DType::kInt8>(
          p.paged ? p.cache.dtype : p.ragged.dtype, "dtype of the keys", [&](auto dtype) {
            using Kv = KvFormat<SideFormat<decltype(dtype)::value, Scales::kStatic>>;
            result = &TileKernel<kDim, Kv, false>::Run;
          });
    }
  });
  return result;
}
