// Instantiations and launches of dequantize_kv.cuh.
#include "quantization/dequantize_kv.cuh"

namespace lightvlm {

static_assert(sizeof(DequantizeKvParams) <= 4096, "kernel parameters are limited to 4 KiB");

namespace {

constexpr int64_t kVectorBytes = 16;

template <typename T, int kBits>
cudaError_t launch_dequantize(const DequantizeKvParams& params, cudaStream_t stream) {
    constexpr auto kItem = static_cast<int64_t>(sizeof(T));
    DequantizeAccess access;
    access.in_words = is_multiple(params.key_codes, params.key_codes_strides, 1, kBits) &&
                      is_multiple(params.value_codes, params.value_codes_strides, 1, kBits);
    access.out_vectors = is_multiple(params.key, params.key_strides, kItem, kVectorBytes) &&
                         is_multiple(params.value, params.value_strides, kItem, kVectorBytes);
    const int64_t tiles = (params.tokens + kDequantizeTile - 1) / kDequantizeTile;
    return launch("dequantize", dequantize_kernel<T, kBits>,
                  make_grid(params.batch * tiles * params.heads), dim3(kDequantizeThreads), 0,
                  stream, params, tiles, access);
}

}  // namespace

cudaError_t launch_dequantize_kv_cuda(const DequantizeKvParams& params, cudaStream_t stream) {
    return dispatch_dtype(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        switch (params.bits) {
            case 8:
                return launch_dequantize<T, 8>(params, stream);
            case 4:
                return launch_dequantize<T, 4>(params, stream);
            default:
                return launch_dequantize<T, 2>(params, stream);
        }
    });
}

}  // namespace lightvlm
