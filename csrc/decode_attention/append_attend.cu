// Launches of append_attend.cuh and, behind it, of decode_attention.cuh.
#include "decode_attention/append_attend.cuh"

namespace lightvlm {

static_assert(sizeof(AppendParams) <= 4096, "kernel parameters are limited to 4 KiB");

cudaError_t launch_append_attend_cuda(const AppendAttendParams& params, cudaStream_t stream) {
    const AppendParams& to = params.append;
    const int64_t rows = to.batch * to.added * to.heads;
    const cudaError_t error =
        launch("append", append_kernel, make_grid((rows + kAppendWarps - 1) / kAppendWarps),
               dim3(kAppendWarps * kWarpThreads), 0, stream, to);
    if (error != cudaSuccess) return error;
    return launch_decode_attention_cuda(params.attend, stream);
}

}  // namespace lightvlm
