// Host-side books of a device page allocator: for each pool row an upper bound of the pages that the device may hold.
// Header-only, no dependencies. What the numbers mean and when to call what: dflash_kernels/ledger.py, whose PyKvLedger
// behaves the same.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace dflash::host {

class KvLedger {
 public:
  KvLedger(int64_t num_pages, int64_t page_size, int64_t rows)
      : num_pages_(at_least("num_pages", num_pages, 0)),
        page_size_(at_least("page_size", page_size, 1)),
        pages_(at_least("rows", rows, 0)),
        wanted_(pages_.size(), kNotAsked) {}

  int64_t num_pages() const { return num_pages_; }
  int64_t page_size() const { return page_size_; }
  int64_t rows() const { return static_cast<int64_t>(pages_.size()); }
  int64_t used_pages() const { return used_; }
  int64_t free_pages() const { return num_pages_ - used_; }
  int64_t row_len(int64_t row) const { return pages_[check_row(row)] * page_size_; }

  bool try_reserve(const std::vector<int64_t>& rows, const std::vector<int64_t>& lens) {
    if (rows.size() != lens.size()) {
      throw std::invalid_argument("KvLedger.try_reserve: lens must have " + std::to_string(rows.size()) +
                                  " entries, as rows, got " + std::to_string(lens.size()));
    }
    const Scratch scratch(*this, rows);
    // Counted against what is free, so that no sum of lengths can overflow.
    int64_t left = free_pages();
    for (size_t i = 0; i < rows.size(); ++i) {
      const size_t row = check_row(rows[i]);
      if (wanted_[row] != kNotAsked) {
        throw std::invalid_argument("KvLedger.try_reserve: rows must be distinct, got " + std::to_string(row) +
                                    " twice");
      }
      const int64_t pages = pages_of(lens[i]);
      wanted_[row] = pages > pages_[row] ? pages : pages_[row];
      const int64_t more = wanted_[row] - pages_[row];
      left = more > left ? -1 : left - more;  // once negative, it stays so: more >= 0
    }
    if (left < 0) return false;
    for (const int64_t row : rows) pages_[row] = wanted_[row];
    used_ = num_pages_ - left;
    return true;
  }

  void shrink(int64_t row, int64_t length) {
    int64_t& held = pages_[check_row(row)];
    const int64_t pages = pages_of(length);
    if (pages >= held) return;
    used_ -= held - pages;
    held = pages;
  }

  void release(int64_t row, int64_t keep_len) { shrink(row, keep_len); }

 private:
  static constexpr int64_t kNotAsked = -1;

  // Leaves wanted_ clean whichever way a call ends.
  struct Scratch {
    KvLedger& ledger;
    const std::vector<int64_t>& rows;
    Scratch(KvLedger& owner, const std::vector<int64_t>& asked) : ledger(owner), rows(asked) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() {
      for (const int64_t row : rows) {
        if (row >= 0 && row < ledger.rows()) ledger.wanted_[row] = kNotAsked;
      }
    }
  };

  static int64_t at_least(const char* name, int64_t value, int64_t least) {
    if (value < least) {
      throw std::invalid_argument("KvLedger: " + std::string(name) + " must be at least " + std::to_string(least) +
                                  ", got " + std::to_string(value));
    }
    return value;
  }

  size_t check_row(int64_t row) const {
    if (row < 0 || row >= rows()) {
      throw std::invalid_argument("KvLedger: row must be in [0, " + std::to_string(rows()) + "), got " +
                                  std::to_string(row));
    }
    return static_cast<size_t>(row);
  }

  int64_t pages_of(int64_t length) const {
    at_least("length", length, 0);
    return length / page_size_ + (length % page_size_ != 0);
  }

  int64_t num_pages_;
  int64_t page_size_;
  int64_t used_ = 0;
  std::vector<int64_t> pages_;   // booked pages of each row
  std::vector<int64_t> wanted_;  // try_reserve's; kNotAsked between calls
};

}  // namespace dflash::host
