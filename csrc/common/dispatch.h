// Runtime dtype to compile-time type. No torch here: Params carries a DType, and kernel launchers
// and CPU twins dispatch on it to the same three types (common/float16.cuh).
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/float16.cuh"

namespace lightvlm {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <typename T>
struct TypeTag {
    using type = T;
};

// Calls fn(TypeTag<T>{}), T being the type of dtype: `using T = typename decltype(tag)::type`.
// The enum is closed and floating_dtype() (checks.h) the only way to make one from a tensor.
template <typename Fn>
decltype(auto) dispatch_dtype(DType dtype, Fn&& fn) {
    switch (dtype) {
        case DType::kFloat16:
            return fn(TypeTag<half_t>{});
        case DType::kBFloat16:
            return fn(TypeTag<bfloat16_t>{});
        case DType::kFloat32:
        default:
            return fn(TypeTag<float>{});
    }
}

template <typename Fn>
decltype(auto) dispatch_bool(bool value, Fn&& fn) {
    return value ? fn(std::true_type{}) : fn(std::false_type{});
}

}  // namespace lightvlm
