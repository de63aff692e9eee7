// Runtime dtype to compile-time type. No torch here: Params carries a DType, and the kernel file
// and the CPU twin each name their own types for the three of them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace lightvlm {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <typename T>
struct TypeTag {
    using type = T;
};

// Calls fn(TypeTag<T>{}) with the type that stands for dtype. The enum is closed and as_dtype()
// is the only way to make one from a tensor, so the last branch is the last type.
template <typename Float16, typename BFloat16, typename Fn>
decltype(auto) dispatch_dtype(DType dtype, Fn&& fn) {
    switch (dtype) {
        case DType::kFloat16:
            return fn(TypeTag<Float16>{});
        case DType::kBFloat16:
            return fn(TypeTag<BFloat16>{});
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
