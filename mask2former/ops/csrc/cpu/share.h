// Work for threads that are not equally fast, and memory for it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mask2former {

// Memory that a thread keeps from call to call. New memory comes as pages that the system fills with zeros one by one when
// they are first written, which takes longer than much of the work here.
class Workspace {
 public:
  // For `count` numbers; what was there is lost, also by a call for another type.
  template <typename T>
  T* get(size_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const size_t whole = (bytes + kPage - 1) / kPage * kPage;
      memory_.reset(std::aligned_alloc(bytes < kPage ? kLine : kPage, bytes < kPage ? round(bytes) : whole));
      if (memory_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
      if (bytes >= kPage) madvise(memory_.get(), whole, MADV_HUGEPAGE);
#endif
      size_ = bytes < kPage ? round(bytes) : whole;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  static constexpr size_t kLine = 64, kPage = size_t{1} << 21;  // of the cache; a large one
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static size_t round(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// Calls function(begin, end, scratch) for pieces of the tasks, with `scratch` numbers of T of the thread's own. A thread
// takes the next piece when it is done with one: where a core has other work too, equal shares would wait for it.
template <typename T, typename Function>
void share(int64_t tasks, int64_t piece, int64_t scratch, Function function) {
  const int64_t pieces = (tasks + piece - 1) / piece;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), pieces);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local Workspace workspace;
    T* own = workspace.get<T>(scratch);
    for (int64_t at = next++; at < pieces; at = next++) function(at * piece, std::min(tasks, (at + 1) * piece), own);
  });
}

}  // namespace mask2former
