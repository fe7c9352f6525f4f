// Who computes what, when: two passes over a tensor, with the sums of the first finished in between.
//
// A Work (forward.h, backward.h) knows what to do with a run of one channel's elements, or with a
// block of rows. The drivers here cut the tensor into such pieces, share them among threads, and
// order them so that the second pass finds in the cache what the first one has read.
//
// The pieces of a thread depend on the shape and the number of threads only, and partial sums are
// added in the order of the threads: the same call gives the same bits. No two threads write to the
// same element: each owns its pieces of the output, its own partial sums, and (where threads own
// whole channels) its channels' numbers. Between the passes, parallel() returns.
#pragma once

#include <stdlib.h>

#include "vectors.h"

namespace {

using batchnorm::Dtype;
using batchnorm::Shape;

// Memory for `count` values, freed at the end of the block. Not std::vector: see vectors.h. Values of a
// thousand channels are kept where the array is: on calls of microseconds a dozen mallocs took 0.4 µs.
template <class V>
struct Array {
  static constexpr int64_t kHere = 8192;
  alignas(64) char here[kHere];
  V* values;
  explicit Array(int64_t count) : values((V*)here) {
    const int64_t bytes = count * int64_t(sizeof(V));
    // Aligned for any register, whole lines: two threads' arrays share none.
    if (bytes > kHere && posix_memalign((void**)&values, 64, (bytes + 63) / 64 * 64)) abort();
  }
  ~Array() {
    if ((char*)values != here) free(values);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  V& operator[](int64_t index) const { return values[index]; }
  operator V*() const { return values; }
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Where part `part` of `parts` begins in `total` things.
inline int64_t start(int64_t total, int part, int parts) { return total * part / parts; }

// `p` moved on, if there is anything at all: null plus something is not defined.
template <class V>
inline V* moved(V* p, int64_t by) {
  return p ? p + by : nullptr;
}

template <class F>
inline void in_parallel(int parts, const F& body) {
  const auto fenced = [&body](int part) {
    body(part);
#if defined(__x86_64__)
    _mm_sfence();  // what was written past the cache is there before anyone is told
#endif
  };
  if (parts == 1) return fenced(0);
  typedef decltype(fenced) Fenced;
  batchnorm::parallel(
      parts, [](void* context, int part) { (*(const Fenced*)context)(part); }, (void*)&fenced);
}

// A channel's two sums: in the lanes of registers, and of what does not fill one.
struct Sums {
  Pair s, q;
  double rest_s, rest_q;
  double total_s() const { return total(s) + rest_s; }
  double total_q() const { return total(q) + rest_q; }
};

// What is to be done with each piece.
struct Work {
  Shape shape;
  int64_t bytes;    // of an element
  int64_t lanes;    // elements in a register
  bool two_passes;  // there are sums to take first
  bool writes;      // there is a second pass
  bool masked;

  // Runs of one channel's elements: where in memory, where in the mask, how many, whose.
  virtual void first_run(int64_t at, int64_t weight_at, int64_t n, int64_t c, Sums&) const = 0;
  virtual void second_run(int64_t at, int64_t weight_at, int64_t n, int64_t c) const = 0;

  // Blocks of rows, `columns` elements apart: rows [from, to), columns [begin, end). The sums are per
  // column.
  virtual void first_rows(int64_t from, int64_t to, int64_t begin, int64_t end, double* s,
                          double* q) const = 0;
  virtual void second_rows(int64_t from, int64_t to, int64_t begin, int64_t end) const = 0;
  int64_t columns;
  virtual void spread_first() = 0;  // to the columns, what first_rows needs
  virtual void spread_second() = 0;

  // The sums of channels [first, last) are complete, those of `first` at s[0] and q[0]; true if they
  // should be taken once more.
  virtual bool finish(int64_t first, int64_t last, const double* s, const double* q) = 0;
  // What the second pass needs of channels [first, last).
  virtual void prepare(int64_t first, int64_t last) = 0;
};

// Ask for memory this far ahead: a page, where the hardware's own prefetching stops. Measured, first
// pass of (32, 64, 56, 56): 17 GB/s without, 22 GB/s with 4096 (512: 18, 2048: 21), one thread.
constexpr int64_t kAhead = 4096;
inline void prefetch(const void* at, int64_t bytes = kAhead) {
  __builtin_prefetch((const char*)at + bytes);
}

// --- planes: each channel's elements lie in runs of `inner` ------------------------------------

// A block of channels is worked on together until its contiguous runs are this long: 4 KB, a page,
// beyond which the hardware's prefetching does not look anyway.
constexpr int64_t kRunBytes = 4096;

// Threads share channels if that leaves none more than this much more work than the mean.
constexpr double kImbalance = 1.125;

inline void planes_by_channel(int parts, Work& work) {
  const int64_t outer = work.shape.outer, channels = work.shape.channels, inner = work.shape.inner;
  const int64_t width = larger(1, kRunBytes / (inner * work.bytes));
  in_parallel(parts, [&](int part) {
    const int64_t end = start(channels, part + 1, parts);
    Array<Sums> sums(width);
    Array<double> s(width), q(width);
    for (int64_t first = start(channels, part, parts); first < end; first += width) {
      const int64_t last = smaller(first + width, end);
      bool again = true;
      for (int pass = 0; pass < 2 && again; ++pass) {
        for (int64_t c = first; c < last; ++c) sums[c - first] = Sums();
        for (int64_t o = 0; o < outer; ++o)
          for (int64_t c = first; c < last; ++c)
            work.first_run((o * channels + c) * inner, o * inner, inner, c, sums[c - first]);
        for (int64_t c = 0; c < last - first; ++c)
          s[c] = sums[c].total_s(), q[c] = sums[c].total_q();
        again = work.finish(first, last, s, q);
      }
      if (!work.writes) continue;
      work.prepare(first, last);
      // Backwards: what was read last is still in the cache.
      for (int64_t o = outer; o-- > 0;)
        for (int64_t c = last; c-- > first;)
          work.second_run((o * channels + c) * inner, o * inner, inner, c);
    }
  });
}

// A part of all runs: some of them whole, or a piece of each where there are few.
struct Piece {
  int64_t run, last_run, from, to;
};
inline Piece piece(const Shape& shape, int part, int parts) {
  const int64_t runs = shape.outer * shape.channels;
  if (runs >= 8 * parts)
    return {start(runs, part, parts), start(runs, part + 1, parts), 0, shape.inner};
  return {0, runs, start(shape.inner, part, parts), start(shape.inner, part + 1, parts)};
}

inline void planes_by_element(int parts, Work& work) {
  const int64_t channels = work.shape.channels, inner = work.shape.inner;
  if (work.two_passes) {
    Array<Sums> sums(parts * channels);
    Array<double> s(channels), q(channels);
    bool again = true;
    for (int pass = 0; pass < 2 && again; ++pass) {
      in_parallel(parts, [&](int part) {
        Sums* mine = sums + part * channels;
        for (int64_t c = 0; c < channels; ++c) mine[c] = Sums();
        const Piece p = piece(work.shape, part, parts);
        for (int64_t run = p.run; run < p.last_run; ++run)
          work.first_run(run * inner + p.from, run / channels * inner + p.from, p.to - p.from,
                         run % channels, mine[run % channels]);
      });
      for (int64_t c = 0; c < channels; ++c) {
        s[c] = q[c] = 0;
        for (int part = 0; part < parts; ++part) {
          s[c] += sums[part * channels + c].total_s();
          q[c] += sums[part * channels + c].total_q();
        }
      }
      again = work.finish(0, channels, s, q);
    }
  }
  if (!work.writes) return;
  work.prepare(0, channels);
  in_parallel(parts, [&](int part) {
    const Piece p = piece(work.shape, part, parts);
    for (int64_t k = p.run; k < p.last_run; ++k) {
      const int64_t run = work.two_passes ? p.last_run - 1 - (k - p.run) : k;
      work.second_run(run * inner + p.from, run / channels * inner + p.from, p.to - p.from,
                      run % channels);
    }
  });
}

// --- rows: neighbours in memory belong to different channels ------------------------------------

// The memory as `rows` rows of `columns` columns, each column of one channel: a column is one (c, i),
// and several outer indices make one row where a single one would not fill a few registers.
struct Rows {
  int64_t rows, columns, rest;  // `rest`: columns of a last, shorter row
};

// Registers that a row should fill at least, so that few elements are left over one by one.
constexpr int64_t kLeastPacks = 4;

inline Rows rows_of(const Shape& shape, int64_t lanes, bool masked) {
  const int64_t width = shape.channels * shape.inner;
  int64_t merged = 1;
  // A mask has one weight for each outer index.
  if (!masked && width < kLeastPacks * lanes) {
    int64_t a = width, b = lanes;
    while (b != 0) {
      const int64_t r = a % b;
      a = b, b = r;
    }
    merged = lanes / a;  // then a row is a whole number of registers
    while (merged * width < kLeastPacks * lanes) merged *= 2;
    while (merged > shape.outer) merged /= 2;
  }
  const int64_t rows = shape.outer / merged;
  return {rows, merged * width, (shape.outer - rows * merged) * width};
}

// Bytes of a block of rows, whose columns are worked through one register after the other: half of a
// first-level cache of 32 KB.
constexpr int64_t kRowBlockBytes = 16384;
constexpr int64_t kLeastRows = 8;

// A part of the rows; or of the columns where rows are few and no channel has two of them.
struct Tile {
  int64_t row, last_row, column, last_column;
  bool has_rest;
};
inline Tile tile(const Rows& rows, int64_t bytes, bool by_column, int part, int parts) {
  if (!by_column)
    return {start(rows.rows, part, parts), start(rows.rows, part + 1, parts), 0, rows.columns,
            part == parts - 1 && rows.rest > 0};
  const int64_t line = 64 / bytes, lines = (rows.columns + line - 1) / line;
  return {0, rows.rows, start(lines, part, parts) * line,
          smaller(start(lines, part + 1, parts) * line, rows.columns), false};
}

// Copies each channel's value to all of its columns.
template <class V>
inline void spread(const Shape& shape, const V* of_channel, V* of_column, int64_t columns) {
  if (columns == 0) return;
  const int64_t n = shape.channels * shape.inner;
  for (int64_t j = 0; j < n;)
    for (int64_t c = j / shape.inner, end = j + shape.inner; j < end; ++j) of_column[j] = of_channel[c];
  for (int64_t j = n; j < columns; j += n) memcpy(of_column + j, of_column, n * sizeof(V));
}

// Calls body(from, to) for the tile's rows in blocks that a first-level cache holds.
template <class F>
inline void blocks_of(const Tile& t, int64_t bytes, bool backwards, const F& body) {
  const int64_t row_bytes = larger((t.last_column - t.column) * bytes, 1);
  const int64_t height = larger(kLeastRows, kRowBlockBytes / row_bytes);
  const int64_t blocks = (t.last_row - t.row + height - 1) / height;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t from = t.row + (backwards ? blocks - 1 - k : k) * height;
    body(from, smaller(from + height, t.last_row));
  }
}

// Adds what all columns have of each channel, the same channel every `inner · channels` of them.
inline void gather(double* values, int64_t channels, int64_t inner, int64_t columns) {
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t j = c * inner; j < columns; j += channels * inner)
      for (int64_t i = 0; i < inner; ++i) sum += values[j + i];
    values[c] = sum;  // behind all that is still to be read
  }
}

inline void by_rows(int parts, Work& work) {
  const Rows rows = rows_of(work.shape, work.lanes, work.masked);
  const int64_t columns = rows.columns, channels = work.shape.channels, inner = work.shape.inner;
  const bool by_column = parts > 1 && columns == channels && rows.rows < 64 * parts &&
                         columns * work.bytes >= 256 * parts;
  work.columns = columns;
  if (work.two_passes) {
    const int own = by_column ? 1 : parts;
    Array<double> s(own * columns), q(own * columns);
    bool again = true;
    for (int pass = 0; pass < 2 && again; ++pass) {
      work.spread_first();
      in_parallel(parts, [&](int part) {
        const Tile t = tile(rows, work.bytes, by_column, part, parts);
        double* my_s = s + (by_column ? 0 : part * columns);
        double* my_q = q + (by_column ? 0 : part * columns);
        for (int64_t j = t.column; j < t.last_column; ++j) my_s[j] = my_q[j] = 0;
        blocks_of(t, work.bytes, false, [&](int64_t from, int64_t to) {
          work.first_rows(from, to, t.column, t.last_column, my_s, my_q);
        });
        if (t.has_rest) work.first_rows(rows.rows, rows.rows + 1, 0, rows.rest, my_s, my_q);
      });
      if (own * columns > channels) {
        gather(s, channels, inner, own * columns);
        gather(q, channels, inner, own * columns);
      }
      again = work.finish(0, channels, s, q);
    }
  }
  if (!work.writes) return;
  work.prepare(0, channels);
  work.spread_second();
  in_parallel(parts, [&](int part) {
    const Tile t = tile(rows, work.bytes, by_column, part, parts);
    if (t.has_rest) work.second_rows(rows.rows, rows.rows + 1, 0, rows.rest);
    blocks_of(t, work.bytes, true, [&](int64_t from, int64_t to) {
      work.second_rows(from, to, t.column, t.last_column);
    });
  });
}

// Runs shorter than this are not worth a loop of their own: all columns of (C, inner) are, together.
constexpr int64_t kShortRun = 32;

// With few rows, setting up each column would be most of the work.
constexpr int64_t kLeastRowsPerPart = 8;

inline bool in_rows(const Shape& shape, bool masked, int parts) {
  return shape.inner == 1 ||
         (shape.inner < kShortRun && !masked && shape.outer >= kLeastRowsPerPart * parts);
}

// How many columns need constants of their own: none where each is a channel.
inline int64_t columns_of(const Shape& shape, int64_t lanes, bool masked, int parts) {
  if (!in_rows(shape, masked, parts)) return 0;
  const int64_t columns = rows_of(shape, lanes, masked).columns;
  return columns == shape.channels ? 0 : columns;
}

inline void run(int parts, Work& work) {
  if (in_rows(work.shape, work.masked, parts)) return by_rows(parts, work);
  const int64_t channels = work.shape.channels, most = (channels + parts - 1) / parts;
  // Without sums to wait for, threads go through memory in its own order.
  if (work.two_passes && double(most * parts) <= kImbalance * double(channels))
    planes_by_channel(parts, work);
  else
    planes_by_element(parts, work);
}

}  // namespace
