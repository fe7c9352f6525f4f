// Which of the compiled instruction sets this processor runs.
#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

namespace batchnorm {

extern const Kernels baseline;
#if BATCHNORM_LEVELS > 1
extern const Kernels avx2;
#endif
#if BATCHNORM_LEVELS > 2
extern const Kernels avx512;
#endif

namespace {

// From the least to the most that this processor has.
int supported(const Kernels** sets) {
  int count = 0;
  sets[count++] = &baseline;
#if BATCHNORM_LEVELS > 1
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA has F16C, which old compilers cannot ask for.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return count;
  sets[count++] = &avx2;
#endif
#if BATCHNORM_LEVELS > 2
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    sets[count++] = &avx512;
#endif
  return count;
}

const Kernels* current = nullptr;

}  // namespace

const Kernels& kernels() {
  if (!current) use_kernels(-1);
  return *current;
}

int use_kernels(int level) {
  const Kernels* sets[3];
  const int count = supported(sets);
  current = sets[level < 0 || level >= count ? count - 1 : level];
  return count;
}

}  // namespace batchnorm
