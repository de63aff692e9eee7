// Checks on tensors that memory safety needs, shared by all backends of an op. ops.py has checked
// the same and more with friendlier words; these guard raw torch.ops calls.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dispatch.h"
#include "common/error_word.h"

namespace lightvlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// std::invalid_argument reaches Python as ValueError.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
    if (!condition) fail(parts...);
}

inline std::string shape_text(const Tensor& tensor) {
    std::ostringstream text;
    text << "(";
    for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
    text << ")";
    return text.str();
}

// name, here and below: whatever a stream prints; it is made only for a message.
template <typename Name>
void check_dtype(const Tensor& tensor, const Name& name, ScalarType dtype) {
    check(tensor.scalar_type() == dtype, name, ": has dtype ",
          torch::headeronly::toString(tensor.scalar_type()), ", must be ",
          torch::headeronly::toString(dtype));
}

// The tensor's dtype as Params carry it.
inline DType floating_dtype(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return DType::kFloat32;
        case ScalarType::Half:
            return DType::kFloat16;
        case ScalarType::BFloat16:
            return DType::kBFloat16;
        default:
            fail(name, ": has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                 ", must be Float, Half or BFloat16");
    }
}

// sizes: -1 matches any.
template <typename Name>
void check_shape(const Tensor& tensor, const Name& name, std::initializer_list<int64_t> sizes) {
    bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (int64_t size : sizes) {
        same = same && (size < 0 || tensor.size(d) == size);
        ++d;
    }
    if (same) return;
    std::ostringstream wanted;
    d = 0;
    for (int64_t size : sizes) {
        wanted << (d++ ? ", " : "");
        size < 0 ? wanted << "*" : wanted << size;
    }
    fail(name, ": has shape ", shape_text(tensor), ", must be (", wanted.str(), ")");
}

template <typename Name>
void check_device(const Tensor& tensor, const Name& name, const Tensor& other) {
    check(tensor.device() == other.device(), name,
          ": must be on the device of the other arguments");
}

// A last dimension of at most one element has no stride to speak of.
template <typename Name>
void check_last_contiguous(const Tensor& tensor, const Name& name) {
    const int64_t last = tensor.dim() - 1;
    check(last >= 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1), name,
          ": the last dimension must be contiguous");
}

template <typename Name>
void check_contiguous(const Tensor& tensor, const Name& name) {
    check(tensor.is_contiguous(), name, ": must be contiguous");
}

// The device error word: one int32 beside the tensors of the op, or absent.
inline int32_t* error_word_pointer(const std::optional<Tensor>& error, const Tensor& other) {
    if (!error.has_value()) return nullptr;
    check_dtype(*error, "error", ScalarType::Int);
    check_shape(*error, "error", {1});
    check_device(*error, "error", other);
    return error->mutable_data_ptr<int32_t>();
}

// Raises what a CPU twin found in the values of its tensors.
inline void raise_status(const Status& status, const char* op) {
    if (status.ok()) return;
    std::ostringstream where;
    where << " (row " << status.row;
    if (status.position >= 0) where << ", position " << status.position;
    where << ", got " << status.value << ")";
    fail(op, ": ", describe_error(status.bit), where.str());
}

}  // namespace lightvlm
