// Pages of a paged KV cache: which are free, and how many users each of the others has.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace lightvlm {

class OutOfPages : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Pages 0 .. pages - 1. Every call either does all that it says or throws and changes nothing:
// std::invalid_argument for a page that does not exist or is free, OutOfPages where too few are.
// Not synchronised: callers hold the interpreter's lock.
class PagePool {
  public:
    explicit PagePool(int64_t pages);

    // The n lowest free pages, ascending, with one user each.
    std::vector<int64_t> allocate(int64_t n);

    // Takes one user from each page, as often as it is named; a page without any is free again.
    void free(const std::vector<int64_t>& ids);

    // Gives each page one user more.
    void share(const std::vector<int64_t>& ids);

    std::vector<int64_t> refcount(const std::vector<int64_t>& ids) const;
    std::vector<int64_t> refcounts() const;

    // Before tokens [begin, end) of a sequence with these pages are written: for each page there
    // that others use too, (page, new page), where the caller has to copy the one to the other and
    // to put the new one in its place. The new page has one user, the old one loses one.
    std::vector<std::pair<int64_t, int64_t>> copy_on_write(const std::vector<int64_t>& pages,
                                                           int64_t begin, int64_t end,
                                                           int64_t page_size);

    void reset();
    int64_t pages() const { return static_cast<int64_t>(users_.size()); }
    int64_t available() const { return available_; }

  private:
    void check_used(const std::vector<int64_t>& ids, const char* name) const;
    int64_t take();

    std::vector<int32_t> users_;  // of each page; 0: free
    std::vector<uint64_t> free_;  // one bit each
    size_t first_free_word_ = 0;  // no word before it has a free page
    int64_t available_ = 0;
};

}  // namespace lightvlm
