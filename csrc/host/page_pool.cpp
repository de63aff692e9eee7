#include "host/page_pool.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>
#include <unordered_map>

namespace lightvlm {

namespace {

constexpr int64_t kWordBits = 64;
constexpr int64_t kMostPages = std::numeric_limits<int32_t>::max();

[[noreturn]] void refuse(const std::string& name, int64_t got, const std::string& wants) {
    throw std::invalid_argument(name + ": got " + std::to_string(got) + ", " + wants);
}

std::string element(const char* name, size_t i) {
    return std::string(name) + "[" + std::to_string(i) + "]";
}

}  // namespace

PagePool::PagePool(int64_t pages) {
    if (pages < 0 || pages > kMostPages) {
        refuse("pages", pages, "must be in [0, " + std::to_string(kMostPages) + "]");
    }
    users_.resize(static_cast<size_t>(pages));
    free_.resize(static_cast<size_t>((pages + kWordBits - 1) / kWordBits));
    reset();
}

void PagePool::reset() {
    std::fill(users_.begin(), users_.end(), 0);
    std::fill(free_.begin(), free_.end(), ~uint64_t{0});
    if (pages() % kWordBits != 0) free_.back() = (uint64_t{1} << pages() % kWordBits) - 1;
    first_free_word_ = 0;
    available_ = pages();
}

// The lowest free page. There is one.
int64_t PagePool::take() {
    while (free_[first_free_word_] == 0) ++first_free_word_;
    uint64_t& word = free_[first_free_word_];
    const int64_t page =
        static_cast<int64_t>(first_free_word_) * kWordBits + std::countr_zero(word);
    word &= word - 1;
    users_[page] = 1;
    --available_;
    return page;
}

std::vector<int64_t> PagePool::allocate(int64_t n) {
    if (n < 0) refuse("n", n, "must be >= 0");
    if (n > available_) {
        throw OutOfPages("allocate: got n = " + std::to_string(n) + ", but " +
                         std::to_string(available_) + " of " + std::to_string(pages()) +
                         " pages are free");
    }
    std::vector<int64_t> ids(static_cast<size_t>(n));
    for (int64_t& id : ids) id = take();
    return ids;
}

void PagePool::check_used(const std::vector<int64_t>& ids, const char* name) const {
    for (size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0 || ids[i] >= pages()) {
            refuse(element(name, i), ids[i], "must be in [0, " + std::to_string(pages()) + ")");
        }
        if (users_[ids[i]] == 0) refuse(element(name, i), ids[i], "which is a free page");
    }
}

void PagePool::free(const std::vector<int64_t>& ids) {
    check_used(ids, "ids");
    for (size_t i = 0; i < ids.size(); ++i) {
        int32_t& users = users_[ids[i]];
        if (users == 0) {  // named more often than it has users: give back what was taken
            for (size_t k = 0; k < i; ++k) ++users_[ids[k]];
            refuse(element("ids", i), ids[i],
                   "which is named more often than it has users (double free)");
        }
        --users;
    }
    for (const int64_t id : ids) {
        const auto word = static_cast<size_t>(id / kWordBits);
        const uint64_t bit = uint64_t{1} << id % kWordBits;
        if (users_[id] != 0 || (free_[word] & bit) != 0) continue;
        free_[word] |= bit;
        first_free_word_ = std::min(first_free_word_, word);
        ++available_;
    }
}

void PagePool::share(const std::vector<int64_t>& ids) {
    check_used(ids, "ids");
    for (size_t i = 0; i < ids.size(); ++i) {
        int32_t& users = users_[ids[i]];
        if (users == std::numeric_limits<int32_t>::max()) {
            for (size_t k = 0; k < i; ++k) --users_[ids[k]];
            refuse(element("ids", i), ids[i], "which has as many users as can be counted");
        }
        ++users;
    }
}

std::vector<int64_t> PagePool::refcount(const std::vector<int64_t>& ids) const {
    std::vector<int64_t> counts;
    counts.reserve(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0 || ids[i] >= pages()) {
            refuse(element("ids", i), ids[i], "must be in [0, " + std::to_string(pages()) + ")");
        }
        counts.push_back(users_[ids[i]]);
    }
    return counts;
}

std::vector<int64_t> PagePool::refcounts() const { return {users_.begin(), users_.end()}; }

std::vector<std::pair<int64_t, int64_t>> PagePool::copy_on_write(const std::vector<int64_t>& pages,
                                                                 int64_t begin, int64_t end,
                                                                 int64_t page_size) {
    if (page_size < 1) refuse("page_size", page_size, "must be >= 1");
    if (begin < 0) refuse("begin", begin, "must be >= 0");
    if (end < begin) refuse("end", end, "must be >= begin = " + std::to_string(begin));
    const auto blocks = static_cast<int64_t>(pages.size());
    const int64_t last = end > begin ? (end - 1) / page_size : -1;
    if (last >= blocks) {
        refuse("end", end,
               "but " + std::to_string(blocks) + " pages of " + std::to_string(page_size) +
                   " tokens end before");
    }
    check_used(pages, "pages");

    // A page that the sequence names twice is its own other user once.
    std::unordered_map<int64_t, int64_t> left;
    std::vector<int64_t> shared;
    for (int64_t block = begin / page_size; block <= last; ++block) {
        const int64_t page = pages[block];
        int64_t& users = left.try_emplace(page, users_[page]).first->second;
        if (users <= 1) continue;
        --users;
        shared.push_back(page);
    }
    if (static_cast<int64_t>(shared.size()) > available_) {
        throw OutOfPages("copy_on_write: needs " + std::to_string(shared.size()) + " pages, but " +
                         std::to_string(available_) + " of " + std::to_string(this->pages()) +
                         " are free");
    }
    std::vector<std::pair<int64_t, int64_t>> copies;
    copies.reserve(shared.size());
    for (const int64_t page : shared) {
        copies.emplace_back(page, take());
        --users_[page];
    }
    return copies;
}

}  // namespace lightvlm
