// The kernels in one set of instructions: compiled once for each, with BATCHNORM_KERNELS its name.
#include "extremes.h"

namespace {

template <class Call, class F>
inline void by_dtype(Dtype dtype, const Call& call, const F& body) {
  switch (dtype) {
    case Dtype::kFloat: return body(call, float());
    case Dtype::kDouble: return body(call, double());
    case Dtype::kBFloat16: return body(call, batchnorm::BFloat16());
    case Dtype::kFloat16: return body(call, batchnorm::Float16());
    case Dtype::kOther: return;
  }
}

void forward(batchnorm::Dtype dtype, const Forward& call) {
  by_dtype(dtype, call, [](const Forward& f, auto element) {
    ForwardWork<decltype(element)> work(f);
    run(f.parts, work);
    forward_extremes<decltype(element)>(f);
  });
}

void backward(batchnorm::Dtype dtype, const Backward& call) {
  by_dtype(dtype, call, [](const Backward& b, auto element) {
    BackwardWork<decltype(element)> work(b);
    run(b.parts, work);
    backward_extremes<decltype(element)>(b);
  });
}

}  // namespace

#define BATCHNORM_TEXT_(x) #x
#define BATCHNORM_TEXT(x) BATCHNORM_TEXT_(x)

namespace batchnorm {
extern const Kernels BATCHNORM_KERNELS;
const Kernels BATCHNORM_KERNELS = {BATCHNORM_TEXT(BATCHNORM_KERNELS), forward, backward};
}  // namespace batchnorm
