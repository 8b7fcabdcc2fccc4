// Chooses the instance of TileKernel for a call. Included after attention_kernel.h and, like it,
// without a guard, once for every instruction set.

TileFunction FindTileFunction(const AttentionParams& p) {
  TileFunction result = nullptr;
  const bool by_channel = p.paged && IsQuantized(p.cache.type);
  AttentionHeadDims::Dispatch(p.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if (by_channel) {
      dispatch<DType::kE4M3, DType::kE5M2, DType::kInt8, DType::kInt4, DType::kE2M1>(
          p.cache.dtype, "cache dtype",
          [&](auto dtype) { result = &TileKernel<kDim, decltype(dtype)::value, true>::Run; });
    } else {
      dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kE4M3, DType::kE5M2,
               DType::kInt8>(
          p.paged ? p.cache.dtype : p.ragged.dtype, "dtype of the keys",
          [&](auto dtype) { result = &TileKernel<kDim, decltype(dtype)::value, false>::Run; });
    }
  });
  return result;
}
