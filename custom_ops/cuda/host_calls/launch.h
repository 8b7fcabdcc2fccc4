// Work of the host in the order of a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fastattn::cuda {

// Host memory that copies of a stream may write without the host waiting. Legal while a stream is
// captured.
cudaError_t AllocateHost(size_t bytes, void** memory);

cudaError_t LaunchCopyToHost(const void* device, void* host, size_t bytes, cudaStream_t stream);

// Calls function(argument) on a thread of the driver once everything before it in the stream is
// done; what follows in the stream waits for it. It may not call CUDA. In a captured graph it is
// called by every replay.
cudaError_t LaunchHostCall(void (*function)(void*), void* argument, cudaStream_t stream);

// The same beside what follows in the stream, which waits for it from JoinHostCalls or the next
// such call on. One device's calls come one after the other. In a graph it is LaunchHostCall.
cudaError_t LaunchHostCallBeside(void (*function)(void*), void* argument, cudaStream_t stream);

// What follows in the stream, one of the current device, waits for a call beside it. Does nothing
// where there is none, at next to no cost, and while a graph captures the stream.
cudaError_t JoinHostCalls(cudaStream_t stream);

}  // namespace fastattn::cuda
