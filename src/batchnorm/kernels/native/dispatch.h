#pragma once

#include "types.h"

namespace batchnorm {

// The kernels in use: the best that the processor runs, unless use_kernels said otherwise.
const Kernels& kernels();

// Use those of a level (0 is the least, below 0 the best); returns how many levels there are.
int use_kernels(int level);

}  // namespace batchnorm
