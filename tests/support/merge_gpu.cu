// The CUDA kernels of merge_attn_states with strides that no Paddle tensor reaches them with, on
// copies of host memory. Compiled by tests/merge/test_merge_gpu.py with custom_ops/cuda/merge; no
// Paddle.
#include <vector>

#include "cuda/merge/launch.h"

namespace {

// Device copies of host buffers. A buffer given twice is one copy: outputs may lie over inputs.
class Copies {
 public:
  ~Copies() {
    for (const Copy& copy : copies_) cudaFree(copy.device);
  }

  template <typename T>
  T* Of(void* host, int64_t bytes, int64_t offset) {
    if (host == nullptr) return nullptr;
    char* device = nullptr;
    for (const Copy& copy : copies_) {
      if (copy.host == host) device = copy.device;
    }
    if (device == nullptr) {
      Check(cudaMalloc(&device, bytes));
      Check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
      copies_.push_back({host, device, bytes});
    }
    return reinterpret_cast<T*>(device + offset);
  }

  void Return() {
    for (const Copy& copy : copies_) {
      Check(cudaMemcpy(copy.host, copy.device, copy.bytes, cudaMemcpyDeviceToHost));
    }
  }

  void Check(cudaError_t status) {
    if (status_ == cudaSuccess) status_ = status;
  }

  cudaError_t Status() const { return status_; }

 private:
  struct Copy {
    void* host;
    char* device;
    int64_t bytes;
  };
  std::vector<Copy> copies_;
  cudaError_t status_ = cudaSuccess;
};

}  // namespace

// Buffers in the order prefix, its LSE, suffix, its LSE, output, output LSE, scale, scales: each as
// memory, its bytes, and the byte at which the tensor starts in it. sizes: T, merged tokens, H, D,
// group size. strides: of the first six, the order of each tensor's first two axes, then the
// token stride of `scales`. Returns a cudaError_t.
extern "C" int merge_on_gpu(int dtype, int output_kind, void* const* memory, const int64_t* bytes,
                            const int64_t* offsets, const int64_t* sizes, const int64_t* strides) {
  Copies copies;
  fastattn::MergeParams p;
  p.dtype = static_cast<fastattn::DType>(dtype);
  p.output_kind = static_cast<fastattn::MergeOutput>(output_kind);
  p.prefix_output = copies.Of<void>(memory[0], bytes[0], offsets[0]);
  p.prefix_lse = copies.Of<float>(memory[1], bytes[1], offsets[1]);
  p.suffix_output = copies.Of<void>(memory[2], bytes[2], offsets[2]);
  p.suffix_lse = copies.Of<float>(memory[3], bytes[3], offsets[3]);
  p.output = copies.Of<void>(memory[4], bytes[4], offsets[4]);
  p.output_lse = copies.Of<float>(memory[5], bytes[5], offsets[5]);
  p.output_scale = copies.Of<float>(memory[6], bytes[6], offsets[6]);
  p.output_scales = copies.Of<float>(memory[7], bytes[7], offsets[7]);
  p.num_tokens = sizes[0];
  p.merged_tokens = sizes[1];
  p.num_heads = static_cast<int>(sizes[2]);
  p.head_dim = static_cast<int>(sizes[3]);
  p.group_size = static_cast<int>(sizes[4]);
  p.prefix_token_stride = strides[0];
  p.prefix_head_stride = strides[1];
  p.prefix_lse_head_stride = strides[2];
  p.prefix_lse_token_stride = strides[3];
  p.suffix_token_stride = strides[4];
  p.suffix_head_stride = strides[5];
  p.suffix_lse_head_stride = strides[6];
  p.suffix_lse_token_stride = strides[7];
  p.output_token_stride = strides[8];
  p.output_head_stride = strides[9];
  p.output_lse_head_stride = strides[10];
  p.output_lse_token_stride = strides[11];
  p.output_scales_token_stride = strides[12];
  copies.Check(fastattn::cuda::LaunchMergeAttnStates(p, nullptr));
  copies.Check(cudaDeviceSynchronize());
  copies.Return();
  return copies.Status();
}
