// What a call is, in plain numbers and pointers: shared by all that is compiled here.
#pragma once

#include <stdint.h>

namespace batchnorm {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class Dtype { kFloat, kDouble, kBFloat16, kFloat16, kOther };

// A dense tensor in the order of its memory: element (o, c, i) is at (o * channels + c) * inner + i.
// Contiguous (N, C, H, W) has inner = H * W; channels-last, and (N, C), have inner = 1.
struct Shape {
  int64_t outer, channels, inner;
};

enum Activation : int { kNone = 0, kRelu = 1, kLeakyRelu = 2 };

// A forward pass. Per-channel values are doubles whatever the dtype of the data.
struct Forward {
  Shape shape;
  const void* x;
  const void* residual;  // like x, or null
  const void* mask;      // (outer, inner) weights in the precision of computation, or null
  void* y;               // null: only the moments are wanted
  double count;          // total weight
  double* mean;          // computed where `training`, given otherwise
  double* var;           // biased
  const double* gamma;
  const double* beta;
  double eps;
  double slope;          // of the activation, below zero
  Activation activation;
  bool training;
  bool stream;           // write past the cache
  int parts;             // how many threads share the work
};

// A backward pass. Gradients that are not wanted are null.
struct Backward {
  Shape shape;
  const void* dy;
  const void* x;
  const void* y;     // only to tell the activation's side where a residual was added; else null
  const void* mask;
  void* dx;
  void* dresidual;   // only where there is an activation or a mask: else it is dy itself
  double count;
  const double* mean;
  const double* var;
  const double* gamma;
  const double* beta;
  double* dgamma;    // computed, unless `sums_given`
  double* dbeta;
  double eps;
  double slope;
  Activation activation;
  bool training;     // the moments came from x: gradients go through them
  bool sums_given;   // nobody asks for dgamma and dbeta, or they are inputs
  bool stream;
  bool stream_early; // already in the first pass, what it writes
  int parts;
};

// One set of instructions' kernels.
struct Kernels {
  const char* name;
  void (*forward)(Dtype, const Forward&);
  void (*backward)(Dtype, const Backward&);
};

// Runs body(context, part) for each part on torch's threads; returns when all have.
void parallel(int parts, void (*body)(void* context, int part), void* context);

}  // namespace batchnorm
