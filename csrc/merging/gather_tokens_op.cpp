// gather_tokens: checks, parameters, registration.
#include "merging/gather_tokens.h"

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/registration.h"

namespace lightvlm {

namespace {

// The widest access that address and stride allow, at most `widest`.
int32_t aligned_access(int64_t address_or_stride, int32_t widest) {
    while (address_or_stride % widest != 0) widest /= 2;
    return widest;
}

// Joins the dimensions after (rows, tokens) into one contiguous piece and as few strided
// dimensions as there are.
void describe_token(const Tensor& x, const std::string& name, GatherTensor* tensor) {
    const auto item = static_cast<int64_t>(x.element_size());
    tensor->inner_bytes = item;
    int64_t sizes[kGatherMaxOuter];
    int64_t strides[kGatherMaxOuter];  // innermost first
    int32_t outer = 0;
    for (int64_t d = x.dim() - 1; d >= 2; --d) {
        const int64_t size = x.size(d);
        const int64_t stride = x.stride(d) * item;
        if (size == 1) continue;
        if (outer == 0 && stride == tensor->inner_bytes) {
            tensor->inner_bytes *= size;
        } else if (outer > 0 && stride == strides[outer - 1] * sizes[outer - 1]) {
            sizes[outer - 1] *= size;
        } else {
            check(outer < kGatherMaxOuter, name, ": has more than ", kGatherMaxOuter,
                  " dimensions that are not contiguous with the next; pass a contiguous tensor");
            sizes[outer] = size;
            strides[outer] = stride;
            ++outer;
        }
    }
    tensor->outer_dims = outer;
    tensor->token_bytes = tensor->inner_bytes;
    for (int32_t d = 0; d < outer; ++d) {
        tensor->outer_size[d] = sizes[outer - 1 - d];
        tensor->outer_stride[d] = strides[outer - 1 - d];
        tensor->token_bytes *= sizes[d];
    }
}

GatherTensor describe(const Tensor& x, const Tensor& out, const std::string& name) {
    GatherTensor tensor;
    const auto item = static_cast<int64_t>(x.element_size());
    tensor.source = static_cast<const char*>(x.const_data_ptr());
    tensor.target = static_cast<char*>(out.mutable_data_ptr());
    tensor.row_stride = x.stride(0) * item;
    tensor.token_stride = x.stride(1) * item;
    describe_token(x, name, &tensor);

    int32_t access = 16;
    access = aligned_access(reinterpret_cast<intptr_t>(tensor.source), access);
    access = aligned_access(reinterpret_cast<intptr_t>(tensor.target), access);
    access = aligned_access(tensor.inner_bytes, access);
    if (x.size(0) > 1) access = aligned_access(tensor.row_stride, access);
    access = aligned_access(tensor.token_stride, access);
    for (int32_t d = 0; d < tensor.outer_dims; ++d) {
        access = aligned_access(tensor.outer_stride[d], access);
    }
    tensor.access_bytes = access;
    return tensor;
}

void check_output(const Tensor& x, const Tensor& out, const std::string& name, int64_t slots) {
    check(out.scalar_type() == x.scalar_type(), name, ": must have the dtype of its input");
    check_device(out, name.c_str(), x);
    check_contiguous(out, name.c_str());
    bool same = out.dim() == x.dim() && out.size(0) == x.size(0) && out.size(1) == slots;
    for (int64_t d = 2; same && d < x.dim(); ++d) same = out.size(d) == x.size(d);
    check(same, name, ": has shape ", shape_text(out), ", must be that of its input ",
          shape_text(x), " with ", slots, " slots for tokens");
}

template <Backend backend>
void gather_tokens_op(const std::vector<Tensor>& x,          // [R, N, ...] each
                      const Tensor& index,                   // [R, M] int32
                      const Tensor& count,                   // [R] int32
                      bool right,                            // rows flush right
                      const std::vector<Tensor>& out,        // [R, M, ...] each, out
                      const std::optional<Tensor>& error) {  // [1] int32, device error word
    constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
    check_dtype(index, "index", ScalarType::Int);
    check_shape(index, "index", {-1, -1});
    check_last_contiguous(index, "index");
    check_dtype(count, "count", ScalarType::Int);
    check_shape(count, "count", {index.size(0)});
    check_device(count, "count", index);
    check_contiguous(count, "count");
    check(!x.empty() && x.size() <= kGatherMaxTensors, "x: has ", x.size(),
          " tensors, must be 1 to ", kGatherMaxTensors);
    check(out.size() == x.size(), "out: has ", out.size(), " tensors, must be ", x.size());

    GatherTokensParams params;
    params.rows = index.size(0);
    params.slots = index.size(1);
    params.right = right;
    params.index = index.const_data_ptr<int32_t>();
    params.index_stride = index.stride(0);
    params.count = count.const_data_ptr<int32_t>();
    params.error = error_word_pointer(error, index);
    for (size_t i = 0; i < x.size(); ++i) {
        const std::string name = "x[" + std::to_string(i) + "]";
        check(x[i].dim() >= 2 && x[i].size(0) == params.rows, name, ": has shape ",
              shape_text(x[i]), ", must be (", params.rows, ", tokens, ...)");
        check_device(x[i], name.c_str(), index);
        if (i == 0) params.tokens = x[i].size(1);
        check(x[i].size(1) == params.tokens, name, ": has ", x[i].size(1), " tokens, must have ",
              params.tokens, " as x[0]");
        check(params.tokens <= kMaxInt32, name, ": has ", params.tokens, " tokens, at most ",
              kMaxInt32);
        check_output(x[i], out[i], "out[" + std::to_string(i) + "]", params.slots);
        params.tensors[params.tensor_count++] = describe(x[i], out[i], name);
    }
    LIGHTVLM_RUN(gather_tokens, backend, index, params);
}

}  // namespace

LIGHTVLM_REGISTER(gather_tokens, gather_tokens_op)

}  // namespace lightvlm
