// Which bytes a strided tensor covers, and whether two of them share any: exactly, so that views
// that interleave in one buffer pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lightvlm {

struct Footprint {
    struct Dim {
        int64_t size;
        int64_t stride;  // bytes, >= 0
    };
    const char* begin = nullptr;
    int64_t unit = 0;       // contiguous bytes at each position
    std::vector<Dim> dims;  // sizes > 1, by descending stride

    // One past the last byte.
    const char* end() const {
        const char* last = begin;
        for (const Dim& dim : dims) last += (dim.size - 1) * dim.stride;
        return last + unit;
    }
};

namespace footprint_detail {

// Whether sum_i c_i * stride_i, low_i <= c_i <= high_i, can fall into [first, last].
class BoundedSum {
  public:
    void add(int64_t stride, int64_t low, int64_t high) {
        for (Term& term : terms_) {
            if (term.stride != stride) continue;
            term.low += low;
            term.high += high;
            return;
        }
        terms_.push_back({stride, low, high});
    }

    bool reaches(int64_t first, int64_t last, bool not_all_zero) {
        std::sort(terms_.begin(), terms_.end(),
                  [](const Term& a, const Term& b) { return a.stride > b.stride; });
        steps_ = 0;
        return search(0, first, last, not_all_zero);
    }

  private:
    struct Term {
        int64_t stride;
        int64_t low;
        int64_t high;
    };

    // Strides of real layouts nest, and leave one or two candidates a term; beyond this many steps
    // the answer is "maybe", which counts as yes.
    static constexpr int64_t kMaxSteps = 1 << 20;

    static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

    // not_all_zero: one of the c from term `at` on has to be non-zero.
    bool search(size_t at, int64_t first, int64_t last, bool not_all_zero) {
        if (++steps_ > kMaxSteps) return true;
        if (at == terms_.size()) return first <= 0 && 0 <= last && !not_all_zero;
        const Term& term = terms_[at];
        if (term.stride == 0) {  // the last term: strides descend
            return first <= 0 && 0 <= last && (!not_all_zero || term.low < 0 || term.high > 0);
        }
        int64_t rest_low = 0;
        int64_t rest_high = 0;
        for (size_t i = at + 1; i < terms_.size(); ++i) {
            rest_low += terms_[i].low * terms_[i].stride;
            rest_high += terms_[i].high * terms_[i].stride;
        }
        const int64_t low = std::max(term.low, -floor_div(rest_high - first, term.stride));
        const int64_t high = std::min(term.high, floor_div(last - rest_low, term.stride));
        for (int64_t c = low; c <= high; ++c) {
            const int64_t here = c * term.stride;
            if (search(at + 1, first - here, last - here, not_all_zero && c == 0)) return true;
        }
        return false;
    }

    std::vector<Term> terms_;
    int64_t steps_ = 0;
};

}  // namespace footprint_detail

inline bool overlap(const Footprint& a, const Footprint& b) {
    if (a.end() <= b.begin || b.end() <= a.begin) return false;
    footprint_detail::BoundedSum difference;
    for (const auto& dim : a.dims) difference.add(dim.stride, 0, dim.size - 1);
    for (const auto& dim : b.dims) difference.add(dim.stride, -(dim.size - 1), 0);
    // [p, p + a.unit) meets [q, q + b.unit) where -a.unit < p - q < b.unit.
    const int64_t offset = a.begin - b.begin;
    return difference.reaches(1 - a.unit - offset, b.unit - 1 - offset, false);
}

// Whether two positions of one tensor share bytes, as in an expanded tensor.
inline bool overlaps_itself(const Footprint& a) {
    bool nested = true;
    int64_t inner = a.unit;
    int64_t last_stride = -1;
    for (auto dim = a.dims.rbegin(); dim != a.dims.rend(); ++dim) {
        if (dim->stride == last_stride) return true;  // (0, 1) and (1, 0)
        nested = nested && dim->stride >= inner;
        inner = dim->size * dim->stride;
        last_stride = dim->stride;
    }
    if (nested) return false;
    footprint_detail::BoundedSum difference;
    for (const auto& dim : a.dims) difference.add(dim.stride, -(dim.size - 1), dim.size - 1);
    return difference.reaches(1 - a.unit, a.unit - 1, true);
}

}  // namespace lightvlm
