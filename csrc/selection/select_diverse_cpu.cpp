// CPU twin of select_diverse.cuh: the same lazy greedy search with a heap, a row a thread. A
// segment's features are turned into fp32 unit vectors once; sums run over the same 32 lanes at
// every CPU level, so that the level does not change a bit.
#include "selection/select_diverse.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/multiversion.h"
#include "common/parallel.h"
#include "selection/diverse_value.h"
#include "selection/rows_cpu.h"

namespace lightvlm {

namespace {

// The widest register of a level. `At` is one in memory, at any float; it is always named, as
// `auto` would drop its alignment.
template <CpuLevel level>
struct Register;
template <>
struct Register<CpuLevel::kPortable> {
    typedef float Type __attribute__((vector_size(16)));
    typedef float At __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct Register<CpuLevel::kAvx2> {
    typedef float Type __attribute__((vector_size(32)));
    typedef float At __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Register<CpuLevel::kAvx512> {
    typedef float Type __attribute__((vector_size(64)));
    typedef float At __attribute__((vector_size(64), aligned(4), may_alias));
};

// Channels are padded to this: the sums of a dot product, in registers of any width.
constexpr int64_t kLanes = 32;

template <CpuLevel level>
LIGHTVLM_INLINE float dot(const float* x, const float* y, int64_t padded) {
    using Type = typename Register<level>::Type;
    constexpr int64_t kRegisters = kLanes * sizeof(float) / sizeof(Type);
    Type sums[kRegisters] = {};
    for (int64_t c = 0; c < padded; c += kLanes) {
        const typename Register<level>::At* x_at =
            reinterpret_cast<const typename Register<level>::At*>(x + c);
        const typename Register<level>::At* y_at =
            reinterpret_cast<const typename Register<level>::At*>(y + c);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRegisters; ++r) sums[r] += x_at[r] * y_at[r];
    }
    float parts[kLanes];
    std::memcpy(parts, sums, sizeof(parts));
#pragma GCC unroll 8
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
        for (int64_t k = 0; k < half; ++k) parts[k] += parts[k + half];
    }
    return parts[0];
}

// unit[0, padded): the unit vector of x, zeros where x has no direction and past channels.
template <typename T>
struct UnitVector {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const T* x, int64_t channels, float* unit, int64_t padded) {
        uint32_t largest = 0;  // as bits, where NaN is above infinity
        for (int64_t c = 0; c < channels; ++c) {
            unit[c] = to_float(x[c]);
            uint32_t bits;
            std::memcpy(&bits, unit + c, sizeof(bits));
            bits &= 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
        for (int64_t c = channels; c < padded; ++c) unit[c] = 0.0f;
        float magnitude;
        std::memcpy(&magnitude, &largest, sizeof(magnitude));
        const float scale = diverse_scale(magnitude);
        if (scale == 0.0f) {
            std::memset(unit, 0, padded * sizeof(float));
            return;
        }
        for (int64_t c = 0; c < padded; ++c) unit[c] *= scale;
        const float inverse_norm = 1.0f / std::sqrt(dot<level>(unit, unit, padded));
        for (int64_t c = 0; c < padded; ++c) unit[c] *= inverse_norm;
    }
};

// Largest cosine of one unit vector to those at `others`, at least 0.
struct LargestCosine {
    template <CpuLevel level>
    static LIGHTVLM_INLINE float run(const float* units, int64_t one, const int32_t* others,
                                     int64_t count, int64_t padded) {
        const float* unit = units + one * padded;
        float largest = 0.0f;
        for (int64_t k = 0; k < count; ++k) {
            const float cosine = dot<level>(unit, units + others[k] * padded, padded);
            largest = cosine > largest ? cosine : largest;
        }
        return largest;
    }
};

struct Candidate {
    float value;    // as far as `seen` choices are known: an upper bound
    int32_t place;  // among the segment's tokens, ascending as they are
    int32_t seen;
    float worth;
    float nearest;
};

// Whether b comes before a: a heap puts the highest value on top, and of equals the first token.
bool comes_after(const Candidate& a, const Candidate& b) {
    return a.value < b.value || (a.value == b.value && a.place > b.place);
}

struct Scratch {
    std::vector<uint8_t> kept;
    std::vector<int32_t> all_tokens;
    std::vector<Candidate> heap;
    std::vector<float> units;      // [tokens of the segment, padded channels]
    std::vector<int32_t> choices;  // places, in the order of choice
};

template <typename T>
class DiverseRow {
  public:
    DiverseRow(const SelectDiverseParams& params, int64_t row, FirstError& error, Scratch& scratch)
        : params_(params),
          row_(params.rows, row, error),
          features_(static_cast<const T*>(params.features) + row * params.features_row_stride),
          padded_((params.channels + kLanes - 1) / kLanes * kLanes),
          scratch_(scratch) {}

    void run() {
        const int64_t n = row_.tokens();
        scratch_.kept.assign(n, 0);
        if (row_.forced() != nullptr) {
            for (int64_t i = 0; i < n; ++i) scratch_.kept[i] = row_.forced()[i] != 0;
        }
        if (row_.has_segments()) {
            std::vector<CpuRow::Segment> segments;
            if (!row_.segments(&segments)) return;
            for (const auto& segment : segments) {
                if (!choose(segment.id, segment.tokens)) return;
            }
        } else {
            scratch_.all_tokens.resize(n);
            for (int64_t i = 0; i < n; ++i) scratch_.all_tokens[i] = static_cast<int32_t>(i);
            if (!choose(0, scratch_.all_tokens)) return;
        }
        row_.write(scratch_.kept.data());
    }

  private:
    // False where an error was reported.
    bool choose(int32_t segment_id, const std::vector<int32_t>& tokens) {
        int64_t budget = 0;
        if (!row_.budget(segment_id, &budget)) return false;
        if (budget == 0) return true;
        const int32_t n = static_cast<int32_t>(tokens.size());
        std::vector<Candidate>& heap = scratch_.heap;
        std::vector<int32_t>& choices = scratch_.choices;
        heap.clear();
        choices.clear();
        scratch_.units.resize(n * padded_);
        for (int32_t place = 0; place < n; ++place) {
            const int32_t i = tokens[place];
            const bool forced = row_.forced() != nullptr && row_.forced()[i];
            if (forced) {
                choices.push_back(place);
            } else if (row_.candidates() == nullptr || row_.candidates()[i]) {
                const float worth = diverse_worth(row_.scores()[i]);
                heap.push_back(Candidate{worth, place, 0, worth, 0.0f});
            } else {
                continue;
            }
            multiversion<UnitVector<T>>(features_ + i * params_.features_token_stride,
                                        params_.channels, scratch_.units.data() + place * padded_,
                                        padded_);
        }
        std::make_heap(heap.begin(), heap.end(), comes_after);
        while (budget > 0 && !heap.empty()) {
            std::pop_heap(heap.begin(), heap.end(), comes_after);
            Candidate& best = heap.back();
            // Nothing times any similarity is nothing.
            if (best.worth == 0.0f || best.seen == static_cast<int32_t>(choices.size())) {
                scratch_.kept[tokens[best.place]] = 1;
                choices.push_back(best.place);
                --budget;
                heap.pop_back();
                continue;
            }
            catch_up(best);
            std::push_heap(heap.begin(), heap.end(), comes_after);
        }
        return true;
    }

    void catch_up(Candidate& candidate) {
        const std::vector<int32_t>& choices = scratch_.choices;
        const int32_t count = static_cast<int32_t>(choices.size());
        const float cosine = multiversion<LargestCosine>(
            static_cast<const float*>(scratch_.units.data()), int64_t{candidate.place},
            choices.data() + candidate.seen, int64_t{count - candidate.seen}, padded_);
        candidate.nearest = std::max(candidate.nearest, cosine);
        candidate.seen = count;
        candidate.value = diverse_value(candidate.worth, params_.strength, candidate.nearest);
    }

    const SelectDiverseParams& params_;
    CpuRow row_;
    const T* features_;
    const int64_t padded_;
    Scratch& scratch_;
};

}  // namespace

Status select_diverse_cpu(const SelectDiverseParams& params) {
    FirstError error;
    dispatch_dtype(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const int64_t steps = params.rows.tokens * (params.channels + 1);
        parallel_items(params.rows.rows, steps, [&](int64_t begin, int64_t end) {
            Scratch scratch;
            for (int64_t row = begin; row < end; ++row) {
                DiverseRow<T>(params, row, error, scratch).run();
            }
        });
    });
    return error.status();
}

}  // namespace lightvlm
