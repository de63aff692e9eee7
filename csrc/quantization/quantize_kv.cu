// Instantiations and launches of quantize_kv.cuh.
#include "quantization/quantize_kv.cuh"

namespace lightvlm {

static_assert(sizeof(QuantizeKvParams) <= 4096, "kernel parameters are limited to 4 KiB");

namespace {

constexpr int64_t kVectorBytes = 16;

QuantizeAccess access_of(const QuantizeKvParams& params) {
    const int64_t item = dtype_bytes(params.dtype);
    QuantizeAccess access;
    access.in_vectors = is_multiple(params.key, params.key_strides, item, kVectorBytes) &&
                        is_multiple(params.value, params.value_strides, item, kVectorBytes);
    access.in_words = is_multiple(params.key_codes, params.key_codes_strides, 1, params.bits) &&
                      is_multiple(params.value_codes, params.value_codes_strides, 1, params.bits);
    return access;
}

template <typename T, int kBits>
cudaError_t launch_codes(const QuantizeKvParams& params, cudaStream_t stream) {
    const QuantizeAccess access = access_of(params);
    const int64_t blocks = params.batch * params.blocks * params.heads;
    const dim3 threads(kQuantizeThreads);
    if (params.parts == 1) {
        return launch("quantize_block", quantize_block_kernel<T, kBits>, make_grid(blocks), threads,
                      sizeof(QuantizeShared), stream, params, access);
    }
    cudaError_t status =
        launch("quantize_extremes", quantize_extremes_kernel<T>, make_grid(blocks * params.parts),
               threads, sizeof(QuantizeShared), stream, params, access);
    if (status != cudaSuccess) return status;
    status = launch("quantize_channels", quantize_channels_kernel, make_grid(blocks), threads,
                    sizeof(ChannelsShared), stream, params);
    if (status != cudaSuccess) return status;
    const int64_t tokens = params.block < params.tokens ? params.block : params.tokens;
    const int64_t tiles = (tokens + kQuantizeTile - 1) / kQuantizeTile;
    return launch("quantize_codes", quantize_codes_kernel<T, kBits>, make_grid(blocks * tiles),
                  threads, sizeof(QuantizeNumbers), stream, params, tiles, access);
}

}  // namespace

cudaError_t launch_quantize_kv_cuda(const QuantizeKvParams& params, cudaStream_t stream) {
    return dispatch_dtype(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        switch (params.bits) {
            case 8:
                return launch_codes<T, 8>(params, stream);
            case 4:
                return launch_codes<T, 4>(params, stream);
            default:
                return launch_codes<T, 2>(params, stream);
        }
    });
}

}  // namespace lightvlm
