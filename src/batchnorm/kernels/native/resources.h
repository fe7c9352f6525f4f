// How much of the machine a call gets: threads, and writes past the cache.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdio>

#include "tensors.h"

namespace {

// Elements from which on a second thread is worth waking.
constexpr int64_t kSerial = 32768;

// Limits in use instead of those measured, or -1: for tests, which cannot be as large as the limits.
inline int64_t serial_elements = -1;
inline int64_t stream_bytes = -1;

// Size of the last-level cache that the first processor uses. Asked once.
inline int64_t cache_bytes() {
  static const int64_t bytes = [] {
    // Not sysconf: on some processors it counts the caches of all groups of cores together.
    int64_t kilobytes = 0;
    if (FILE* file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      long long found = 0;
      if (fscanf(file, "%lldK", &found) == 1) kilobytes = found;
      fclose(file);
    }
    return kilobytes > 0 ? kilobytes << 10 : int64_t(32) << 20;
  }();
  return bytes;
}

// Writes go past the cache where all that is read and written would fill most of it, so that what
// is written does not push out what is still to be read. In evaluation nothing is read twice and
// the limit is higher: only the reading of what is overwritten is saved. Measured on 2 cores with
// 32 MB, (n, 64, 56, 56), time without by time with: forward 0.76 at 22 MB in all, 1.13 at 29, 1.29
// at 51; backward 0.8 at 19 MB, 1.1 at 24, 1.3 at 77; with a residual 1.13 and 1.3 (forward,
// backward) at 24 MB; in evaluation 0.8 at 38 MB, 1.07 at 51, and of dense rows 0.5 at 26 MB, 1.2
// at 34.
inline bool past_cache(int64_t bytes, bool reads_twice, bool rows) {
  const int64_t sixteenths = reads_twice ? 11 : rows ? 15 : 20;
  const int64_t cache = cache_bytes() / 16 * sixteenths;
  return bytes > (stream_bytes >= 0 ? stream_bytes : cache);
}

// Asks for huge pages only where whole ones are about to be written in full, so no memory is wasted
// on them. (Who gets that part of the heap next has them too.) A first write to a page of 4 KB
// costs 1.8 µs on the machine measured, many times the kernels' own work; to one of 2 MB 100 to 200
// µs. On systems where programs are not asked it changes nothing.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t from = ((uintptr_t)data + kHuge - 1) / kHuge * kHuge;
  const uintptr_t to = ((uintptr_t)data + uintptr_t(bytes)) / kHuge * kHuge;
  if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);  // a hint: refusing it is no error
#else
  (void)data, (void)bytes;
#endif
}

// A tensor like `t`, to be written in full.
inline Tensor output_like(const Tensor& t) {
  Tensor output = empty_as(t);
  ask_for_huge_pages(output.mutable_data_ptr(), t.numel() * size_of(dtype_of(t)));
  return output;
}

inline int parts_for(int64_t elements) {
  const int64_t limit = serial_elements >= 0 ? serial_elements : kSerial;
  return elements < limit ? 1 : int(torch::stable::get_num_threads());
}

}  // namespace
