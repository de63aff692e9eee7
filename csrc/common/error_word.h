// Errors that depend on tensor values, one bit each, shared by every op and backend.
//
//   CPU twin   returns a Status; <op>_op.cpp raises it as a ValueError (common/checks.h).
//   CUDA       never synchronises: the offending entry is ignored, and the bit is set in the
//              device error word that Params carries (may be null). Emulation behaves as CUDA.
#pragma once

#include <cstdint>
#include <limits>
#include <mutex>

namespace lightvlm {

enum ErrorBit : int32_t {
    kErrorIndexRange = 1 << 0,
    kErrorIndexOrder = 1 << 1,
    kErrorCount = 1 << 2,
    kErrorCapacity = 1 << 3,
    kErrorLens = 1 << 4,
    kErrorWeight = 1 << 5,
    kErrorInfiniteScore = 1 << 6,
    kErrorNegativeKeep = 1 << 7,
    kErrorSegmentRange = 1 << 8,
    kErrorMerge = 1 << 9,
    kErrorWindowRange = 1 << 10,
    kErrorNotFinite = 1 << 11,
    kErrorPageRange = 1 << 12,
    kErrorSharedPage = 1 << 13,
    kErrorLast = kErrorSharedPage,
};

// What a set bit means: the argument at fault and the limit it broke.
constexpr const char* describe_error(int32_t bit) {
    switch (bit) {
        case kErrorIndexRange:
            return "index: an entry lies outside [0, tokens)";
        case kErrorIndexOrder:
            return "index: entries must be strictly ascending up to count";
        case kErrorCount:
            return "count: a value lies outside [0, index slots]";
        case kErrorCapacity:
            return "capacity: a row keeps more tokens than capacity holds";
        case kErrorLens:
            return "lens, leftpad: must satisfy 0 <= leftpad <= lens <= tokens";
        case kErrorWeight:
            return "weight: must be finite and >= 0";
        case kErrorInfiniteScore:
            return "scores: +inf is not allowed together with mass";
        case kErrorNegativeKeep:
            return "keep: must be >= 0";
        case kErrorSegmentRange:
            return "segment: an id is not below the columns of keep";
        case kErrorMerge:
            return "merge: a count must be >= 0, a share in [0, 1]";
        case kErrorWindowRange:
            return "window: an id is not below the columns of merge";
        case kErrorNotFinite:
            return "key, value: an entry is NaN or infinite";
        case kErrorPageRange:
            return "block_table: a page in use lies outside [0, pages)";
        case kErrorSharedPage:
            return "block_table: a row would write into a page that others share";
        default:
            return "unknown error";
    }
}

// The first error in row order, whatever the thread count. position is the column, or -1.
struct Status {
    int32_t bit = 0;
    int64_t row = std::numeric_limits<int64_t>::max();
    int64_t position = -1;
    double value = 0.0;

    bool ok() const { return bit == 0; }
};

// Collects the Status of rows that threads work on.
class FirstError {
  public:
    void report(int32_t bit, int64_t row, int64_t position, double value) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (row < status_.row) status_ = Status{bit, row, position, value};
    }
    const Status& status() const { return status_; }

  private:
    std::mutex mutex_;
    Status status_;
};

}  // namespace lightvlm
